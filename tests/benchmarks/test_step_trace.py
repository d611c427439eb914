"""The trace of a training step on a GPU that is not there: no host waits, and launches as they were profiled."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import step_trace
from benchmarks.fake_gpu import FakeGpu, fake_gpu
from benchmarks.presets import PRESETS, Preset, make_batch
from benchmarks.step_trace import CUDA_KERNELS, Card, Trace, trace_step
from gakernels.errors import InputError
from gakernels.model.window_losses import window_losses
from gakernels.ops import dispatch, gpus
from gakernels.training.objective import WindowObjective

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    torch.backends.cuda.is_built() and not torch.cuda.is_available(), reason="a PyTorch for CUDA without a GPU"
)

CARD = Card.measured("NVIDIA H200")
SMALL = replace(PRESETS["tiny"], dtype=torch.bfloat16)
TWO = ("o_proj", "down_proj")
MIXED = replace(SMALL, linears=TWO, adapted_layers=(1,), static_rank=2, segments=2, family="mistral")
PROFILE = Path(__file__).parents[2] / "benchmarks/results/nvidia-h200/profile.json"


class Seen:
    """A watcher that keeps what it is told."""

    def __init__(self) -> None:
        self.operators: list[str] = []
        self.reasons: list[str] = []

    def called(self, gpu: FakeGpu, operator: Any, *_: Any) -> None:
        self.operators.append(operator.overloadpacket.__name__)

    def waits(self, reason: str) -> None:
        self.reasons.append(reason)


def seen(run: Callable[[Tensor], object]) -> Seen:
    """What a function of a matrix on the device does."""
    watcher = Seen()
    with fake_gpu(watcher, gpus.known("NVIDIA H200")):
        x = torch.ones(64, 1024, device="cuda", requires_grad=True)
        watcher.operators.clear()
        run(x)
    return watcher


# The device


@pytest.mark.parametrize(
    "run",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.detach().cpu(),
        lambda x: x.detach()[0, :3].tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x[torch.ones(64, dtype=torch.bool)],
        lambda x: x[torch.arange(3)],
        lambda x: torch.equal(x, x),
        lambda x: torch.masked_select(x, x > 0),
        lambda x: torch.tensor([1.0, 2.0], device="cuda"),
        lambda x: torch.ones(64, 1024).to("cuda"),
        lambda x: torch.ones(64, 1024).to("cuda", non_blocking=True),
        lambda x: torch.ones(64, 1024).pin_memory().to("cuda"),
        lambda x: torch.zeros(64, 1024).copy_(x.detach()),
        lambda x: torch.zeros_like(x).copy_(torch.ones(64, 1024)),
        lambda x: (x * Reading.apply(x)).sum().backward(),
    ],
)
def test_waits_are_seen(run: Callable[[Tensor], object]) -> None:
    assert seen(run).reasons


@pytest.mark.parametrize(
    "run",
    [
        lambda x: (F.silu(x) @ x.mT).sum().backward(),
        lambda x: x.index_select(0, torch.arange(3, device="cuda")).sum().backward(),
        lambda x: torch.where(x > 0, x, 0.0),
        lambda x: torch.ones(64, 1024).pin_memory().to("cuda", non_blocking=True),
        lambda x: torch.ones(8).to("cuda", non_blocking=True),
        lambda x: x / torch.tensor(3.0),
        lambda x: torch.full((), 2.0, device="cuda"),
    ],
)
def test_nothing_else_waits(run: Callable[[Tensor], object]) -> None:
    assert not seen(run).reasons


class Reading(torch.autograd.Function):
    """Waits in its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * grad.cpu().sum().item()


def test_operators_are_those_of_a_gpu() -> None:
    def run(x: Tensor) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            y = F.rms_norm(F.silu(x @ x.mT), (64,))
            assert y.is_cuda
            assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        assert x.grad is not None
        assert x.grad.is_cuda

    operators = seen(run).operators
    assert {"mm", "silu_backward", "_fused_rms_norm", "_fused_rms_norm_backward"} <= set(operators)
    assert not {"sigmoid", "rsqrt"} & set(operators)


def test_nothing_is_left_behind() -> None:
    seen(lambda x: x.sum().backward())
    x = torch.randn(3, 3, requires_grad=True)
    F.silu(F.rms_norm(x, (3,))).sum().backward()
    assert type(x.grad) is Tensor
    with pytest.raises((RuntimeError, AssertionError)) if not torch.cuda.is_available() else torch.no_grad():
        torch.ones(1, device="cuda")


# The step


@pytest.mark.parametrize("tuning", [False, True])
@pytest.mark.parametrize("preset", [SMALL, MIXED])
def test_the_host_never_waits_in_a_step(preset: Preset, tuning: bool) -> None:
    assert dict(trace_step(preset, CARD, tuning).waits) == {}


def test_parts_and_matrix_products() -> None:
    trace = trace_step(SMALL, CARD)
    assert set(trace.backends) == set(dispatch.OPERATIONS)
    assert all(trace.part(name).launches for name in step_trace.PARTS)
    tokens = 2 * SMALL.segment_tokens
    mlp = 2 * SMALL.layers * 3 * SMALL.hidden * SMALL.ffn * tokens
    attention = 2 * SMALL.layers * (2 * 4 + 2 * 2) * SMALL.head_dim * SMALL.hidden * tokens
    adapted = 2 * SMALL.layers * SMALL.hidden * 4 * SMALL.head_dim * (tokens - SMALL.window)  # in lowrank_linear
    products = sum(cost.flops for (part, name), cost in trace.costs.items() if (part, name) == ("base forward", "mm"))
    assert products == mlp + attention - adapted
    assert trace.part("base forward").floor_s > 0
    assert "the host waits 0 times" in step_trace.table(trace, "title")


def test_kernels_of_the_cuda_extension_are_those_that_were_profiled() -> None:
    rows = json.loads(PROFILE.read_text(encoding="utf-8"))["trainer"]["rows"]
    ours = sum(calls for _, calls, name in rows if "gakernels::" in name)
    assert ours == 32 * sum(CUDA_KERNELS.values())  # one call of each in every layer


@pytest.mark.slow
def test_launches_are_near_those_that_were_profiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The profiled step, whose rules ran two of the operations eagerly."""
    choose = dispatch._choose

    def as_profiled(operation: str, arguments: tuple[Any, ...]) -> dispatch.Choice:
        wanted = choose(operation, arguments)
        return wanted if operation == "low_rank_polar" else replace(wanted, backend="eager")

    def every_token(model: Any, preset: Preset) -> WindowObjective:
        batch = make_batch(preset, 0)
        return WindowObjective(lambda _: [batch], lambda batch: window_losses(model, batch))

    monkeypatch.setattr(dispatch, "_choose", as_profiled)
    monkeypatch.setattr(step_trace, "_pretraining", every_token)
    trace: Trace = trace_step(PRESETS["mistral-7b"], CARD)
    profiled = json.loads(PROFILE.read_text(encoding="utf-8"))["trainer"]["launches"]
    assert trace.total.launches == pytest.approx(profiled, rel=0.05)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "trace.json"
    assert step_trace.main(["--preset", "tiny", "--json", str(file)]) == 0
    found = json.loads(file.read_text(encoding="utf-8"))["tiny pretraining"]
    assert found["total"]["launches"] == sum(part["launches"] for part in found["parts"].values()) > 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_a_gpu_without_measurements_is_refused() -> None:
    with pytest.raises(InputError, match="gpu must be one with measurements"):
        Card.measured("NVIDIA A100")
