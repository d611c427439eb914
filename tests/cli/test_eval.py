"""`gakernels eval`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gakernels import __version__
from gakernels.evaluation.cost import COUNTED_METHODS


def test_cost_of_a_model_folder(run: Callable[..., Any], files: Any, tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    sizes = ["--state-size", 16, "--rank", 4, "--linears", "o_proj, down_proj", "--chunk-size", 8, "--dtype", "float32"]
    outcome = run("eval", "cost", "--model", files.base, "--context", "20,40,20", *sizes, "--json", path)
    assert (outcome.code, outcome.err) == (0, "")
    assert "a context of 20 tokens" in outcome.out
    assert "Ultragist" not in outcome.out
    results = json.loads(path.read_text(encoding="utf-8"))
    assert results["gakernels_version"] == __version__
    assert results["generator"]["linears"] == ["o_proj", "down_proj"]
    assert [part["tokens"] for part in results["contexts"]] == [20, 40]
    for part in results["contexts"]:
        assert {row["method"] for row in part["methods"]} == set(COUNTED_METHODS)
        rows = {row["method"]: row for row in part["methods"]}
        # 3 layers; o_proj is 32 x 32, down_proj 32 x 48; 2 heads of 8 for keys and values
        assert rows["adapter"]["storage"] == {"kind": "factors", "numbers": 1728, "bytes": 4 * 1728}
        assert rows["prompt_cached"]["storage"]["numbers"] == 3 * 2 * 2 * 8 * part["tokens"]
        for row in rows.values():
            for count in (row["query_flops"], row["contextualization_flops"]):
                assert count.pop("total") == sum(count.values())
    assert len(results["table_1"]) == 9


def test_a_config_file_is_enough(run: Callable[..., Any], files: Any) -> None:
    sizes = ["--context", 9, "--state-size", 16, "--rank", 4]
    of_file = run("eval", "cost", "--model", files.base / "config.json", *sizes)
    of_folder = run("eval", "cost", "--model", files.base, *sizes)
    assert of_file.code == of_folder.code == 0
    assert of_file.out.splitlines()[3:] == of_folder.out.splitlines()[3:] != []


def test_a_well_known_shape_and_the_papers_table(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    outcome = run("eval", "cost", "--shape", "mistral-7b", "--context", 1024, "--table-1")
    assert (outcome.code, outcome.err) == (0, "")
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in outcome.out.splitlines()]
    assert ["Full-conversation Prompting", "2.059", "2.059", "1.080", "128+", "147"] in cells
    assert ["Generative Adapter", "0.505", "0.505", "0.997", "32", "32"] in cells
    assert ["adapter_compact", "15.230 T", "1.022 T", "8.389 M", "16.777 M", "U and V"] in cells
    for method, what in COUNTED_METHODS.items():
        assert f"{method}: {what}" in outcome.out.splitlines()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--context", "1k"), "--context must be numbers of tokens above 0, separated by commas, but it is '1k'"),
        (("--context", "10,,20"), "--context must be numbers"),
        (("--context", "0"), "--context must be numbers"),
        (("--linears", "o_prj"), "linears: no linear layer is named 'o_prj'"),
        (("--rank", "2000"), "rank must be between 1 and state_size"),
        (("--epochs", "0"), "epochs must be at least 1, but it is 0"),
        (("--model", "x"), "argument --model: not allowed with argument --shape"),
    ],
)
def test_bad_options(refused_cost: Callable[..., str], options: tuple[str, ...], message: str) -> None:
    assert message in refused_cost("--shape", "mistral-7b", *options)


def test_a_model_that_is_not_there_is_named(refused_cost: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert f"--model: the configuration of '{tmp_path}' can't be read: " in refused_cost("--model", tmp_path)


def test_results_are_not_written_over_a_folder(run: Callable[..., Any], tmp_path: Path) -> None:
    outcome = run("eval", "cost", "--shape", "mistral-7b", "--json", tmp_path)
    assert outcome.code == 2
    assert f"{tmp_path} is a folder" in outcome.err
    assert not list(tmp_path.iterdir())


def test_a_task_is_needed(run: Callable[..., Any]) -> None:
    outcome = run("eval")
    assert (outcome.code, outcome.out) == (2, "")
    assert "the following arguments are required: TASK" in outcome.err


@pytest.fixture
def refused_cost(run: Callable[..., Any]) -> Callable[..., str]:
    """Runs the command with options that are a user's mistake; returns the one line that it says."""

    def refused_cost(*options: object) -> str:
        outcome = run("eval", "cost", *options)
        assert outcome.code == 2, outcome
        assert outcome.err.startswith("gakernels eval"), outcome.err
        assert outcome.err.count("\n") == 1, outcome.err
        assert outcome.out == ""
        return outcome.err

    return refused_cost
