"""The benchmarks as pytest-benchmark suites: `pytest benchmarks/ --benchmark-only`.

Every benchmark is a case with a provider. `cases.run_case` checks and measures it, on a GPU with device events; the
plugin gets the samples for its tables, its JSON and its comparisons.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cases import BenchmarkCase, Outcome, Session, run_case
from benchmarks.measure import Effort, Timing, measure_ceilings
from benchmarks.operations import SEED
from benchmarks.rows import RESULTS, ROOT, UNAVAILABLE, ResultRow, RowWriter, environment, read_rows

DTYPES = ("float32", "bfloat16", "float16")
STEP_PROVIDERS = ("reference", "auto", "trainer", "dense_lora", "frozen_base")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gakernels", "benchmarks of gakernels")
    group.addoption("--on", choices=("auto", "cpu", "cuda"), default="auto", help="device; auto: a GPU if there is one")
    group.addoption("--preset", default=None, help="sizes: tiny, cpu, cpu-mid or mistral-7b; by default by device")
    group.addoption("--bench-dtype", choices=DTYPES, default=None, help="bfloat16 on a GPU, float32 on a CPU")
    group.addoption("--providers", default=None, help="comma-separated; all, but on a CPU `compiled` only if named")
    group.addoption(
        "--seconds", type=_positive, default=None, help="time of the samples of one case (GPU 0.5, CPU 0.3)"
    )
    group.addoption(
        "--rows",
        type=Path,
        default=None,
        help="append the rows of results to FILE or, if it is `results`, to the device's folder in benchmarks/results",
    )


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, but it is {text}")
    return value


def pytest_report_header(config: pytest.Config) -> str:
    return f"random inputs: GAKERNELS_TEST_SEED={SEED}"


def _device(config: pytest.Config) -> torch.device:
    wanted = config.getoption("--on")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--on cuda: there is no GPU that this torch can use")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def _preset(config: pytest.Config) -> str:
    name: str | None = config.getoption("--preset")
    return name or ("mistral-7b" if _device(config).type == "cuda" else "cpu")


def _dtype(config: pytest.Config) -> torch.dtype:
    name = config.getoption("--bench-dtype") or ("bfloat16" if _device(config).type == "cuda" else "float32")
    return getattr(torch, name)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each case of the module and each provider, grouped so that the plugin compares the providers."""
    if "step_provider" in metafunc.fixturenames:
        metafunc.parametrize("step_provider", _step_providers(metafunc.config))
    if "case" not in metafunc.fixturenames:
        return
    config, make = metafunc.config, metafunc.module.SUITES[metafunc.function.__name__]
    device, preset = _device(config), _preset(config)
    given = config.getoption("--providers")
    try:
        cases: list[BenchmarkCase] = make(preset, device, _dtype(config), given.split(",") if given else None)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    chosen = [(case, name) for case in cases for name in case.providers if _by_default(name, given, device)]
    metafunc.parametrize(
        ("case", "provider"),
        [pytest.param(case, name, marks=pytest.mark.benchmark(group=str(case))) for case, name in chosen],
        ids=[f"{case.kernel}-{case.mode}-{case.shape.split()[0]}-{name}" for case, name in chosen],
    )


def _step_providers(config: pytest.Config) -> list[str]:
    given = config.getoption("--providers")
    return [name for name in STEP_PROVIDERS if not given or name in given.split(",")]


def _by_default(name: str, given: str | None, device: torch.device) -> bool:
    return given is not None or name != "compiled" or device.type == "cuda"  # compiling takes a minute on a CPU


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Session:
    """The device, its versions and its ceilings, measured once before everything else."""
    config = request.config
    device, dtype = _device(config), _dtype(config)
    seconds = config.getoption("--seconds") or (0.5 if device.type == "cuda" else 0.3)
    dtypes = sorted({dtype, torch.float32}, key=str)
    ceilings = measure_ceilings(device, dtypes, small=_preset(config) == "tiny")
    return Session(device, environment(device), ceilings, Effort(warmup=1, seconds=seconds, least=3))


@pytest.fixture(scope="session")
def writer(request: pytest.FixtureRequest, session: Session) -> RowWriter | None:
    path = request.config.getoption("--rows")
    if path is None:
        return None
    if str(path) == "results":
        return RowWriter(RESULTS / session.environment.folder / "suites.jsonl")
    return RowWriter(path)


# pytest-benchmark reads a clock around a call. This clock moves only with `advance`, the call that is given to it,
# which advances it by the next sample: so the plugin sees the samples that `measure.time_call` took.
_now = 0.0
_samples: Iterator[float] = iter(())


def clock() -> float:
    return _now


def advance() -> None:
    global _now
    _now += next(_samples, 0.0)


@pytest.fixture
def measured(benchmark: Any, session: Session, writer: RowWriter | None) -> Callable[[BenchmarkCase, str], Outcome]:
    """Run a case and give its samples to the plugin. A case without a time is skipped or fails, with one clear line."""

    def measure(case: BenchmarkCase, provider: str) -> Outcome:
        outcome = run_case(case, provider, session)
        row = outcome.row
        if writer:
            writer.write(row)
        if row.status == UNAVAILABLE:
            pytest.skip(f"{provider}: {row.detail}")
        if outcome.timing is None:
            pytest.fail(f"{case}, {provider}: {row.status}: {row.detail}", pytrace=False)
        benchmark.extra_info.update({name: value for name, value in row.to_dict().items() if value not in (None, "")})
        report(benchmark, outcome.timing)
        return outcome

    return measure


def report(benchmark: Any, timing: Timing) -> None:
    """Give the plugin the samples of a timing."""
    global _samples
    _samples = iter([sample * 1e-3 for sample in timing.samples_ms])
    benchmark._timer = clock  # what the plugin's option `timer` sets, for this benchmark only
    benchmark.pedantic(advance, rounds=len(timing.samples_ms))


@pytest.fixture(scope="session")
def training_rows(
    request: pytest.FixtureRequest, session: Session, writer: RowWriter | None, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, ResultRow]:
    """The rows of one run of `benchmarks.train_step`, by provider. On a CPU the preset `cpu` means `tiny`."""
    preset, file = _preset(request.config), tmp_path_factory.mktemp("training") / "rows.jsonl"
    words = [
        "--preset",
        "tiny" if preset == "cpu" else preset,
        "--providers",
        ",".join(_step_providers(request.config)),
    ]
    words += ["--device", session.device.type, "--threads", str(torch.get_num_threads()), "--rows", str(file)]
    command = [sys.executable, "-m", "benchmarks.train_step", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if not file.is_file():
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise RuntimeError(f"benchmarks.train_step wrote no results: {lines[-1] if lines else 'no message'}")
    rows = read_rows(file)
    for row in rows:
        if writer:
            writer.write(row)
    return {row.provider: row for row in rows}
