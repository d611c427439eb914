"""`gakernels eval recall`, with the models of the package and with others."""

import json
from pathlib import Path

import pytest
import torch
from invented import make_tokenizer
from tiny import make_model

from gakernels.cli import main


def test_the_models_of_the_package_recall_what_only_the_context_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, threads = tmp_path / "recall.json", torch.get_num_threads()
    arguments = ["eval", "recall", "--tests", "facts,needle", "--facts", "8", "--lengths", "100", "--contexts", "4"]
    arguments += ["--methods", "closed_book,prompt,adapter", "--json", str(path)]
    assert main(arguments) == 0
    report = json.loads(path.read_text())
    found = {(row["method"], *row["cell"].items()): row["value"] for row in report["results"]}
    for cell in (("facts", 8), ("needle", 100)):
        # 32 questions and 4: the adapter alone makes them known, no chance and no other adapter does.
        assert found["adapter", cell] >= 0.75
        assert found["prompt", cell] >= 0.75
        assert found["closed_book", cell] <= 0.25
        assert found["other_adapter", cell] <= 0.25
    assert report["settings"]["chance"] == 1 / 64
    assert "data drawn by the seed" in path.with_suffix(".md").read_text()
    assert torch.get_num_threads() == threads
    answers = path.with_suffix(".answers.jsonl").read_bytes()
    assert main(arguments) == 0  # nothing is left to ask
    assert path.with_suffix(".answers.jsonl").read_bytes() == answers
    capsys.readouterr()
    assert main([*arguments, "--seed", "1"]) == 2
    assert "seed was 0 and is 1" in capsys.readouterr().err


def test_another_generator_with_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    model = make_model(tokenizer=make_tokenizer())
    model.base.save_pretrained(tmp_path / "base")
    model.tokenizer.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "generator", base_name=str(tmp_path / "base"))
    path = tmp_path / "recall.json"
    arguments = ["--generator", str(tmp_path / "generator"), "--tests", "overwritten,distractors", "--contexts", "2"]
    arguments += ["--overwritten", "1", "--distractors", "0,2", "--told", "2", "--limit", "2", "--json", str(path)]
    assert main(["eval", "recall", *arguments, "--methods", "closed_book,adapter,retrieval"]) == 0
    rows = json.loads(path.read_text())["results"]
    assert {row["metric"] for row in rows if "overwritten" in row["cell"]} == {"accuracy", "old_value"}
    assert {row["count"] for row in rows} == {2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tests", "facts,history"], "tests must be among"),
        (["--facts", "30"], "facts must be between 1 and 24"),
        (["--distractors", "-3"], "--distractors must be numbers above -1"),
        (["--lengths", "0"], "--lengths must be numbers above 0"),
        (["--lengths", "10"], "facts need a context of"),
        (["--methods", "sft_lora"], "no training questions"),
        (["--generator", "nowhere/at/all"], "--generator must be a folder"),
    ],
)
def test_bad_options_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "recall", "--contexts", "1", *[a.replace(" ", "") for a in arguments]]) == 2
    assert message in capsys.readouterr().err
