"""Fresh random inputs in each run. A failing test reports its seed; GAKERNELS_TEST_SEED repeats it."""

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import optional_packages
import pytest
import sharding
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic algorithms on a GPU
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported
    try:
        import interpreter
    except ImportError:
        pass  # without Triton the tests of its kernels are skipped
    else:
        interpreter.correct_bfloat16()
        interpreter.correct_loop_bounds()

from gakernels.demo import smollm2

torch.set_num_threads(1)  # the test processes share the cores; threads of tiny matrices only wait for each other

SEED_VARIABLE = "GAKERNELS_TEST_SEED"
SEED = int(os.environ.get(SEED_VARIABLE) or int.from_bytes(os.urandom(4), "big"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", metavar="K/N", type=sharding.parse, help="run the K-th of N parts of the tests")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(optional_packages)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The parts share out what other options, as -m, leave."""
    shard = config.getoption("--shard")
    if shard is not None:
        kept = sharding.part_of(items, shard)
        config.hook.pytest_deselected(items=[*set(items) - set(kept)])
        items[:] = kept


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """A generator of this test's own, so that a test draws the same numbers alone and in the whole suite."""
    request.node.add_report_section("setup", "seed", f"repeat with {SEED_VARIABLE}={SEED}")
    return torch.Generator().manual_seed(SEED ^ zlib.crc32(request.node.name.encode()))


@pytest.fixture(autouse=True)
def seed(generator: torch.Generator) -> None:
    """Random models and inputs that are drawn from the global generator start with the seed of the test too."""
    torch.manual_seed(generator.initial_seed())


@pytest.fixture
def device() -> torch.device:
    """Where kernels are tested: the GPU if there is one, else the CPU, where Triton's interpreter runs them."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The file of SmolLM2, fetched once (94 MB); a test that needs it is skipped where it can't be fetched."""
    if not optional_packages.reads_gguf():
        pytest.skip("this transformers does not read GGUF files with this gguf")
    try:
        return smollm2.fetch()
    except OSError as error:
        pytest.skip(f"SmolLM2 can't be fetched: {error}")


@pytest.fixture
def triton_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All operations run their Triton kernels, and memory that a kernel leaves unwritten holds NaN."""
    pytest.importorskip("triton")
    monkeypatch.setenv("GAKERNELS_BACKEND", "triton")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # torch.utils.deterministic.fill_uninitialized_memory is on by default
    yield
    torch.use_deterministic_algorithms(before)
