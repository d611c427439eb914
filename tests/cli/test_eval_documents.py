"""`gakernels eval documents`, and the methods of the other evaluations that keep or cut prompts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from invented import random_text

from gakernels.demo import smollm2


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Rows about five texts."""
    path = tmp_path / "rows.jsonl"
    rows = [{"context": random_text(12 + n), "question": random_text(3), "answer": random_text(2)} for n in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_everything_is_measured_shown_and_written(
    run: Callable[..., Any], files: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    path = tmp_path / "out" / "documents.json"
    options = ["--sizes", "500,2000", "--counts", "2,4", "--new-tokens", 2, "--json", path]
    outcome = run("eval", "documents", *files.model, "--data", data, *options)
    assert outcome.code == 0, outcome.err
    assert max(map(len, outcome.out.splitlines())) <= 80
    report = json.loads(path.read_text())
    assert [cost["bytes"] for cost in report["reading"]] == [500, 2000]
    assert {(one["way"], one["documents"]) for one in report["sets"]["scores"]} == {
        *((way, 1) for way in ("closed_book", "prompt", "own_adapter", "other_adapter")),
        *((way, count) for way in ("updates_added", "states_added", "one_stream") for count in (2, 4)),
    }
    assert report["settings"]["data"] == "rows.jsonl"
    told = path.with_suffix(".md").read_text()
    for title in (
        "Reading a document",
        "Memory",
        "Appending a page",
        "F1 of the answers",
        "Making the adapter of a set",
    ):
        assert title in outcome.out
        assert f"## {title}\n" in told
    assert "| 2 kB |" in told
    assert "| 4: one stream of all |" in told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sizes", "1MB"), "--sizes must be numbers above 0, separated by commas, but it is '1MB'"),
        (("--counts", "2,8"), "counts must be between 2 and the 5 documents, but they are 2, 8"),
        (("--new-tokens", 0), "--new-tokens must be at least 1, but it is 0"),
        (("--json", "documents.md"), "--json must be a file whose name ends in .json, but it is documents.md"),
    ],
)
def test_wrong_options(
    refused: Callable[..., str], files: Any, data: Path, options: tuple[object, ...], message: str
) -> None:
    assert message in refused("eval", "documents", *files.model, "--data", data, "--sizes", 90, *options)


def test_without_a_generator_smollm2_is_needed(
    refused: Callable[..., str], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch() -> Path:
        raise OSError("no network")

    monkeypatch.setattr(smollm2, "fetch", fetch)
    told = refused("eval", "documents", "--data", data, "--counts", 2)
    assert "--model must name a copy of SmolLM2-135M-Instruct, since it can't be fetched: no network" in told


def test_prompts_that_are_cached_or_cut_and_tuned_contexts(
    run: Callable[..., Any], files: Any, data: Path, tmp_path: Path
) -> None:
    path = tmp_path / "r.json"
    methods = "prompt,prompt_cached,prompt_truncated_first,prompt_truncated_last,context_lora_1,context_lora_3"
    command = ["eval", "docqa", *files.model, "--data", data, "--train", data, "--lengths", "own", "--json", path]
    command += ["--methods", methods, "--style", "bare", "--adapted-style", "bare", "--new-tokens", 3]
    outcome = run(*command, "--truncate-to", 4)
    assert outcome.code == 0, outcome.err
    report = json.loads(path.read_text())
    f1 = {row["method"]: row["value"] for row in report["results"] if row["metric"] == "f1"}
    assert f1["prompt_cached"] == f1["prompt"]
    costs = {row["method"]: row for row in report["costs"]}
    assert set(costs) == set(methods.split(","))
    assert costs["prompt_truncated_first"]["context_tokens"] == 4
    assert costs["prompt_truncated_first"]["query_flops"]["total"] < costs["prompt"]["query_flops"]["total"]
    trained = [costs[f"context_lora_{steps}"]["contextualization_flops"]["total"] for steps in (1, 3)]
    assert trained[1] == 3 * trained[0]
    stored = {row["method"]: row["stored_bytes"] for row in report["measured_costs"]}
    assert stored["prompt_truncated_last"] < stored["prompt"] < stored["prompt_cached"]
    assert all(row["contextualization_seconds"] > 0 for row in report["measured_costs"] if "cached" in row["method"])
    chosen = {row["method"]: row["chosen"] for row in report["methods"]}
    assert chosen["context_lora_3"]["learning_rate"] in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    assert "learning rate 0." in path.with_suffix(".md").read_text()
    again = run(*command, "--truncate-to", 5)
    assert again.code == 2
    assert "truncate_to was 4 and is 5 now" in again.err
