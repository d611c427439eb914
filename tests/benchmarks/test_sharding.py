"""Parts of the tests for several processes, and files that need a package which is not there."""

import argparse
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sharding
from sharding import Shard

TESTS = Path(__file__).parents[1]


class Item:
    """As much of a test as the parts look at."""

    def __init__(self, number: int) -> None:
        self.number = number

    def get_closest_marker(self, name: str) -> object:
        return object() if name == "large" and self.number in (3, 4) else None


@pytest.mark.parametrize("count", [1, 2, 3, 14])
def test_every_test_is_in_one_part_and_the_large_ones_in_the_same(count: int) -> None:
    items = [Item(number) for number in range(20)]
    parts = [sharding.part_of(items, Shard(number, count)) for number in range(1, count + 1)]  # type: ignore[arg-type]
    numbers = [[item.number for item in part] for part in parts]  # type: ignore[attr-defined]
    assert sorted(itertools.chain(*numbers)) == list(range(20))
    assert [3 in part for part in numbers] == [4 in part for part in numbers]
    if count > 1:
        assert numbers[-1] == [3, 4]
        sizes = [len(part) for part in numbers[:-1]]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/2/3", "-1/3"])
def test_a_bad_part_is_named(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"must be K/N, the K-th of N parts, but it is '{text}'"):
        sharding.parse(text)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """With the plugin of this repository's conftest, and without `peft` and `starlette`."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = large\n")
    hide = "import sys\nfor name in ('peft', 'starlette'): sys.modules[name] = None\n"
    plugin = (
        "import optional_packages\ndef pytest_configure(config): config.pluginmanager.register(optional_packages)\n"
    )
    (tmp_path / "conftest.py").write_text(f"import sys\nsys.path.insert(0, {str(TESTS)!r})\n{hide}{plugin}")
    return tmp_path


def collected(project: Path, **files: str) -> subprocess.CompletedProcess[str]:
    for name, text in files.items():
        file = project / f"{name.replace('__', '/')}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", "."]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    return subprocess.run(command, cwd=project, capture_output=True, text=True, env=environment)


def test_a_missing_optional_package_skips_its_file_and_no_other(project: Path) -> None:
    done = collected(
        project,
        test_one="import peft.tuners\n",
        test_two="def test_it(): pass\n",
        server__conftest="from starlette.testclient import TestClient\n",
        server__test_three="def test_it(): pass\n",
    )
    assert done.returncode == 0, done.stdout
    assert "1 passed, 2 skipped" in done.stdout
    assert "peft" in done.stdout
    assert "starlette" in done.stdout
    assert "is not installed" in done.stdout


@pytest.mark.parametrize("error", ["import gakernels.absent", "from json import absent"])
def test_every_other_import_error_fails(project: Path, error: str) -> None:
    done = collected(project, test_one=f"{error}\n", test_two="def test_it(): pass\n")
    assert done.returncode == 2, done.stdout
    assert "1 error" in done.stdout
