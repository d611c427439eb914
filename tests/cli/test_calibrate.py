"""`gakernels calibrate`: what it checks, times, keeps and tells; on a stand-in for a GPU, and rehearsed on the CPU."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gakernels.cli import calibrate as command
from gakernels.ops import dispatch, gpus, measured
from gakernels.ops.lowrank_linear import eager as linear_eager
from gakernels.ops.measured import calibration
from gakernels.training import calibrating
from gakernels.training.planned_calls import Call

GPU = gpus.known("NVIDIA GeForce RTX 4090")
pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("GAKERNELS_BACKEND", raising=False)
    dispatch.forget()
    yield
    dispatch.forget()


class StandIn:
    """A device whose clock goes on by one second whenever somebody looks, and whose times are given."""

    device = torch.device("cpu")

    def __init__(self, times: dict[str, float]) -> None:
        self.now, self.times = 0.0, times

    def seconds(self) -> float:
        self.now += 1
        return self.now

    def milliseconds(self, run: Callable[[], object]) -> float:
        return self.times.get(self.backend_of(run), 1.0)

    def backend_of(self, run: Callable[[], object]) -> str:
        cells = dict(zip(run.__code__.co_freevars, run.__closure__ or (), strict=True))
        return str(cells["backend"].cell_contents) if "backend" in cells else ""


LINEAR = {"batch": 2, "tokens": 5, "in": 16, "out": 24, "rank": 4}
SIZES = {
    "context_state": {"batch": 2, "tokens": 6, "hidden": 16, "state": 16},
    "low_rank_polar": {"batch": 1, "state": 16, "rank": 4, "power_iterations": 1},
    "lowrank_linear": LINEAR,
}


def call(operation: str, **changes: int) -> Call:
    sizes = tuple({**SIZES[operation], **changes}.items())
    return Call(operation, torch.float32, sizes, True, dispatch.Choice("eager", ""))


def test_kernels_that_are_right_are_timed() -> None:
    calls = [call("lowrank_linear"), call("context_state")]
    findings = calibrating.calibrate(calls, StandIn({"eager": 2.0, "triton": 0.5}), 60)
    assert findings.checks == {"lowrank_linear.triton": "", "context_state.triton": ""}
    assert [row["operation"] for row in findings.rows] == ["lowrank_linear", "context_state"]
    assert findings.rows[0] == {
        "operation": "lowrank_linear",
        "dtype": "float32",
        "sizes": LINEAR,
        "milliseconds": {"eager": [2.0, 1.0], "triton": [0.5, 1.0]},
    }
    assert (findings.unchecked, findings.unmeasured) == ([], 0)


def test_a_kernel_of_the_hardest_operation_is_right() -> None:
    findings = calibrating.calibrate([call("low_rank_polar")], StandIn({}), 60)
    assert findings.checks == {"low_rank_polar.triton": ""}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda y, z: (y * 1.001, z), "its value is 0.001 from the definition"),
        (lambda y, z: (y, z * 1.01), "its gradient 3 is 0.01 from the definition"),
        (lambda y, z: (y * torch.nan, z), "its value is nan from the definition"),
    ],
)
def test_a_kernel_that_is_wrong(monkeypatch: pytest.MonkeyPatch, fault: Any, message: str) -> None:
    from gakernels.ops.lowrank_linear import triton

    plain = triton.forward
    monkeypatch.setattr(triton, "forward", lambda *arguments: fault(*plain(*arguments)))
    findings = calibrating.calibrate([call("lowrank_linear"), call("context_state")], StandIn({}), 60)
    assert findings.checks["lowrank_linear.triton"].startswith(message)
    assert findings.checks["context_state.triton"] == ""
    assert [row["operation"] for row in findings.rows] == ["context_state"]  # what is wrong is not timed


def test_a_kernel_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    from gakernels.ops.lowrank_linear import triton

    def fall(*arguments: Any) -> None:
        raise RuntimeError("out of resource: shared memory\nand more")

    monkeypatch.setattr(triton, "backward", fall)
    findings = calibrating.calibrate([call("lowrank_linear")], StandIn({}), 60)
    assert findings.checks == {"lowrank_linear.triton": "RuntimeError: out of resource: shared memory"}


def test_a_call_without_memory_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def fall(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    target = StandIn({})
    monkeypatch.setattr(target, "milliseconds", lambda run: fall() if "backend" in run.__code__.co_freevars else 1.0)
    findings = calibrating.calibrate([call("lowrank_linear")], target, 60)
    assert findings.checks == {"lowrank_linear.triton": ""}
    assert findings.rows == []


def test_it_ends_in_time() -> None:
    """Each look at the clock takes a second: of the two kernels and three calls only so many are reached."""
    calls = [call("lowrank_linear"), call("context_state"), call("lowrank_linear", batch=1)]
    target = StandIn({})
    findings = calibrating.calibrate(calls, target, 2)
    assert findings.checks == {}
    assert findings.unchecked  # lowrank_linear at its smallest sizes came too late: right so far is not right
    assert (findings.rows, findings.unmeasured) == ([], 3)
    assert target.now <= 10
    later = calibrating.calibrate(calls, StandIn({}), 60)
    assert (set(later.checks), later.unmeasured, len(later.rows)) == (
        {"lowrank_linear.triton", "context_state.triton"},
        0,
        3,
    )


def test_the_record_rules_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = calibrating.calibrate([call("lowrank_linear")], StandIn({"eager": 2.0, "triton": 0.5}), 60)
    path = calibration.path_of(GPU)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(findings.record(GPU)))
    dispatch.forget()
    (row,) = measured.rows_of(GPU)
    assert (row.gpu, row.calibrated, row.backends) == (GPU.name, True, ("eager", "triton"))
    x, weight = torch.empty(2, 5, 16, device="meta"), torch.empty(24, 16, device="meta")
    lora_a, lora_b = torch.empty(2, 4, 16, device="meta"), torch.empty(2, 24, 4, device="meta")
    with gpus.pretend(GPU):
        choice = dispatch.choose("lowrank_linear", x, weight, lora_a, lora_b)
    assert choice.backend == "triton"
    assert "measured on this machine" in choice.reason


def test_the_oracle_is_another_formulation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that the kernel and the eager form share is seen: the definition is compared with."""
    from gakernels.ops.lowrank_linear import triton

    for module in (triton, linear_eager):
        plain = module.backward
        monkeypatch.setattr(
            module, "backward", lambda *arguments, plain=plain: tuple(2 * grad for grad in plain(*arguments))
        )
    findings = calibrating.calibrate([call("lowrank_linear")], StandIn({}), 60)
    assert findings.checks["lowrank_linear.triton"] == "its gradient 1 is 1 from the definition, 0.001 allowed"


# --- the command --------------------------------------------------------------------------------------------------


def test_without_a_gpu(refused: Callable[..., str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert refused("calibrate") == (
        "gakernels calibrate: an NVIDIA GPU is needed, but this torch finds none (--device cpu only rehearses)\n"
    )


@pytest.mark.parametrize("seconds", ["0", "-1", "nan"])
def test_seconds_that_are_none(refused: Callable[..., str], seconds: str) -> None:
    assert "--seconds must be above 0, but it is" in refused("calibrate", "--device", "cpu", "--seconds", seconds)


def test_a_rehearsal_checks_everything_and_keeps_nothing(run: Callable[..., Any], tmp_path: Path) -> None:
    outcome = run("calibrate", "--device", "cpu", "--model", "smollm2-135m", "--seconds", "10")
    assert (outcome.code, outcome.err) == (0, "")
    for operation in dispatch.OPERATIONS:
        assert f"{operation + '.triton':28} right" in outcome.out
    assert "calls measured" in outcome.out
    assert "nothing is stored" in outcome.out
    assert not list(tmp_path.rglob("*.json"))


def test_a_cache_that_can_not_be_written_is_told_before_anything_is_measured(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpus, "gpu_of", lambda kind, index: GPU)
    monkeypatch.setattr(calibrating, "calibrate", lambda *arguments: pytest.fail("it measures"))
    line = refused("calibrate")
    assert f"can't be written to {tmp_path / 'file'}" in line
    assert "set XDG_CACHE_HOME to use another cache folder" in line
    assert calibration.read(GPU) is None  # nor is there one to read


def test_a_record_that_can_not_be_read_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    path = calibration.path_of(GPU)
    path.mkdir(parents=True)  # which no one can read as a file
    with pytest.warns(UserWarning, match=f"{path} can't be read .*; it is ignored"):
        assert calibration.read(GPU) is None


def test_a_user_without_a_home_has_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nowhere)
    assert calibration.read(GPU) is None


def test_it_keeps_what_it_found(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in for a GPU, whose kernels are interpreted at tiny sizes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpus, "gpu_of", lambda kind, index: GPU)
    monkeypatch.setattr(command, "planned_calls", lambda recipe: {"stage": [call("lowrank_linear")]})
    monkeypatch.setattr(calibrating, "GpuDevice", lambda: StandIn({"eager": 2.0, "triton": 0.5}))
    outcome = run("calibrate")
    assert (outcome.code, outcome.err) == (0, "")
    path = calibration.path_of(GPU)
    assert f"stored in {path}" in outcome.out
    record = calibration.read(GPU)
    assert record is not None
    assert record["checks"] == {"lowrank_linear.triton": ""}
    assert record["capability"] == [8, 9]
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    monkeypatch.setattr(calibrating, "_fault", lambda *arguments: "it is wrong")
    outcome = run("calibrate")
    assert outcome.code == 0
    assert "lowrank_linear.triton        WRONG, and off on this GPU: it is wrong" in outcome.out
    assert calibration.obstacle(GPU, "lowrank_linear", "triton", verified=True) == (
        "it failed the check of `gakernels calibrate` on this GPU: it is wrong"
    )
