"""Check the kernels on the GPU at hand and time them, for the record that `dispatch.choose` uses on it.

First every kernel is compared with the definitions in float64, values and gradients, at reduced sizes of the calls
that it would run; then the calls themselves are timed with every correct backend, until the time is up.
"""

import datetime
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from gakernels import ops
from gakernels.ops import dispatch
from gakernels.ops.gpus import Gpu
from gakernels.ops.low_rank_polar import DEFAULT_DAMPING
from gakernels.ops.measured import calibration
from gakernels.training.planned_calls import Call

MOST_CHECKED = {"batch": 2, "tokens": 160, "hidden": 2048, "state": 512, "in": 2048, "out": 2048}  # limits of a check
MOST_CHECKED |= {"numbers": 2**19}
LOOSE = 3.0  # a kernel's error may be that many times the error of plain PyTorch in the same dtype
MOST = {torch.bfloat16: 3e-2, torch.float16: 1e-2, torch.float32: 1e-3}  # and never more than this
REPETITIONS = 15


class Device(Protocol):
    """The device of a calibration."""

    device: torch.device

    def seconds(self) -> float:
        """A clock that measures the remaining time."""

    def milliseconds(self, run: Callable[[], object]) -> float:
        """The median time of a function; it has already run once."""


class GpuDevice:
    """The current GPU, timed by its own events."""

    device = torch.device("cuda")

    def seconds(self) -> float:
        """See `Device`."""
        torch.cuda.synchronize()
        return time.monotonic()

    def milliseconds(self, run: Callable[[], object]) -> float:
        """See `Device`; overwrites the L2 cache between runs."""
        evict = torch.empty(2**28, dtype=torch.uint8, device=self.device)
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPETITIONS)]
        for start, end in pairs:
            evict.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairs)


class CpuDevice:
    """A CPU, for a rehearsal with Triton's interpreter."""

    device = torch.device("cpu")

    def seconds(self) -> float:
        """See `Device`."""
        return time.monotonic()

    def milliseconds(self, run: Callable[[], object]) -> float:
        """See `Device`."""
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)


@dataclass
class Findings:
    """The findings of a calibration; `record` gives the stored form.

    Attributes:
        checks: what was wrong, by `operation.kernel`; empty if nothing. Kernels that were not reached are missing.
        unchecked: kernels that there was no time for.
        rows: measurements, in the form that `measured.measurements` reads.
        unmeasured: number of calls that there was no time for.
        gemm_flops, copy_bytes: rates of a large GEMM by dtype, and of a copy.
    """

    checks: dict[str, str] = field(default_factory=dict)
    unchecked: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    unmeasured: int = 0
    gemm_flops: dict[str, float] = field(default_factory=dict)
    copy_bytes: float = 0.0

    def record(self, gpu: Gpu) -> dict[str, Any]:
        """For `calibration.path_of`."""
        return {
            "kind": calibration.KIND,
            "gpu": gpu.name,
            "capability": list(gpu.capability),
            "versions": calibration.versions(),
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "checks": self.checks,
            "gemm_flops": self.gemm_flops,
            "copy_bytes": self.copy_bytes,
            "rows": self.rows,
        }


def calibrate(
    calls: Sequence[Call], target: Device, seconds: float, tell: Callable[[str], None] = lambda line: None
) -> Findings:
    """Check and time the kernels for some calls.

    Args:
        calls: what to check and time, most important first.
        target: the device.
        seconds: time limit; a kernel or call that has begun is finished.
        tell: receives lines about the progress.
    """
    end = target.seconds() + seconds
    findings = Findings()
    for operation, dtype, sizes in _checked_sizes(calls):
        _check(operation, dtype, sizes, target, end, findings, tell)
    _rates(calls, target, findings)
    for call in _different(calls):
        if target.seconds() >= end:
            findings.unmeasured += 1
            continue
        row = _measured(call, target, findings)
        if row is not None:
            findings.rows.append(row)
            tell(f"{call.operation} {_text(dict(call.sizes))}: {_text(row['milliseconds'])} ms")
    return findings


def _different(calls: Sequence[Call]) -> list[Call]:
    """One call of each operation, dtype and sizes; with a backward if one of them has it."""
    found: dict[tuple[Any, ...], Call] = {}
    for call in calls:
        found.setdefault((call.operation, call.dtype, call.sizes), call)
    return list(found.values())


def _checked_sizes(calls: Sequence[Call]) -> Iterator[tuple[str, torch.dtype, dict[str, int]]]:
    """For each operation and dtype the sizes of its smallest and largest call, reduced."""
    groups: dict[tuple[str, torch.dtype], dict[tuple[tuple[str, int], ...], None]] = {}
    for call in calls:
        cut = tuple((name, min(size, MOST_CHECKED.get(name, size))) for name, size in call.sizes)
        groups.setdefault((call.operation, call.dtype), {})[cut] = None
    for (operation, dtype), sizes in groups.items():
        ordered = sorted(sizes, key=lambda cut: math.prod(size for _, size in cut))
        for cut in dict.fromkeys((ordered[-1], ordered[0])):
            yield operation, dtype, dict(cut)


def _check(
    operation: str,
    dtype: torch.dtype,
    sizes: dict[str, int],
    target: Device,
    end: float,
    findings: Findings,
    tell: Callable[[str], None],
) -> None:
    """Compare every kernel that can run a call with the definition."""
    arguments = _draw(operation, dtype, sizes, target.device)
    kernels = [name for name in dispatch.KERNELS if dispatch.why_not(operation, name, *arguments) is None]
    exact = plain = None
    for kernel in kernels:
        name = f"{operation}.{kernel}"
        if target.seconds() >= end:
            findings.unchecked.append(name)
            findings.checks.pop(name, None)  # correct so far is not correct
            continue
        if findings.checks.get(name) or name in findings.unchecked:
            continue
        if exact is None or plain is None:
            exact = _results(operation, "reference", [_wide(one) for one in arguments])
            plain = _results(operation, "eager", arguments)
        findings.checks[name] = _fault(operation, kernel, arguments, exact, plain)
        tell(f"{name} {_text(sizes)}: {findings.checks[name] or 'right'}")


def _fault(
    operation: str, kernel: str, arguments: Sequence[Any], exact: Sequence[Tensor], plain: Sequence[Tensor]
) -> str:
    """What is wrong with a kernel's values and gradients; empty if nothing is."""
    try:
        results = _results(operation, kernel, arguments)
    except Exception as error:  # whatever the compiler or the driver raises
        return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0][:200]}"
    for number, (result, wanted, usual) in enumerate(zip(results, exact, plain, strict=True)):
        allowed = min(LOOSE * _distance(usual, wanted) + 4 * torch.finfo(result.dtype).eps, MOST[arguments[0].dtype])
        found = _distance(result, wanted)
        if not found <= allowed:
            what = "value" if number == 0 else f"gradient {number}"
            return f"its {what} is {found:.2g} from the definition, {allowed:.2g} allowed"
    return ""


def _distance(value: Tensor, target: Tensor) -> float:
    """||value - target|| / ||target||."""
    return float((value.double() - target).norm() / target.norm().clamp(min=1e-30))


def _wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


LEAVES = {"context_state": (0, 1, 2), "low_rank_polar": (0,), "lowrank_linear": (0, 2, 3), "gated_product": (0, 1)}


def _results(operation: str, backend: str, arguments: Sequence[Any]) -> list[Tensor]:
    """The value of an operation, and its gradients under a fixed upstream gradient."""
    changed = list(arguments)
    for place in LEAVES[operation]:
        changed[place] = arguments[place].detach().requires_grad_()
    with dispatch.forced(backend):
        value = _value(operation, changed)
    upstream = torch.randn(value.shape, generator=Generator().manual_seed(1)).to(value)
    gradients = torch.autograd.grad(value, [changed[place] for place in LEAVES[operation]], upstream)
    return [value.detach(), *gradients]


def _value(operation: str, arguments: Sequence[Any]) -> Tensor:
    first, *others = _output(operation, arguments)
    return first @ others[0].mT if others else first  # of u and v only the product is defined


def _draw(operation: str, dtype: torch.dtype, sizes: dict[str, int], device: torch.device) -> list[Any]:
    """Random arguments of a call."""
    generator = Generator().manual_seed(0)

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        block = torch.randn(shape[-2:], generator=generator) * std  # one matrix, repeated: quick to draw
        return block.to(device, dtype).expand(shape).contiguous()

    if operation == "context_state":
        hidden, state = sizes["hidden"], sizes["state"]
        maps = draw(state, hidden, std=hidden**-0.5), draw(hidden, state, std=hidden**-0.5)
        return [draw(1, sizes["batch"], sizes["tokens"], hidden), *maps]
    if operation == "low_rank_polar":
        state = sizes["state"]
        sketch = draw(state, sizes["rank"])
        return [draw(sizes["batch"], state, state), sketch, sizes["power_iterations"], DEFAULT_DAMPING]
    if operation == "gated_product":
        numbers, block = sizes["numbers"], 2**16
        return [draw(numbers // block + 1, 1, block).flatten()[:numbers] for _ in range(2)]
    windows, inputs, outputs, rank = (sizes[name] for name in ("batch", "in", "out", "rank"))
    x, weight = draw(windows, sizes["tokens"], inputs), draw(outputs, inputs, std=inputs**-0.5)
    return [x, weight, draw(windows, rank, inputs, std=inputs**-0.5), draw(windows, outputs, rank, std=rank**-0.5), 0.5]


def _measured(call: Call, target: Device, findings: Findings) -> dict[str, Any] | None:
    """A row of measurements of a call; None if there is nothing to compare or not enough memory."""
    milliseconds: dict[str, list[float]] = {}
    try:
        arguments = _draw(call.operation, call.dtype, dict(call.sizes), target.device)
        for backend in ("eager", *dispatch.KERNELS):
            is_right = backend == "eager" or findings.checks.get(f"{call.operation}.{backend}") == ""
            if is_right and dispatch.why_not(call.operation, backend, *arguments) is None:
                milliseconds[backend] = _times(call, backend, arguments, target)
    except torch.OutOfMemoryError:
        return None
    if len(milliseconds) < 2:
        return None
    name = str(call.dtype).removeprefix("torch.")
    return {"operation": call.operation, "dtype": name, "sizes": dict(call.sizes), "milliseconds": milliseconds}


def _times(call: Call, backend: str, arguments: Sequence[Any], target: Device) -> list[float]:
    """Milliseconds of forward and backward."""

    def forward() -> object:
        with torch.no_grad(), dispatch.forced(backend):
            return _output(call.operation, arguments)

    forward()
    times = [target.milliseconds(forward)]
    leaves = list(arguments)
    for place in LEAVES[call.operation]:
        leaves[place] = arguments[place].detach().requires_grad_()
    with dispatch.forced(backend):
        outputs = _output(call.operation, leaves)
    upstream, wanted = [torch.ones_like(one) for one in outputs], [leaves[place] for place in LEAVES[call.operation]]

    def backward() -> object:
        return torch.autograd.grad(outputs, wanted, upstream, retain_graph=True)

    backward()
    return [*times, target.milliseconds(backward)]


def _output(operation: str, arguments: Sequence[Any]) -> tuple[Tensor, ...]:
    found: Any = getattr(ops, operation)(*arguments)
    return found if isinstance(found, tuple) else (found,)


def _rates(calls: Sequence[Call], target: Device, findings: Findings) -> None:
    """Rates of a large GEMM for each dtype, and of a copy."""
    size, numbers = (4096, 2**27) if target.device.type == "cuda" else (256, 2**16)
    for dtype in dict.fromkeys(call.dtype for call in calls):
        matrix = torch.ones(size, size, dtype=dtype, device=target.device)
        _ = matrix @ matrix
        milliseconds = target.milliseconds(lambda matrix=matrix: matrix @ matrix)  # type: ignore[misc]
        findings.gemm_flops[str(dtype).removeprefix("torch.")] = 2e3 * size**3 / milliseconds
    source, destination = (torch.zeros(numbers, device=target.device) for _ in range(2))
    destination.copy_(source)
    findings.copy_bytes = 8e3 * numbers / target.milliseconds(lambda: destination.copy_(source))


def _text(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_number(value)}" for name, value in values.items())


def _number(value: Any) -> str:
    return "/".join(f"{time:.3g}" for time in value) if isinstance(value, list) else f"{value}"
