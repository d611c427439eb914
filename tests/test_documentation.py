"""README and docs: links lead somewhere, commands parse, code imports what exists, and the README's code runs."""

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from gakernels.cli import _parser

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
CODE = ("*.py", "*.yaml", "*.h", "*.ipynb")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Of the headings, as MkDocs and GitHub form them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", page.read_text(encoding="utf-8"))):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if anchor and not anchor.startswith("gakernels."):  # those of the API page are made of docstrings
            assert anchor in anchors(target), link


def test_code_names_pages_that_exist() -> None:
    for folder in ("gakernels", "csrc", "examples", "benchmarks"):
        for file in (path for pattern in CODE for path in (ROOT / folder).rglob(pattern)):
            for name in re.findall(r"docs/\w+\.md", file.read_text(encoding="utf-8")):
                assert (ROOT / name).is_file(), f"{file}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_have_the_options_that_are_written(page: Path) -> None:
    parser = _parser()
    indented = re.findall(r"^ {4}(gakernels .*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    for line in re.sub(r"\\\n", " ", "".join(blocks(page, ""))).splitlines() + indented:
        found = re.match(r"(?:.* -m )?gakernels (.*)", line)
        if found and "..." not in line:
            assert parser.parse_args(shlex.split(found[1], comments=True)), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_imports_what_exists(page: Path) -> None:
    for block in blocks(page, "python"):
        imports = [node for node in ast.parse(block).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        exec("\n".join(map(ast.unparse, imports)), {})


def test_the_ten_lines_of_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], real_model: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    code = blocks(ROOT / "README.md", "python")[0]
    exec(code, {})
    assert {file.name for file in tmp_path.iterdir()} == {"vasa-lora", "vasa.gguf", "vasa.state"}
    said = re.search(r"# (\[.*\])", code)
    assert said
    assert ast.literal_eval(capsys.readouterr().out) == ast.literal_eval(said[1])


def test_the_operations_of_the_readme() -> None:
    operating = blocks(ROOT / "README.md", "python")[1]
    sizes = {"hidden": (1, 2, 5, 8), "a2": (4, 8), "b1": (8, 4), "sketch": (4, 2)}
    sizes |= {"a1": (6, 4), "b2": (4, 8), "x": (1, 7, 8), "weight": (6, 8)}
    names: dict[str, Any] = {name: torch.randn(size) for name, size in sizes.items()}
    names.update({"mask": torch.ones(1, 2, 5, dtype=torch.bool), "scale": 0.5})
    exec(operating, names)
    assert names["y"].shape == (1, 7, 6)
