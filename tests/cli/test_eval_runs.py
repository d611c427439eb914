"""`gakernels eval docqa | icl | dialog | perplexity`, from files to reports."""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib.resources import files as package_files
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from invented import random_text

from gakernels import GenerativeAdapter
from gakernels.data.people import draw_document
from gakernels.generation.decoder import Decoder
from gakernels.training.run_folder import only_process

pytest.importorskip("bm25s")  # retrieval is one of the usual methods

BARE = ["--style", "bare", "--adapted-style", "bare", "--new-tokens", 4]


def text(words: int) -> str:
    return " ".join(random_text(words).split())


def squad(path: Path, paragraphs: int = 4, questions: int = 2, extra: tuple[dict[str, Any], ...] = ()) -> Path:
    made = [
        {
            "context": text(9 + number),
            "qas": [
                {"id": f"{number}-{n}", "question": text(4), "answers": [{"text": text(1)}]} for n in range(questions)
            ],
        }
        for number in range(paragraphs)
    ]
    path.write_text(json.dumps({"data": [{"title": "t", "paragraphs": [*made, *extra]}]}))
    return path


def task(path: Path, labels: tuple[str, ...], count: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    items = [
        {
            "task": path.name.split("_16_")[0],
            "input": f"{text(4)} w{n + 9}",
            "output": labels[n % len(labels)],
            "options": labels,
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def results(path: Path, metric: str) -> dict[str, float]:
    """By method, of the first cell."""
    report = json.loads(path.read_text())
    found: dict[str, float] = {}
    for row in report["results"]:
        if row["metric"] == metric:
            found.setdefault(row["method"], row["value"])
    return found


def test_docqa_tells_what_the_demos_generator_is_worth(
    run: Callable[..., Any], generator: torch.Generator, tmp_path: Path
) -> None:
    random = Random(generator.initial_seed())
    paragraphs = []
    for _ in range(6):
        document = draw_document(random, 1, (15, 18), "test")
        pairs = list(document.questions())[:8]
        qas = [{"id": "", "question": question, "answers": [{"text": answer}]} for question, answer in pairs]
        paragraphs.append({"context": document.text(), "qas": qas})
    data, path = tmp_path / "people.json", tmp_path / "out" / "r.json"
    data.write_text(json.dumps({"data": [{"title": "people", "paragraphs": paragraphs}]}))
    folder = package_files("gakernels.demo") / "assets" / "generator"
    methods = "closed_book,prompt,adapter,adapter_merged"
    options = ["--lengths", 1, "--methods", methods, "--style", "bare", "--adapted-style", "bare", "--new-tokens", 2]
    outcome = run("eval", "docqa", "--generator", folder, "--data", data, *options, "--json", path)
    assert outcome.code == 0, outcome.err
    f1 = results(path, "f1")
    assert f1["adapter"] > 0.9, f1
    assert f1["adapter_merged"] > 0.9, f1
    assert f1["prompt"] > 0.5, f1
    assert f1["closed_book"] < 0.4, f1
    assert f1["other_adapter"] < 0.4, f1  # comes along with an adapter
    assert "f1: adapter minus the others (%)" in outcome.out
    assert "No static LoRA trained with the generator's budget was given" in outcome.out
    for row in json.loads(path.read_text())["comparisons"]:
        if row["metric"] == "f1" and row["against"] in ("closed_book", "other_adapter"):
            assert row["low"] is None or row["low"] > 0
            assert row["value"] > 0.5
    assert {file.name for file in path.parent.iterdir()} >= {"r.json", "r.md", "r.html", "r.f1.svg", "r.answers.jsonl"}


def test_an_interrupted_run_goes_on(
    run: Callable[..., Any], files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, path = squad(tmp_path / "d.json"), tmp_path / "r.json"
    command = ["eval", "docqa", *files.model, "--data", data, "--lengths", "15", *BARE]
    original, calls = Decoder.generate, []

    def generate(self: Decoder, *options: Any) -> list[str]:
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return original(self, *options)

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "generate", generate)
        outcome = run(*command, "--json", path)
    assert outcome.code == 130
    assert f"the answers so far are stored next to {path}; run the command again to resume" in outcome.err
    assert not path.exists()
    kept = (tmp_path / "r.answers.jsonl").read_bytes()
    assert run(*command, "--json", path).code == 0
    assert (tmp_path / "r.answers.jsonl").read_bytes().startswith(kept)
    assert run(*command, "--json", tmp_path / "whole.json").code == 0
    interrupted, whole = (json.loads(file.read_text()) for file in (path, tmp_path / "whole.json"))
    assert interrupted["results"] == whole["results"]
    refused = run(*command, "--limit", 3, "--json", path)
    assert refused.code == 2
    assert "limit was None and is 3 now" in refused.err


def test_dialog_reads_every_kind_of_file(run: Callable[..., Any], files: Any, tmp_path: Path) -> None:
    turns = [{"text": text(5)} for _ in range(4)]
    msc = tmp_path / "msc.jsonl"
    entry = {
        "previous_dialogs": [{"dialog": turns}, {"dialog": turns[:2]}],
        "dialog": turns,
        "personas": [[text(3)], [text(4)]],
    }
    with_question = {**entry, "self_instruct": {"B": text(4), "A": text(2)}}
    msc.write_text("".join(json.dumps(line) + "\n" for line in (with_question, with_question, entry)) + "broken\n")
    persona = tmp_path / "persona.csv"
    with persona.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user 1 personas", "user 2 personas", "Best Generated Conversation"])
        for _ in range(2):
            writer.writerow([text(3), text(3), f"User 1: {text(4)}\nUser 2: {text(4)}\nUser 1: {text(2)}"])
    locomo = tmp_path / "locomo.json"
    session = [{"speaker": "A", "text": text(5)}]
    sample = {"conversation": {"session_1": session}, "qa": [{"question": text(3), "answer": text(1)}]}
    locomo.write_text(json.dumps([sample, {**sample, "conversation": {"session_1": [*session, *session]}}]))
    for data, questions, count in (
        (msc, [], 2),
        (msc, ["--questions", "recall"], 6),
        (msc, ["--questions", "response"], 9),
        (persona, [], 4),
        (locomo, [], 2),
    ):
        path = tmp_path / "r" / f"{data.stem}{len(questions)}{count}.json"
        options = ["--methods", "closed_book,prompt,retrieval,adapter", *BARE, "--json", path]
        outcome = run("eval", "dialog", *files.model, "--data", data, *questions, *options)
        assert outcome.code == 0, outcome.err
        report = json.loads(path.read_text())
        assert {row["count"] for row in report["results"]} == {count}
        assert {row["method"] for row in report["results"]} == {
            *("closed_book", "prompt", "retrieval", "adapter", "other_adapter")
        }
        assert bool(report["skipped"]["counts"]) == (data == msc)
    same = [*files.model, "--data", msc, "--methods", "closed_book", "--paper-data", "MSC-Self-Instruct"]
    path = tmp_path / "r" / "paper.json"
    assert run("eval", "dialog", *same, "--protocol", "released", "--json", path).code == 0
    shown = {file.name: "Paper, table 1" in file.read_text() for file in path.parent.glob("*.md")}
    assert [name for name, is_shown in shown.items() if is_shown] == ["paper.md"]
    for options in (["--protocol", "official"], ["--protocol", "released", "--limit", 3, "--style", "bare"]):
        refused = run("eval", "dialog", *same, *options)
        assert refused.code == 2
        told = " ".join(str(option) for option in options[:2]) + (", --limit, --style" if len(options) > 2 else "")
        assert f"needs --protocol released and nothing that changes it, but there is {told}" in refused.err


def test_icl_of_a_folder_and_of_files(run: Callable[..., Any], files: Any, tmp_path: Path) -> None:
    for name, labels in (("quarel", ("w3", "w4")), ("glue-rte", ("w5", "w6", "w7"))):
        test = task(tmp_path / "m" / name / f"{name}_16_13_test.jsonl", labels, 5)
        shutil.copy(test, test.with_name(f"{name}_16_21_test.jsonl"))  # the same items, as in MetaICL
        for seed in (13, 21):
            task(tmp_path / "m" / name / f"{name}_16_{seed}_train.jsonl", labels, 8)
            task(tmp_path / "m" / name / f"{name}_16_{seed}_dev.jsonl", labels, 3)
    path = tmp_path / "r.json"
    command = ["eval", "icl", *files.model, "--shots", "1,3", "--seeds", "13,21", "--json", path]
    methods = "closed_book,prompt,adapter,few_shot_lora"
    outcome = run(*command, "--data", tmp_path / "m", "--methods", methods, "--epochs", 2, "--limit", 4)
    assert outcome.code == 0, outcome.err
    report = json.loads(path.read_text())
    assert {row["metric"] for row in report["results"]} == {"match", "ranking_accuracy", "ranking_macro_f1"}
    together = [row for row in report["results"] if "task" not in row["cell"]]
    assert {(row["cell"]["kind"], row["cell"]["shots"]) for row in together} == {
        ("classification", 1),
        ("classification", 3),
    }
    assert {(row["clusters"], row["resampled"]) for row in together} == {(2, "tasks")}
    apart = [row for row in report["results"] if "task" in row["cell"]]
    assert {(row["count"], row["clusters"], row["resampled"]) for row in apart} == {(8, 4, "items")}  # under two seeds
    assert (report["settings"]["limit"], report["settings"]["sample_seed"]) == (4, 0)
    drawn = "A cell has at most 4 questions, in proportion to their categories, drawn at random with the seed 0."
    assert drawn in report["notes"]
    assert drawn in path.with_suffix(".md").read_text()
    options = ["--methods", methods, "--epochs", 2, "--limit", 4, "--sample-seed", 1]
    assert "sample_seed was 0 and is 1 now" in run(*command, "--data", tmp_path / "m", *options).err
    path.unlink()
    (tmp_path / "r.answers.jsonl").unlink()
    test, train = task(tmp_path / "test.jsonl", ("w3", "w4"), 4), task(tmp_path / "train.jsonl", ("w3", "w4"), 6)
    outcome = run(*command, "--data", test, "--train", train)
    assert outcome.code == 0, outcome.err
    (other,) = (run for run in json.loads(path.read_text())["methods"] if run["method"] == "other_adapter")
    assert other["left_out"] == {"no other context of the same kind": 4}
    refused = run(*command, "--data", test, "--train", train, "--methods", "sft_lora")
    assert refused.code == 2
    assert "sft_lora can't be used in icl" in refused.err
    assert "--train must name the items" in run(*command, "--data", test).err


def test_perplexity_of_text(run: Callable[..., Any], files: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(random_text(170))
    path = tmp_path / "r.json"
    command = ["eval", "perplexity", *files.model, "--data", tmp_path / "a.txt", "--tokens", 20]
    outcome = run(*command, "--json", path, "--protocol", "released")
    assert outcome.code == 0, outcome.err
    for metric in ("reconstruction_perplexity", "completion_perplexity"):
        assert set(results(path, metric)) == {"closed_book", "prompt", "adapter", "other_adapter"}
    refused = run(*command, "--methods", "retrieval")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "retrieval can't be used in perplexity: it has no questions" in refused.err


def test_two_processes_give_the_results_of_one(run: Callable[..., Any], files: Any, tmp_path: Path) -> None:
    data = squad(tmp_path / "d.json", paragraphs=40)
    command = ["eval", "docqa", *map(str, files.model), "--data", str(data), "--lengths", "1,30", *map(str, BARE)]
    assert run(*command, "--json", tmp_path / "one.json").code == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "gakernels", *command, "--json", str(tmp_path / "two.json")],
            env={
                **os.environ,
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in (0, 1)
    ]
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert printed[1].count(b"\xe2\x94\x8f") == 0  # only the first process prints tables
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one["results"] == two["results"]
    assert one["comparisons"] == two["comparisons"]
    assert (one["settings"]["processes"], two["settings"]["processes"]) == (1, 2)
    assert {file.name for file in tmp_path.glob("two.answers*")} == {"two.answers.jsonl", "two.answers.1.jsonl"}


def test_a_static_lora_in_the_generators_folder_comes_along(
    run: Callable[..., Any], files: Any, tmp_path: Path
) -> None:
    model = GenerativeAdapter.from_pretrained(files.generator)
    (tmp_path / "generator").mkdir()
    for file in files.generator.iterdir():
        (tmp_path / "generator" / file.name).write_bytes(file.read_bytes())
    model.adapt([text(9)])[0].save(tmp_path / "generator" / "static_lora.safetensors")
    options = ["--data", squad(tmp_path / "d.json"), "--lengths", 15, *BARE, "--methods", "adapter"]
    path = tmp_path / "r.json"
    outcome = run("eval", "docqa", "--generator", tmp_path / "generator", *options, "--json", path)
    assert outcome.code == 0, outcome.err
    assert set(results(path, "f1")) == {"adapter", "other_adapter", "static_lora"}
    assert "No static LoRA" not in outcome.out


BROKEN = (
    {"context": "", "qas": [{"question": "w3", "answers": [{"text": "w4"}]}]},
    {"context": "w3 w4", "qas": []},
    {"context": "w3 w5", "qas": [{"question": "w3", "answers": []}]},
    {"context": "w3 w6", "qas": [{"answers": [{"text": "w4"}]}]},
)


def test_bad_records_are_counted_and_the_rest_goes_on(run: Callable[..., Any], files: Any, tmp_path: Path) -> None:
    data, path = squad(tmp_path / "d.json", extra=BROKEN), tmp_path / "r.json"
    options = ["--data", data, "--lengths", 1, *BARE, "--methods", "closed_book", "--json", path]
    outcome = run("eval", "docqa", *files.model, *options)
    assert outcome.code == 0, outcome.err
    report = json.loads(path.read_text())
    assert sum(report["skipped"]["counts"].values()) == 6
    assert {row["count"] for row in report["results"]} == {8}
    assert "Records left out" in outcome.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "none.json"], "there is no file none.json"),
        (["--data", "bad.json"], "bad.json must be JSON"),
        (["--data", "empty.json"], "has no context with a question and an answer"),
        (["--data", "d.json", "--methods", "magic"], "methods must be among closed_book"),
        (["--data", "d.json", "--methods", "sft_lora"], "name their file with --train"),
        (["--data", "d.json", "--methods", "static_lora"], "name it with --static-lora"),
        (["--data", "d.json", "--lengths", "1k"], "--lengths must be numbers above 0"),
        (["--data", "d.json", "--limit", "0"], "limit must be at least 1"),
        (["--data", "d.json", "--json", "r.txt"], "--json must be a file whose name ends in .json"),
        (["--data", "d.json", "--batch-tokens", "0"], "batch_tokens must be at least 1"),
        (["--data", "d.json", "--train", "no.json", "--methods", "sft_lora"], "there is no file no.json"),
        (["--data", "d.json", "--static-lora", "d.json", "--methods", "static_lora"], "d.json"),
    ],
)
def test_mistakes_are_told_in_a_line(
    run: Callable[..., Any],
    files: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    squad(tmp_path / "d.json")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "empty.json").write_text('{"data": []}')
    outcome = run("eval", "docqa", *files.model, *options)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1), outcome
    assert outcome.err.startswith("gakernels eval: ")
    assert message in outcome.err
    assert {file.name for file in tmp_path.iterdir()} == {"d.json", "bad.json", "empty.json"}


def test_docqa_reads_flat_rows_each_context_by_itself(run: Callable[..., Any], files: Any, tmp_path: Path) -> None:
    data, path = tmp_path / "rows.jsonl", tmp_path / "report.json"
    rows = [{"context": f"one two w{number}", "question": f"w{number}?", "answer": number} for number in range(3)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--lengths", "own", "--methods", "closed_book,adapter", "--json", path]
    outcome = run("eval", "docqa", *files.model, "--data", data, *options)
    assert outcome.code == 0, outcome
    found = json.loads(path.read_text())["results"]
    assert {row["cell"]["length"] for row in found} == {"own"}
    assert {"f1", "exact_match"} <= {row["metric"] for row in found}


def test_a_second_evaluation_into_the_same_report_is_refused(
    run: Callable[..., Any], files: Any, tmp_path: Path
) -> None:
    data, path = squad(tmp_path / "d.json"), tmp_path / "r.json"
    command = ["eval", "docqa", *files.model, "--data", data, "--lengths", "15", "--methods", "closed_book", *BARE]
    with only_process(tmp_path / "r.lock", "another evaluation", "go"):
        outcome = run(*command, "--json", path)
        assert outcome.code == 2
        assert f"another evaluation writes to {path} (process {os.getpid()} on " in outcome.err
        assert not path.exists()
    assert run(*command, "--json", path).code == 0
    assert not (tmp_path / "r.lock").exists()
