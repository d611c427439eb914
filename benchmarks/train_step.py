"""The training-step benchmark: one segment, forward, backward and optimizer, by several providers side by side.

    python -m benchmarks.train_step --preset cpu-mid --providers reference,auto,dense_lora,frozen_base \
        --threads 1 --json FILE

All providers compute the same loss on the same random base model. Correctness comes first: a provider that disagrees
with its oracle on a tiny float64 model has no time. The timed steps of the providers take turns, so that drift
of the machine affects all of them; ratios are taken within a turn. The warm-up and the profiled step are not timed.

`peak_bytes` is what the provider needs at once: the base model, its own parameters and optimizer state, and the
peak bytes of tensors that a step allocates on top, including gradients (on a CPU counted from every allocation of
PyTorch, on a GPU by its allocator).
"""

import argparse
import gc
import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from benchmarks.cases import NOTHING_HERE, UnavailableError, first_line
from benchmarks.measure import (
    HARDWARE,
    PartClock,
    Timing,
    dtype_name,
    is_out_of_memory,
    measure_ceilings,
    part,
    peak_bytes,
    percentile,
    resident_bytes,
    running,
    synchronize,
)
from benchmarks.presets import ESTIMATED, PRESETS, Preset, estimated_bytes, make_batch, make_model, step_flops
from benchmarks.rows import (
    FAILED,
    FLOOR,
    OK,
    OUT_OF_MEMORY,
    UNAVAILABLE,
    WRONG,
    ResultRow,
    RowWriter,
    environment,
    times,
)
from benchmarks.step_providers import (
    CLIP,
    FLOORS,
    LEARNING_RATE,
    PROVIDERS,
    TOLERANCE,
    Trainee,
    make_trainee,
    parts_marked,
    provider_error,
)
from gakernels import GenerativeAdapter
from gakernels.errors import BackendError
from gakernels.files import write_text
from gakernels.model.quantized_base import QUANTIZATIONS
from gakernels.model.window_losses import WindowBatch, to_device

STARTED = time.monotonic()  # start of the process, nearly
Ratios = dict[str, dict[str, float]]


@dataclass
class StepRunner:
    """A provider that trains one model: the timed steps and their cost."""

    trainee: Trainee
    model: GenerativeAdapter
    preset: Preset
    device: torch.device
    optimizer: torch.optim.Optimizer | None = None
    seconds: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    peak: int = 0

    def __post_init__(self) -> None:
        parameters = list(self.trainee.parameters.values())
        if self.trainee.trainer:
            self.optimizer = self.trainee.trainer.optimizer
        elif parameters:
            self.optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)

    def step(self, batch: WindowBatch) -> None:
        """Run forward, backward, clipping and optimizer."""
        loss = self._trainer_step(batch) if self.trainee.trainer else self._bare_step(batch)
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()}")

    def _bare_step(self, batch: WindowBatch) -> Tensor:
        with self.trainee.context():
            with part("base_forward"), self._autocast():
                loss = self.trainee.loss(batch)
            with part("backward"):
                loss.backward()
        with part("optimizer"):
            if self.optimizer:
                nn.utils.clip_grad_norm_(self.trainee.parameters.values(), CLIP)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
        return loss

    def _trainer_step(self, batch: WindowBatch) -> Tensor:
        """The trainer's own parts are not marked: everything outside the operations counts as `trainer`."""
        assert self.trainee.trainer
        with self.trainee.context(), part("trainer"):
            return self.trainee.trainer(batch)

    def timed_step(self, batch: WindowBatch) -> None:
        """Take one more sample."""
        clock = PartClock(self.device)
        synchronize(self.device)
        started = time.perf_counter()
        with running(clock):
            self.step(batch)
        synchronize(self.device)
        self.seconds.append(time.perf_counter() - started)
        self.parts.append(clock.seconds())

    def measure_peak(self, batch: WindowBatch) -> None:
        """Measure the memory of a step; the optimizer state exists from an earlier one."""
        transient = peak_bytes(lambda: self.step(batch), self.device)
        own: list[Tensor] = [*self.model.base.parameters(), *self.trainee.parameters.values()]
        if self.optimizer:
            states = (value for state in self.optimizer.state.values() for value in state.values())
            own += [value for value in states if isinstance(value, Tensor)]
        self.peak = transient + resident_bytes(own)

    def _autocast(self) -> torch.autocast:
        mixed = self.preset.dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(self.device.type, dtype=self.preset.dtype if mixed else None, enabled=mixed)


@dataclass
class Contender:
    """A provider in the run: one runner per measured number of layers, or the reason why it has no time."""

    name: str
    status: str = OK
    detail: str = ""
    error: float | None = None
    runners: list[StepRunner] = field(default_factory=list)

    def fail(self, error: Exception) -> None:
        """Drop the provider and free its memory."""
        if isinstance(error, BackendError | UnavailableError):
            self.status, self.detail = UNAVAILABLE, str(error)
        else:
            self.status = OUT_OF_MEMORY if is_out_of_memory(error) else FAILED
            self.detail = f"{type(error).__name__}: {first_line(error)}"
        self.runners.clear()

    @property
    def is_running(self) -> bool:
        return bool(self.runners)


@dataclass(frozen=True)
class StepSettings:
    """The settings from the command line."""

    preset: Preset
    providers: tuple[str, ...]
    device: torch.device
    steps: int = 5
    warmup: int = 1
    seed: int = 0
    deadline: float = math.inf  # on the clock of `time.monotonic`: after it no further turn begins, except the first


AfterTurn = Callable[[Sequence[Contender], int], None]  # also given the number of finished turns


def measure(settings: StepSettings, after_turn: AfterTurn = lambda contenders, turns: None) -> list[Contender]:
    """Check all providers, then let them take turns. An error in one of them does not stop the others."""
    contenders = [Contender(name) for name in settings.providers]
    for contender in contenders:
        with _guarded(contender):
            _check(contender, settings)
    with ExitStack() as stack:
        for layers in settings.preset.measured_layers or (settings.preset.layers,):
            preset = replace(settings.preset, layers=layers)
            model = make_model(preset, settings.device, settings.seed)
            stack.enter_context(parts_marked(model))
            for contender in contenders:
                if contender.status == OK:
                    with _guarded(contender):
                        trainee = make_trainee(contender.name, model, preset)
                        contender.runners.append(StepRunner(trainee, model, preset, settings.device))
        _take_turns(contenders, settings, after_turn)
    return contenders


def _check(contender: Contender, settings: StepSettings) -> None:
    _refuse_what_can_not_fit(contender.name, settings)
    contender.error = provider_error(contender.name, settings.preset, settings.device, settings.seed)
    if not contender.error <= TOLERANCE:
        contender.status = WRONG
        contender.detail = f"{contender.error:.2g} from the oracle in float64, {TOLERANCE:g} allowed"


def _refuse_what_can_not_fit(name: str, settings: StepSettings) -> None:
    """Checked before any of it exists. Raises: UnavailableError: the GPU has less free memory than a step takes."""
    if settings.device.type != "cuda" or settings.preset.measured_layers:
        return
    needed, free = estimated_bytes(name, settings.preset, settings.device), torch.cuda.mem_get_info(settings.device)[0]
    if needed is not None and needed > free:
        raise UnavailableError(f"a step takes about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")


def _take_turns(contenders: Sequence[Contender], settings: StepSettings, after_turn: AfterTurn) -> None:
    """Warm-up and memory first; then in each turn one step of every provider, starting with another one each time."""
    for contender in contenders:
        with _guarded(contender):
            for runner in contender.runners:
                for number in range(settings.warmup):
                    runner.step(device_batch(settings, number))
                runner.measure_peak(device_batch(settings, 0))
        _release(settings.device)
    for turn in range(settings.steps):
        batch = device_batch(settings, turn)
        shift = turn % len(contenders)
        for contender in (*contenders[shift:], *contenders[:shift]):
            with _guarded(contender):
                for runner in contender.runners:
                    runner.timed_step(batch)
        after_turn(contenders, turn + 1)
        _progress(f"turn {turn + 1} of {settings.steps}: {_turn_text(contenders)}")
        if time.monotonic() >= settings.deadline:
            break


@contextmanager
def _guarded(contender: Contender) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        contender.fail(error)
        _progress(f"{contender.name}: {contender.status}: {contender.detail}")


def device_batch(settings: StepSettings, number: int) -> WindowBatch:
    """A batch on the device, except the targets: the library's trainer reads them on the host without waiting."""
    batch = make_batch(settings.preset, settings.seed + number)
    return to_device(batch, settings.device)


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# Results


def extrapolate(values: Sequence[float], preset: Preset) -> float:
    """The value at all layers, linear in those at `measured_layers`; a single value applies to all."""
    if len(values) == 1:
        return values[0]
    first, second = preset.measured_layers
    return values[0] + (preset.layers - first) * (values[1] - values[0]) / (second - first)


def step_seconds(contender: Contender, preset: Preset) -> list[float]:
    """The samples of whole steps."""
    turns = zip(*(runner.seconds for runner in contender.runners), strict=True)
    return [extrapolate(values, preset) for values in turns]


def result_rows(
    name: str, settings: StepSettings, contenders: Sequence[Contender], gemm_flops: float
) -> list[ResultRow]:
    """A row for each contender; times only if the provider is correct and finished."""
    preset, where = settings.preset, environment(settings.device)
    shape = f"preset={name}" + (f" {preset.quantization}" if preset.quantization else "")
    paired = ratios(contenders, preset)
    rows = []
    for contender in contenders:
        names = ("train_step", contender.name, "step", shape, dtype_name(preset.dtype))
        row = ResultRow(*names, contender.status, where, contender.detail, error=contender.error)
        rows.append(_measured(row, contender, settings, gemm_flops, paired) if contender.is_running else row)
    return rows


def _measured(
    row: ResultRow, contender: Contender, settings: StepSettings, gemm_flops: float, paired: Ratios
) -> ResultRow:
    preset, samples = settings.preset, step_seconds(contender, settings.preset)
    median = statistics.median(samples)
    peak = int(extrapolate([runner.peak for runner in contender.runners], preset))
    pairs = {other: paired.get(f"{contender.name}/{other}") for other in ("reference", "dense_lora")}
    metrics = {
        "segment_tokens_per_s": preset.segment_tokens / median,
        "mfu": step_flops(preset) / median / gemm_flops,
        **{f"fits.{hardware.name}": float(peak <= hardware.memory_bytes) for hardware in HARDWARE},
        **{f"parts_s.{region}": seconds for region, seconds in _part_medians(contender, preset).items()},
        **{f"over_{other}": ratio["median"] for other, ratio in pairs.items() if ratio},
    }
    estimate = estimated_bytes(contender.name, preset, settings.device) if contender.name in ESTIMATED else None
    if estimate is not None and not preset.measured_layers:
        metrics["estimated_bytes"] = estimate
    layers = " and ".join(str(count) for count in preset.measured_layers)
    return replace(
        row,
        status=FLOOR if contender.name in FLOORS else OK,
        detail=f"extrapolated to {preset.layers} layers from runs with {layers}" if layers else "",
        peak_bytes=peak,
        metrics=metrics,
        **times(Timing(tuple(1e3 * sample for sample in samples), "")),
    )


def _part_medians(contender: Contender, preset: Preset) -> dict[str, float]:
    names = dict.fromkeys(name for runner in contender.runners for parts in runner.parts for name in parts)
    medians = {
        name: [statistics.median(parts.get(name, 0.0) for parts in runner.parts) for runner in contender.runners]
        for name in names
    }
    return {name: extrapolate(values, preset) for name, values in medians.items()}


def ratios(contenders: Sequence[Contender], preset: Preset) -> Ratios:
    """For each pair `a/b` of providers the time of a over that of b within a turn: median, p20 and p80."""
    samples = {contender.name: step_seconds(contender, preset) for contender in contenders if contender.is_running}
    result = {}
    for above, numerators in samples.items():
        for below, denominators in samples.items():
            if above != below:
                paired = [a / b for a, b in zip(numerators, denominators, strict=True)]
                result[f"{above}/{below}"] = {
                    "median": statistics.median(paired),
                    "p20": percentile(paired, 20),
                    "p80": percentile(paired, 80),
                }
    return result


def report(name: str, settings: StepSettings, contenders: Sequence[Contender], gemm_flops: float) -> dict[str, Any]:
    """What goes to the JSON file: the rows, and what they share."""
    preset = settings.preset
    return {
        "preset": name,
        "shape": {**asdict(preset), "dtype": dtype_name(preset.dtype)},
        "windows": 2 * preset.segments * preset.chunks,
        "segment_tokens": preset.segment_tokens,
        "seed": settings.seed,
        "gemm_flops": gemm_flops,
        "model_flops": step_flops(preset),
        "floor_s": {hardware.name: step_flops(preset) / hardware.bf16_flops for hardware in HARDWARE},
        "rows": [row.to_dict() for row in result_rows(name, settings, contenders, gemm_flops)],
        "ratios": ratios(contenders, preset),
    }


# Command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print one line, without the usage."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser() -> _Parser:
    parser = _Parser(prog="python -m benchmarks.train_step", description="Time training steps, provider by provider.")
    parser.add_argument("--preset", default="cpu-mid", help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("--providers", default="reference,auto,dense_lora,frozen_base", help=", ".join(PROVIDERS))
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="of the base model's linear layers")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--rows", type=Path, help="file that the results are added to as rows, too")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no further turn after so long")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one, if not given")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each provider")
    parser.add_argument("--warmup", type=int, default=1, help="steps in front of them")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def _settings(parser: _Parser, arguments: argparse.Namespace) -> StepSettings:
    """The settings; exits with status 2 and one line if an argument is bad."""
    if arguments.preset not in PRESETS:
        parser.error(f"--preset must be one of {', '.join(PRESETS)}, but it is {arguments.preset!r}")
    providers = tuple(dict.fromkeys(arguments.providers.split(",")))
    for name in providers:
        if name not in PROVIDERS:
            parser.error(f"--providers must be out of {', '.join(PROVIDERS)}, but has {name!r}")
    for option in ("threads", "steps", "warmup"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            parser.error(f"--{option} must be at least 1, but it is {value}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device here")
    for option in ("json", "rows"):
        file = getattr(arguments, option)
        if file and not file.parent.is_dir():
            parser.error(f"--{option}: the folder {file.parent} does not exist")
    if not arguments.seconds > 0:
        parser.error(f"--seconds must be above 0, but it is {arguments.seconds}")
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    preset = replace(PRESETS[arguments.preset], quantization=arguments.quantization)
    deadline = STARTED + arguments.seconds
    return StepSettings(preset, providers, device, arguments.steps, arguments.warmup, arguments.seed, deadline)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if every provider was measured, NOTHING_HERE if none can run on this machine, else 1.

    A bad argument exits with 2.
    """
    parser = _parser()
    parsed = parser.parse_args(arguments)
    settings = _settings(parser, parsed)
    if parsed.threads:
        torch.set_num_threads(parsed.threads)
    dtype = settings.preset.dtype
    gemm_flops = measure_ceilings(settings.device, [dtype]).gemm_flops[dtype_name(dtype)]

    def save(contenders: Sequence[Contender], turns: int) -> None:
        """Save after every turn, so that an interrupted run keeps what it measured."""
        if parsed.json:
            results = report(parsed.preset, settings, contenders, gemm_flops) | {"turns": turns}
            write_text(parsed.json, json.dumps(results, indent=2) + "\n")

    with _bounded_memory(settings.device):
        try:
            contenders = measure(settings, save)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            _progress(f"out of memory: the base model of {parsed.preset} does not fit on {settings.device}")
            return 1
    save(contenders, max((len(runner.seconds) for c in contenders for runner in c.runners), default=0))
    rows = result_rows(parsed.preset, settings, contenders, gemm_flops)
    if parsed.rows:
        writer = RowWriter(parsed.rows)
        for row in rows:
            writer.write(row)
    print(table(rows, ratios(contenders, settings.preset)))
    if all(contender.status == UNAVAILABLE for contender in contenders):
        return NOTHING_HERE
    return 0 if all(contender.is_running for contender in contenders) else 1


@contextmanager
def _bounded_memory(device: torch.device) -> Iterator[None]:
    """On a CPU, make an allocation beyond the free memory fail, instead of Linux killing the process."""
    available = _available_bytes() if device.type == "cpu" else None
    if available is None:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    limit = available if before[1] == resource.RLIM_INFINITY else min(available, before[1])
    resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _available_bytes() -> int | None:
    """All memory that this process can have: what it uses and what is free. None if Linux does not tell."""
    try:
        free = Path("/proc/meminfo").read_text(encoding="utf-8").split("MemAvailable:")[1].split()[0]
        own = Path("/proc/self/status").read_text(encoding="utf-8").split("VmData:")[1].split()[0]
    except (OSError, IndexError):
        return None
    return (int(free) + int(own)) * 1024


def table(rows: Sequence[ResultRow], paired: Ratios) -> str:
    """The rows as text, with the ratios to the first floor."""
    names, where = [row.provider for row in rows], rows[0].environment
    against = next((name for name in ("dense_lora", "reference", *names) if name in names), "")
    heads = f"{'step s':>8} {'p20':>8} {'p80':>8} {'tokens/s':>10} {'peak GB':>8} {'MFU':>6}"
    lines = [f"{rows[0].shape} on {where.device}, {where.threads} thread(s)", f"{'provider':<12} {heads}  x {against}"]
    for row in rows:
        if row.p50_ms is None or row.p20_ms is None or row.p80_ms is None or row.peak_bytes is None:
            lines.append(f"{row.provider:<12} {row.status}: {row.detail}")
            continue
        seconds = " ".join(f"{value / 1e3:8.3f}" for value in (row.p50_ms, row.p20_ms, row.p80_ms))
        numbers = f"{row.metrics['segment_tokens_per_s']:10.0f} {row.peak_bytes / 1e9:8.2f} {row.metrics['mfu']:6.1%}"
        ratio = paired.get(f"{row.provider}/{against}", {}).get("median", 1.0)
        lines.append(f"{row.provider:<12} {seconds} {numbers}  {ratio:.3f}")
        parts = [(name, value) for name, value in row.metrics.items() if name.startswith("parts_s.")]
        lines.append("    " + ", ".join(f"{name.removeprefix('parts_s.')} {value:.3f}" for name, value in parts))
    extrapolated = next((row.detail for row in rows if row.p50_ms is not None and row.detail), "")
    return "\n".join([*lines, extrapolated] if extrapolated else lines)


def _turn_text(contenders: Sequence[Contender]) -> str:
    return ", ".join(
        f"{contender.name} {sum(runner.seconds[-1] for runner in contender.runners):.2f} s"
        for contender in contenders
        if contender.is_running
    )


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
