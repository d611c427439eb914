"""Figures of a generator for SmolLM2: questions about passages, and perplexity of text after a context.

    python figures.py --data data --confiqa confiqa.jsonl --books validation.jsonl --output results

It runs `gakernels eval` for each file and context length, one report each, and writes all of them as one table. Run it
again to continue where it stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from gakernels.demo import smollm2

QUESTIONS = {"squad": "SQuAD", "nq_swap": "NQ-Swap", "confiqa": "ConFiQA"}
TEXTS = {"books": "books", "wikitext": "WikiText-2"}
PLACES = ("start", "middle", "end")
PIECES = {256: 200, 1024: 40, 4096: 10}  # of a text, by tokens of context
METHODS = {
    "closed_book": "closed book",
    "prompt": "text in the prompt",
    "prompt_cached": "keys and values of the text",
    "prompt_truncated_first": "start of the text in the prompt",
    "prompt_truncated_last": "end of the text in the prompt",
    "retrieval": "100 words of the text in the prompt, by BM25",
    "retrieval_embedding": "the same, by embeddings",
    "adapter": "adapter of the text",
    "adapter_compact": "the same, kept as U and V",
    "other_adapter": "adapter of another text",
    "mean_context": "adapter of the mean of 256 texts",
    "static_lora": "static LoRA tuned on the same questions",
}
TEXT_METHODS = {name: METHODS[name] for name in ("prompt", "adapter")}
TUNED = {
    **TEXT_METHODS,
    **{f"context_lora_{steps}": f"LoRA of {steps} steps on the text" for steps in (1, 3, 10, 30, 100)},
    "context_distillation": "LoRA distilled from the prompt",
}
FLAGS = {"static_lora": "--static-lora", "retrieval_embedding": "--embedding-model"}
READ_METHODS = ("closed_book", "prompt_cached", "adapter", "other_adapter")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", type=Path, default=smollm2.GENERATOR)
    parser.add_argument("--data", type=Path, required=True, help="what make_data.py wrote")
    parser.add_argument("--confiqa", type=Path, help="flat rows of ConFiQA")
    parser.add_argument("--books", type=Path, help="held-out books, as JSON lines")
    parser.add_argument("--wikitext", type=Path, help="text of WikiText-2")
    parser.add_argument("--static-lora", type=Path, help="what static_lora.py wrote")
    parser.add_argument("--embedding-model", help="folder or hub name, for retrieval by embeddings")
    parser.add_argument(
        "--placed", type=int, default=40, help="questions for each place in longer texts (default: %(default)s)"
    )
    parser.add_argument("--tuned", type=int, default=40, help="questions for tuned LoRAs (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=300, help="of each data set (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="folder of the reports")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for name in QUESTIONS:
        path = options.confiqa if name == "confiqa" else options.data / "held-out" / f"{name}.jsonl"
        if path is not None:
            ask(options, name, path)
    for path in placed(options.data / "held-out", ".jsonl"):
        evaluate(options, questions(options, path, options.placed, TEXT_METHODS), path.stem)
    for name in TEXTS:
        if getattr(options, name) is not None:
            for length in PIECES:
                read(options, name, length)
    tune(options)
    (options.output / "README.md").write_text("\n".join(table(options.output)) + "\n")


def ask(options: argparse.Namespace, name: str, path: Path) -> None:
    """Questions about the passages of a file."""
    needed = {"static_lora": options.static_lora, "retrieval_embedding": options.embedding_model}
    methods = [method for method in METHODS if needed.get(method, True)]
    arguments = [part for each in needed if needed[each] for part in (FLAGS[each], needed[each])]
    evaluate(options, [*questions(options, path, options.questions, methods), *arguments], name)


def placed(folder: Path, suffix: str) -> list[Path]:
    """Files about passages at one place of longer texts, by the words of the texts and then by place."""
    found = [path for path in folder.glob(f"squad_*_*{suffix}") if path.suffix == suffix]
    return sorted(found, key=lambda path: (int(path.stem.split("_")[2]), PLACES.index(path.stem.split("_")[1])))


def tune(options: argparse.Namespace) -> None:
    """The same of SQuAD against LoRAs tuned on each text, which take minutes a text: fewer questions."""
    path = options.data / "held-out" / "squad.jsonl"
    evaluate(options, questions(options, path, options.tuned, TUNED), "squad-tuned")


def questions(options: argparse.Namespace, path: Path, limit: int, methods: Iterable[str]) -> list[object]:
    """The arguments of an evaluation with so many questions of a file."""
    arguments = ["docqa", "--data", path, "--train", options.data / "long" / "squad.jsonl"]
    arguments += ["--lengths", "own", "--part", "all", "--style", "paper", "--adapted-style", "plain"]
    return [*arguments, "--new-tokens", 16, "--limit", limit, "--methods", ",".join(methods)]


def read(options: argparse.Namespace, name: str, length: int) -> None:
    """Perplexity of documents after contexts of a length."""
    data, pieces = getattr(options, name), PIECES[length]
    arguments = ["perplexity", "--data", data, "--tokens", length, "--methods", ",".join(READ_METHODS)]
    if ".jsonl" in data.suffixes:  # plain text gives all its pieces anyway
        arguments += ["--pieces", pieces]
    evaluate(options, [*arguments, "--limit", pieces], f"{name}-{length}")


def evaluate(options: argparse.Namespace, arguments: Sequence[object], name: str) -> None:
    """Run an evaluation; its report gets that name."""
    shared = ["--generator", options.generator, "--model", smollm2.fetch(), "--dtype", "bfloat16"]
    shared += ["--batch-tokens", 4096, "--json", options.output / f"{name}.json"]
    command = [sys.executable, "-m", "gakernels", "eval", *arguments, *shared]
    subprocess.run([str(part) for part in command], check=True)


def table(folder: Path) -> Iterator[str]:
    """The reports of a folder as Markdown."""
    reports = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    asked = {name: label for name, label in QUESTIONS.items() if name in reports}
    yield from scores(reports, asked, METHODS)
    longer = [path.stem for path in placed(folder, ".json")]
    if longer:
        labels = {name: "{1} of {2} words".format(*name.split("_")) for name in longer}
        yield from scores(reports, labels, TEXT_METHODS)
    if "squad-tuned" in reports:
        yield from scores(reports, {"squad-tuned": "SQuAD, fewer questions"}, TUNED)
    yield "| perplexity of the text after | closed book | its keys and values | adapter | another's | own / another's |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, length in ((name, length) for name in TEXTS for length in PIECES):
        report = reports.get(f"{name}-{length}")
        if report:
            shown = [cell(report, method, "completion_perplexity") for method in READ_METHODS]
            ratio = cell({"results": report["comparisons"]}, "other_adapter", "completion_perplexity", "against")
            yield f"| {length:,} tokens of {TEXTS[name]} | " + " | ".join([*shown, ratio]) + " |"


def scores(reports: dict[str, dict], asked: dict[str, str], methods: dict[str, str]) -> Iterator[str]:
    """A table: methods by reports."""
    yield "| F1 / exact match, % | " + " | ".join(asked.values()) + " |"
    yield "| --- |" + " --- |" * len(asked)
    for method, label in methods.items():
        cells = [" / ".join(cell(reports[name], method, metric) for metric in ("f1", "exact_match")) for name in asked]
        yield f"| {label} | " + " | ".join(cells) + " |"
    yield ""


def cell(report: dict, method: str, metric: str, by: str = "method") -> str:
    """A value with its interval: percent, perplexity or a ratio."""
    for row in report["results"]:
        if row[by] == method and row["metric"] == metric:
            scale, digits = (100, 1) if row["unit"] == "fraction" else (1, 3 if row["unit"] == "ratio" else 2)
            value, low, high = (
                None if row[k] is None else f"{scale * row[k]:.{digits}f}" for k in ("value", "low", "high")
            )
            return f"{value}" if low is None else f"{value} [{low}, {high}]"
    return "-"


if __name__ == "__main__":
    main()
