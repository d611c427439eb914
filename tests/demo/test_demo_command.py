"""`gakernels demo` with the models that are part of the package: what the README promises."""

import json
from pathlib import Path
from random import Random

import pytest

from gakernels.cli import main
from gakernels.data.people import draw_document

WAYS = {"closed_book", "prompt", "adapter", "other_adapter"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """The JSON of one run with a seed that no recipe used."""
    path = tmp_path_factory.mktemp("demo") / "results.json"
    assert main(["demo", "--seed", "20261", "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_the_json_has_every_way_and_size(results: dict) -> None:
    assert set(results["by_people"]) == {"1", "2", "4", "8"}
    for size in results["by_people"].values():
        assert set(size) >= {*WAYS, "any_person_level"}
        assert all(size[way]["questions"] >= 200 for way in WAYS)
    assert set(results["perplexity"]) == {"none", "adapter", "other_adapter"}
    assert results["seconds"] > 0
    assert results["peak_rss_bytes"] > 0


def test_the_adapter_answers_what_the_closed_book_can_not(results: dict) -> None:
    accuracy = {way: results["by_people"]["1"][way]["accuracy"] for way in WAYS}
    assert accuracy["closed_book"] <= 0.05
    assert accuracy["prompt"] >= 0.97
    assert accuracy["adapter"] >= 0.95
    assert accuracy["other_adapter"] <= 0.05


def test_the_own_adapter_lowers_the_perplexity_and_the_other_does_not(results: dict) -> None:
    perplexity = results["perplexity"]
    assert perplexity["adapter"] <= 0.6 * perplexity["none"]
    assert perplexity["adapter"] < perplexity["other_adapter"]


def test_where_the_prompt_binds_names_the_adapter_does_too(results: dict) -> None:
    for size in results["by_people"].values():
        if size["prompt"]["accuracy"] >= 2 * size["any_person_level"]:
            assert size["adapter"]["accuracy"] >= 0.9 * size["prompt"]["accuracy"]


def test_a_document_of_the_users_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = draw_document(Random(99), 1, (12, 12), "test")
    path, output = tmp_path / "document.txt", tmp_path / "results.json"
    path.write_text(document.text())
    questions, expected = zip(*document.questions()[:4], strict=True)
    asked = [argument for question in questions for argument in ("--question", question)]
    assert main(["demo", "--document", str(path), *asked, "--json", str(output)]) == 0
    answers = json.loads(output.read_text())["answers"]
    assert answers["adapter"] == answers["prompt"] == list(expected)
    assert answers["closed_book"] != list(expected)  # one may be right by chance, not all
    assert expected[0] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--question", "Who?"], "--document"),
        (["--questions", "0"], "--questions"),
        (["--document", "nowhere.txt"], "nowhere.txt"),
        (["--generator", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *arguments]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert len(error.strip().splitlines()) == 1
