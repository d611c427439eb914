"""Every example runs as it is and shows what it says."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from examples import adapt_to_a_file, follow_a_log, memory_of_two_users, operations_alone

FOLDER = Path(adapt_to_a_file.__file__).parent


def test_adapt_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(adapt_to_a_file.TEXT)
    answers = adapt_to_a_file.main(path, list(adapt_to_a_file.QUESTIONS))
    assert [answer.split(".")[0] for answer in answers] == ["grey hamster", "noble otter"]
    assert (tmp_path / "notes.adapter.safetensors").is_file()
    assert "tokens became" in capsys.readouterr().out


def test_follow_a_log(tmp_path: Path) -> None:
    first, second, third = follow_a_log.main(tmp_path)
    assert first[0] == "clock maker"
    assert first[1:] != ["rental sedan", "pale topaz"]  # not known yet
    assert second[:2] == ["clock maker", "rental sedan"]
    assert third == ["clock maker", "rental sedan", "pale topaz"]
    assert follow_a_log.main(tmp_path)[0] == third  # the same lines once more: the state on disk knew them already


def test_memory_of_two_users() -> None:
    assert memory_of_two_users.main() == {"Rimi": "smoked trout", "Dava": "poetry guild"}


def test_export_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    from examples import export_an_adapter

    assert export_an_adapter.main(tmp_path) < 1e-4
    written = capsys.readouterr().out
    for name in ("peft/adapter_config.json", "peft/adapter_model.safetensors", "adapter.gguf"):
        assert name in written


def test_operations_alone() -> None:
    before, after = operations_alone.main()
    assert after < 0.6 * before


def test_train_with_transformers(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from examples import train_with_transformers

    before, after = train_with_transformers.main(tmp_path, steps=12)
    assert after < before - 0.3
    assert (tmp_path / "generator.safetensors").is_file()


def executed(notebook: str) -> dict[str, Any]:
    """What the cells of a notebook define."""
    content = json.loads((FOLDER / notebook).read_text())
    assert content["nbformat"] == 4
    cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    return names


def test_the_tour() -> None:
    names = executed("tour.ipynb")
    total = len(names["expected"])
    assert names["right"] >= 0.9 * total
    assert sum(one == other for one, other in zip(names["closed_book"], names["expected"], strict=True)) < total / 3
    assert names["known"][0] < names["known"][1]
    assert names["batch_right"] >= 7


def test_the_notebook_of_smollm2(capsys: pytest.CaptureFixture[str], real_model: Path) -> None:
    names = executed("smollm2.ipynb")
    assert "Stockholm" in names["adapted"][0]
    assert "Stockholm" not in names["without"][0]
    assert names["own"] < 0.5 * min(names["closed_book"], names["others"])
    assert "vasa.gguf" in capsys.readouterr().out
    shutil.rmtree(names["folder"])


def test_every_example_is_tested() -> None:
    listed = {path.name for path in FOLDER.iterdir() if path.suffix in (".py", ".ipynb")} - {"__init__.py"}
    assert listed == {
        "adapt_to_a_file.py",
        "export_an_adapter.py",
        "follow_a_log.py",
        "linear_attention.py",  # by a file of its own
        "memory_of_two_users.py",
        "operations_alone.py",
        "smollm2.ipynb",
        "train_with_transformers.py",
        "tour.ipynb",
    }
