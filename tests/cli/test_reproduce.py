"""`gakernels reproduce`: from data files to the page, with rows that lack their data, and interrupted runs."""

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from invented import random_text

from gakernels.evaluation.published import TABLES, Row
from gakernels.generation.decoder import Decoder


def text(words: int) -> str:
    return " ".join(random_text(words).split())


def put(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """All files that the tables read, but StreamingQA's questions for training."""
    folder = tmp_path / "data"

    def squad(count: int) -> object:
        qas = [[{"id": "", "question": text(3), "answers": [{"text": text(1)}]}] for _ in range(count)]
        return {"data": [{"paragraphs": [{"context": f"{text(20)} w{n + 9}", "qas": q} for n, q in enumerate(qas)]}]}

    put(folder / "squad/dev-v1.1.json", squad(4))
    put(folder / "squad/train-v1.1.json", squad(3))
    flat = [{"context": text(30), "question": text(3), "answers": [text(1)]} for _ in range(4)]
    put(folder / "streamingqa/eval.jsonl", lines(flat))
    turns = [{"text": text(5)} for _ in range(3)]
    asked = [{"previous_dialogs": [{"dialog": turns}], "self_instruct": {"B": text(3), "A": text(1)}} for _ in range(3)]
    put(folder / "msc_self_instruct.jsonl", lines(asked))
    hotpot = [{"_id": str(n), "question": text(3), "answer": text(1), "context": [["w3", [text(9)]]]} for n in range(3)]
    put(folder / "hotpotqa/hotpot_dev_distractor_v1.json", hotpot)
    put(folder / "slimpajama/validation.jsonl", lines([{"text": text(100)} for _ in range(3)]))
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shortest of the lengths, and shorter still: what the tiny model reads at once."""
    lengths = {"docqa": {512: 25, 1024: 60, 2048: 250}, "haystack": {1024: 300}, "perplexity": {1024: 32}}

    def smaller(row: Row) -> Iterator[Row]:
        option, known = "tokens" if row.task == "perplexity" else "lengths", lengths.get(row.task, {})
        length = row.options.get(option)
        if not isinstance(length, int):
            yield row
        elif length in known:
            yield replace(row, options={**row.options, option: known[length]})

    for name, table in TABLES.items():
        monkeypatch.setitem(TABLES, name, replace(table, rows=tuple(r for row in table.rows for r in smaller(row))))


def merged(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.fixture
def reproduce(run: Callable[..., Any], files: Any, data: Path, small: None, tmp_path: Path) -> Callable[..., Any]:
    def reproduce(table: str, *options: object, output: str = "out") -> Any:
        return run("reproduce", table, *files.model, "--data", data, "--output", tmp_path / output, *options)

    return reproduce


def test_table_5_stands_beside_the_papers_and_tells_what_is_missing(
    reproduce: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    outcome = reproduce("table5", "--paper-data")
    assert outcome.code == 0, outcome.err
    assert re.search(r"row 2 of 7: SQuAD, 1,024 tokens; about \d\d:\d\d left if the rest take as long", outcome.err)
    report = merged(tmp_path / "out/table5.json")
    assert [row["row"] for row in report["rows"] if row["reason"]] == ["StreamingQA, tuned"]
    why = report["rows"][-1]["reason"]
    assert why.startswith(f"streamingqa/train.jsonl is missing in {data}: made by `gakernels data streamingqa` of http")
    assert "streaminqa_train.jsonl.gz" in why
    page = (tmp_path / "out/table5.html").read_text()
    assert "<script" not in page
    assert not re.findall(r'(?:src|href)="(?!#)', page)
    assert page.count("<svg") == 4  # F1 and cost of both data sets
    for name in ("md", "html"):
        content = (tmp_path / f"out/table5.{name}").read_text()
        assert "F1 on SQuAD and StreamingQA, documents grouped to 512 to 32K tokens" in content
        assert "7 of 8 rows have results; protocol released" in content
        assert "streamingqa/train.jsonl is missing" in content

    tuned = {row["method"] for row in report["results"] if row["row"] == "SQuAD, tuned"}
    assert tuned == {"sft_full", "cpt_full"}

    # As the paper prints them.
    with (tmp_path / "out/table5.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    by_source = {
        row["source"]: row["value"]
        for row in rows
        if (row["row"], row["method"], row["metric"]) == ("SQuAD, 1,024 tokens", "adapter", "f1")
    }
    f1 = next(
        row["value"]
        for row in report["results"]
        if (row["row"], row["method"], row["metric"]) == ("SQuAD, 1,024 tokens", "adapter", "f1")
    )
    assert by_source == {
        "measured": str(100 * f1),
        "paper, Mistral-7B-Instruct": "43.0",
        "paper, Llama2-7B-Chat": "32.5",
    }
    assert re.search(
        r"\| SQuAD, tuned \| cpt_full \| [^|]+ \| 30.0 \| 23.9 \|", (tmp_path / "out/table5.md").read_text()
    )
    costs = {row["metric"] for row in rows if row["row"] == "SQuAD, 1,024 tokens" and row["method"] == "adapter"}
    assert costs >= {"stored_bytes", "first_token_seconds", "query_flops", "contextualization_seconds"}


def test_published_values_stand_only_beside_the_same_protocol(reproduce: Callable[..., Any], tmp_path: Path) -> None:
    assert reproduce("table1").code == 0
    assert merged(tmp_path / "out/table1.json")["published"] == []
    assert "66.0" not in (tmp_path / "out/table1.md").read_text()
    for options in (["--limit", 2], ["--protocol", "official"], ["--chat"]):
        refused = reproduce("table1", "--paper-data", *options, output="other")
        assert refused.code == 2
        assert "--paper-data needs --protocol released and nothing that changes it" in refused.err
    assert not (tmp_path / "other").exists()
    assert reproduce("table1", "--paper-data", output="paper").code == 0
    page = (tmp_path / "paper/table1.md").read_text()
    assert re.search(r"\| MSC-Self-Instruct \| prompt \| [^|]+ \| 66.0 \|", page)
    assert "| MSC-Self-Instruct | Ultragist (512 Tokens) | - | 40.8 |" in page


def test_an_interrupted_table_goes_on(
    reproduce: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = Decoder.generate, []

    def generate(self: Decoder, *options: Any) -> list[str]:
        calls.append(1)
        if len(calls) == 14:
            raise KeyboardInterrupt
        return original(self, *options)

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "generate", generate)
        outcome = reproduce("shine-squad")
    assert outcome.code == 130
    assert "run the command again to resume" in outcome.err
    rows = merged(tmp_path / "out/shine-squad.json")["rows"]
    assert rows[0]["reason"] == ""
    assert "not run yet" in {row["reason"] for row in rows}
    kept = {path: path.read_bytes() for path in (tmp_path / "out/shine-squad").glob("*.answers.jsonl")}
    assert len(kept) > 1
    assert reproduce("shine-squad").code == 0
    assert all(path.read_bytes().startswith(content) for path, content in kept.items())
    assert reproduce("shine-squad", output="whole").code == 0
    resumed, whole = (merged(tmp_path / name / "shine-squad.json") for name in ("out", "whole"))
    assert resumed["results"] == whole["results"]
    assert [row["row"] for row in resumed["rows"] if row["reason"]] == ["MuSiQue", "MS MARCO"]
    refused = reproduce("shine-squad", "--limit", 2)
    assert refused.code == 2
    assert "limit was None and is 2 now" in refused.err


def test_a_try_is_marked_everywhere(reproduce: Callable[..., Any], tmp_path: Path) -> None:
    assert reproduce("figure3", "--limit", 2).code == 0
    for name in ("md", "html"):
        page = (tmp_path / f"out/figure3.{name}").read_text()
        assert "(tried with --limit 2)" in page
        assert "Only tried: --limit 2" in page
    report = merged(tmp_path / "out/figure3.json")
    assert max(row["count"] for row in report["results"]) == 2
    counted = {(row["cell"]["length"], row["method"]) for row in report["costs"] if row["row"] == "from shapes"}
    assert len({length for length, _ in counted}) == 7
    assert {method for _, method in counted} >= {"prompt_cached", "adapter", "full_tuning"}
    assert {"figure3.counted.svg", "figure3.measured.svg"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_table_2_has_what_eval_says_of_each_generator(
    reproduce: Callable[..., Any], run: Callable[..., Any], files: Any, data: Path, tmp_path: Path
) -> None:
    other = ["--allow-other-base", "--setting", f"Feedforward={files.other_generator}", "--model", files.base]
    with pytest.warns(UserWarning, match="accepted anyway because of allow_other_base"):
        outcome = reproduce("table2", "--paper-data", *other)
    assert outcome.code == 0, outcome.err
    report = merged(tmp_path / "out/table2.json")
    reasons = {row["row"]: row["reason"] for row in report["rows"]}
    assert [name for name, reason in reasons.items() if not reason] == ["Default", "Feedforward"]
    assert "gakernels pretrain --set generator.norm=frobenius" in reasons["Frobenius"]
    scores: dict[str, list[float]] = {}
    for row in report["results"]:
        scores.setdefault(row["row"], []).append(row["value"])
    alone = tmp_path / "alone.json"
    arguments = ["--tokens", 32, "--protocol", "released", "--json", alone]
    assert run("eval", "perplexity", *files.model, "--data", data / "slimpajama/validation.jsonl", *arguments).code == 0
    assert scores["Default"] == [row["value"] for row in merged(alone)["results"]]
    assert scores["Default"] != scores["Feedforward"]
    assert re.search(
        r"\| Feedforward \| adapter \| [^|]+ \| [^|]+ \| 1.68 \| 7.26 \|", (tmp_path / "out/table2.md").read_text()
    )
    refused = reproduce("table2", "--setting", "Froben=x")
    assert refused.code == 2
    assert "NAME=GENERATOR with a name out of Reconstruction Only, Completion Only, Frobenius" in refused.err


def test_a_needle_needs_no_data(reproduce: Callable[..., Any], tmp_path: Path) -> None:
    outcome = reproduce("niah", "--limit", 2)
    assert outcome.code == 0, outcome.err
    report = merged(tmp_path / "out/niah.json")
    whole = [row for row in report["results"] if row["metric"] == "exact_match" and "category" not in row["cell"]]
    assert {(row["method"], row["count"]) for row in whole} == {
        (method, 2) for method in ("closed_book", "prompt", "adapter", "other_adapter")
    }


def test_without_any_data_the_page_is_written_all_the_same(
    reproduce: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    (data / "msc_self_instruct.jsonl").unlink()
    outcome = reproduce("table1")
    assert outcome.code == 2
    assert "no row of table1 could be run" in outcome.err
    source = "https://huggingface.co/datasets/MemGPT/MSC-Self-Instruct/resolve/main/msc_self_instruct.jsonl"
    assert f"not run: MSC-Self-Instruct - msc_self_instruct.jsonl is missing in {data}: {source}\n" in outcome.out
    assert source in (tmp_path / "out/table1.html").read_text()


def test_shines_values_are_those_of_its_paper_and_the_adapters_those_of_table_5() -> None:
    by_length = {
        row.options["lengths"]: {value.source: value.value for value in row.published if value.method == "adapter"}
        for row in TABLES["shine-squad"].rows
        if row.paper_data
    }
    assert {length: (found["paper, Mistral-7B-Instruct"], found["SHINE"]) for length, found in by_length.items()} == {
        512: (48.8, 53.4),
        1024: (43.0, 44.5),
        2048: (39.9, 37.5),
    }
