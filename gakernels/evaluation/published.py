"""Published tables and figures as descriptions: a row is one `gakernels eval`, and the published values beside it.

`gakernels reproduce` runs them (docs/evaluation.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from gakernels.evaluation.paper import LENGTHS, TABLE_1_F1, TABLE_2, TABLE_5

SHAPES = "shapes"  # not an evaluation: costs that are counted from the shapes of the model
FROM_SHAPES = "none, from shapes"
PAPER = "paper"


@dataclass(frozen=True)
class DataFile:
    """A file of data.

    Attributes:
        name: in the data folder.
        source: the published file, and what to do with it.
    """

    name: str
    source: str


@dataclass(frozen=True)
class Published:
    """A published value.

    Attributes:
        source: who published it, of which model.
        method: under our name if it is one of ours.
        metric: under our name.
        value: F1 in percent, or a perplexity.
    """

    source: str
    method: str
    metric: str
    value: float


@dataclass(frozen=True)
class Row:
    """A row.

    Attributes:
        name: as shown.
        labels: put in front of the cells of its results.
        task: of `gakernels eval`, or `SHAPES`.
        options: of the task, beyond data and model.
        data, train: what it reads.
        paper_data: the name of the data in the paper, for --paper-data.
        published: shown only under the rule of --paper-data.
        setting: what the generator was trained with, if not as usual: it must be given under this name.
    """

    name: str
    labels: Mapping[str, str]
    task: str
    options: Mapping[str, str | int]
    data: DataFile | None = None
    train: DataFile | None = None
    paper_data: str | None = None
    published: tuple[Published, ...] = ()
    setting: str | None = None


@dataclass(frozen=True)
class Table:
    """A published table or figure.

    Attributes:
        title: as a heading.
        does: in one line, what is run.
        metrics: shown in its main table, under our names.
        rows: in the order in which they are run.
    """

    title: str
    does: str
    metrics: tuple[str, ...]
    rows: tuple[Row, ...] = field(repr=False)


SQUAD = DataFile("squad/dev-v1.1.json", "https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v1.1.json")
SQUAD_TRAIN = DataFile("squad/train-v1.1.json", "https://rajpurkar.github.io/SQuAD-explorer/dataset/train-v1.1.json")
_JOINED = (
    "made by `gakernels data streamingqa` of https://storage.googleapis.com/dm-streamingqa/streaminqa_{}.jsonl.gz and "
    "https://data.statmt.org/news-crawl/doc/en/news-docs.YEAR.en.filtered.gz (2007 to 2020)"
)
STREAMING_QA = DataFile("streamingqa/eval.jsonl", _JOINED.format("eval"))
STREAMING_QA_TRAIN = DataFile("streamingqa/train.jsonl", _JOINED.format("train"))
MSC = DataFile(
    "msc_self_instruct.jsonl",
    "https://huggingface.co/datasets/MemGPT/MSC-Self-Instruct/resolve/main/msc_self_instruct.jsonl",
)
SLIM_PAJAMA = DataFile(
    "slimpajama/validation.jsonl",
    "100 documents of 2,048 tokens or more, a `text` in each line, drawn from validation/chunk*/*.jsonl.zst of "
    "https://huggingface.co/datasets/cerebras/SlimPajama-627B (the paper's own sample is not published)",
)
HOTPOT_QA = DataFile(
    "hotpotqa/hotpot_dev_distractor_v1.json", "http://curtis.ml.cmu.edu/datasets/hotpot/hotpot_dev_distractor_v1.json"
)
MUSIQUE = DataFile(
    "musique/musique_ans_v1.0_dev.jsonl", "musique_ans_v1.0_dev.jsonl of https://github.com/StonyBrookNLP/musique"
)
MS_MARCO = DataFile(
    "msmarco/dev_v1.1.jsonl.gz",
    "https://msmarco.blob.core.windows.net/msmarco/dev_v1.1.json.gz (JSON lines, hence the other suffix)",
)


_METHODS = "closed_book,prompt,adapter"


def _table_1() -> Table:
    ours = {"Closed-book": "closed_book", "Full-conversation Prompting": "prompt", "Generative Adapter": "adapter"}
    published = tuple(
        Published(f"{PAPER}, Mistral-7B-Instruct", ours.get(model, model), "f1", value)
        for model, value in TABLE_1_F1.items()
    )
    name = "MSC-Self-Instruct"
    row = Row(name, {"data": name}, "dialog", {"methods": _METHODS}, MSC, paper_data=name, published=published)
    return Table(
        "Table 1: questions about conversations",
        "F1 on MSC-Self-Instruct without the conversations, with them in the prompt, and with an adapter of them, and "
        "what each costs. The paper's UltraGist is not built in.",
        ("f1",),
        (row,),
    )


# The generators of table 2: what to change in the recipe of the default one.
SETTINGS = {
    "Reconstruction Only": "--set trainer.loss_weights.completion=0",
    "Completion Only": "--set windows.slices=0",
    "Frobenius": "--set generator.norm=frobenius",
    "Feedforward": "--set generator.linears=[down_proj]",
}


def _table_2() -> Table:
    rows = []
    for setting, values in TABLE_2.items():
        published = tuple(
            Published(f"{PAPER}, Mistral-7B-Instruct", "adapter", f"{part}_perplexity", value)
            for part, value in zip(("reconstruction", "completion"), values, strict=True)
        )
        labels = {"data": "SlimPajama", "setting": setting}
        other = setting if setting in SETTINGS else None
        options: dict[str, str | int] = {"tokens": 1024, "methods": _METHODS}
        rows.append(Row(setting, labels, "perplexity", options, SLIM_PAJAMA, None, "SlimPajama", published, other))
    return Table(
        "Table 2: perplexities of the ablation",
        "Perplexity of 1,024 tokens of context (reconstruction) and of the 1,024 after them (completion), with a "
        "generator trained for each setting.",
        ("reconstruction_perplexity", "completion_perplexity"),
        tuple(rows),
    )


def _table_5() -> Table:
    data = (("SQuAD", SQUAD, SQUAD_TRAIN), ("StreamingQA", STREAMING_QA, STREAMING_QA_TRAIN))
    rows = [_documents(name, file, length) for name, file, _ in data for length in LENGTHS]
    rows += [_tuned(name, file, train) for name, file, train in data]
    return Table(
        "Table 5 and figure 2: questions about documents",
        "F1 on SQuAD and StreamingQA, documents grouped to 512 to 32K tokens: closed-book, prompt and adapter at each "
        "length, and all weights tuned on other questions (sft_full), or first on the documents (cpt_full).",
        ("f1",),
        tuple(rows),
    )


def _documents(name: str, file: DataFile, length: int, beside: tuple[Published, ...] = ()) -> Row:
    """A row about documents in groups of an average length."""
    options: dict[str, str | int] = {"lengths": length, "methods": _METHODS}
    published = (*_table_5_values(name, length, _METHODS), *beside)
    return Row(f"{name}, {length:,} tokens", {"data": name}, "docqa", options, file, None, name, published)


def _tuned(name: str, file: DataFile, train: DataFile) -> Row:
    """The tuned models, which are asked closed-book: the length only groups the questions."""
    methods, length = "sft_full,cpt_full", LENGTHS[0]
    options: dict[str, str | int] = {"lengths": length, "methods": methods}
    published = _table_5_values(name, length, methods)
    return Row(f"{name}, tuned", {"data": name}, "docqa", options, file, train, name, published)


def _table_5_values(data: str, length: int, methods: str) -> tuple[Published, ...]:
    return tuple(
        Published(f"{PAPER}, {part.model}", method, "f1", part.values(length)[method])
        for part in TABLE_5
        if part.data == data
        for method in methods.split(",")
    )


MEASURED_QUESTIONS = 32


def _figure_3() -> Table:
    name = "StreamingQA"
    rows = [Row("from shapes", {"data": FROM_SHAPES}, SHAPES, {})]
    for length in LENGTHS:
        options: dict[str, str | int] = {"lengths": length, "methods": _METHODS, "limit": MEASURED_QUESTIONS}
        rows.append(Row(f"{name}, {length:,} tokens", {"data": name}, "docqa", options, STREAMING_QA))
    return Table(
        "Figure 3: computation and storage by length",
        "Operations and storage of a context and of a question about it, 512 to 32K tokens, counted from the shapes of "
        f"the model; and seconds and bytes, measured on {MEASURED_QUESTIONS} questions of StreamingQA at each length.",
        (),
        tuple(rows),
    )


# SHINE (arXiv 2602.06358), on SQuAD in the groups of the paper's table 5.
SHINE_SQUAD = {512: 53.4, 1024: 44.5, 2048: 37.5}


def _shine_squad() -> Table:
    rows = [
        _documents("SQuAD", SQUAD, length, (Published("SHINE", "adapter", "f1", value),))
        for length, value in SHINE_SQUAD.items()
    ]
    own: dict[str, str | int] = {"lengths": "own", "methods": _METHODS, "protocol": "official"}
    for name, file in (("HotpotQA", HOTPOT_QA), ("MuSiQue", MUSIQUE), ("MS MARCO", MS_MARCO)):
        rows.append(Row(name, {"data": name}, "docqa", own, file))
    return Table(
        "The questions of SHINE: SQuAD at three lengths, and paragraphs of several documents",
        "F1 on SQuAD in groups of 512, 1,024 and 2,048 tokens; and on HotpotQA (distractor setting), MuSiQue "
        "(answerable) and MS MARCO v1.1, all paragraphs of a question as its context, with the official scores.",
        ("f1",),
        tuple(rows),
    )


NEEDLE_LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


def _niah() -> Table:
    rows = tuple(_needle_rows())
    return Table(
        "A needle in a haystack, by length",
        "Share of right answers to the number hidden in a text of 1K to 128K tokens, 100 texts a length, the needle in "
        "each tenth of the text equally often; text and question as in Doc-to-LoRA (arXiv 2602.15902).",
        ("exact_match",),
        rows,
    )


def _needle_rows() -> Iterator[Row]:
    for length in NEEDLE_LENGTHS:
        options: dict[str, str | int] = {"lengths": length, "methods": _METHODS, "protocol": "official"}
        yield Row(f"{length:,} tokens", {"data": "haystack"}, "haystack", options)


TABLES = {
    "table1": _table_1(),
    "table2": _table_2(),
    "table5": _table_5(),
    "figure3": _figure_3(),
    "shine-squad": _shine_squad(),
    "niah": _niah(),
}
