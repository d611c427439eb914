"""One training step without a GPU: where the host would wait, what is launched, what it moves and computes, by part.

    python -m benchmarks.step_trace --preset mistral-7b --json FILE

The library's own trainer runs on tensors without data (`benchmarks.fake_gpu`), from batches on the host as a real run
has them, with the backends that the rules choose on the GPU once every kernel was checked there. What is known of a
call is its operators and their shapes:

- Host waits: reading a value or a shape from the device, and copies between it and memory that is not pinned.
- Launches: one kernel for each operator that is not a view or an allocation, and what KERNELS says of some. The
  operators of the library count what their implementation launches; CUDA_KERNELS says it for those in CUDA C++. Not
  counted, as in the profile of a real step: copies of whole tensors by the copy engine.
- Bytes: every input read once and every output written once, an operator of the library as a whole.
- Floor: for each operator the time of its bytes or that of its matrix products, whichever is longer, at the rates that
  were measured on the GPU.
"""

import argparse
import bisect
import collections
import json
import math
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.fake_gpu import FakeGpu, fake_gpu
from benchmarks.presets import PRESETS, Preset, make_base
from benchmarks.step_profile import place
from gakernels import GenerativeAdapter
from gakernels.data.chat import EncodedConversation
from gakernels.distributed import Parallel
from gakernels.errors import InputError
from gakernels.files import write_text
from gakernels.model import window_losses as pretraining
from gakernels.model.context_pass import ContextPass
from gakernels.nn import AdapterGenerator, adapted_linear, adapted_opaque_linear, adapter_generator, gated_mlp
from gakernels.ops import dispatch, gpus, launching, measured
from gakernels.ops.low_rank_polar import extension
from gakernels.ops.low_rank_polar import triton as polar_triton
from gakernels.ops.low_rank_polar.eager import Steps
from gakernels.training.instruction import answers
from gakernels.training.instruction.batches import InstructionBatch, instruction_batch
from gakernels.training.objective import WindowObjective
from gakernels.training.step import TrainingStep
from gakernels.training.trainer_config import TrainerConfig

OPTIMIZER, LOSS, GENERATORS, BASE, OTHER = "optimizer", "token loss", "generators", "base", "other"
PARTS = (f"{BASE} forward", f"{BASE} backward", GENERATORS, *dispatch.OPERATIONS, LOSS, OPTIMIZER, OTHER)
# Kernels of an operator of PyTorch other than one; those of attention by cuDNN with grouped heads, as profiled.
KERNELS = {
    **dict.fromkeys(("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"), 0),
    **dict.fromkeys(("detach", "alias", "lift_fresh", "view", "_reshape_alias", "is_pinned"), 0),
    **dict.fromkeys(("select_backward", "slice_backward"), 2),
    "_scaled_dot_product_cudnn_attention_backward": 5,
}
# Kernels of an operation in CUDA C++ (csrc/polar.h), for fewer states than its wide products take.
CUDA_KERNELS = {"low_rank_polar": 18, "low_rank_polar_backward": 32}
WIDTH = 80
COPIES = ("clone", "copy_", "_to_copy")
CHUNK, CHUNKS_AT_ONCE, TENSORS_AT_ONCE = 65536, 320, 30  # of a kernel over lists of tensors


@dataclass(frozen=True)
class Card:
    """The rates of a GPU, measured: operations a second by dtype, bytes a second."""

    name: str
    gemm_flops: dict[str, float]
    copy_bytes: float

    @classmethod
    def measured(cls, name: str) -> "Card":
        """That of a GPU with committed measurements.

        Raises:
            InputError: there are none.
        """
        path = measured.FOLDER / f"{gpus.slug(name)}.json"
        if not path.is_file():
            there = ", ".join(sorted(one.stem for one in measured.FOLDER.glob("*.json")))
            raise InputError(f"gpu must be one with measurements ({there}), but it is {name!r}")
        found = json.loads(path.read_text(encoding="utf-8"))
        return cls(found["gpu"], found["gemm_flops"], found["copy_bytes"])

    def seconds(self, moved: float, flops: float, dtype: torch.dtype) -> float:
        """The least time of an operator."""
        rate = self.gemm_flops.get(str(dtype).removeprefix("torch."), min(self.gemm_flops.values()))
        return max(moved / self.copy_bytes, flops / rate)


@dataclass
class Cost:
    """What a part of a step costs.

    Attributes:
        operators: calls of PyTorch's and the library's operators that are not views or allocations.
        launches: kernels.
        bytes: read and written.
        flops: of matrix products.
        floor_s: see the module.
    """

    operators: int = 0
    launches: int = 0
    bytes: float = 0
    flops: float = 0
    floor_s: float = 0

    def add(self, other: "Cost") -> None:
        """Add another part."""
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))


def sum_of(costs: Iterable[Cost]) -> Cost:
    """Several parts together."""
    total = Cost()
    for cost in costs:
        total.add(cost)
    return total


@dataclass
class Trace:
    """What a step was seen to do: costs by part and operator, host waits by reason and place, and the backends."""

    costs: dict[tuple[str, str], Cost] = field(default_factory=lambda: collections.defaultdict(Cost))
    waits: collections.Counter[str] = field(default_factory=collections.Counter)
    backends: dict[str, str] = field(default_factory=dict)

    def part(self, name: str) -> Cost:
        """All operators of a part."""
        return sum_of(cost for (part, _), cost in self.costs.items() if part == name)

    @property
    def total(self) -> Cost:
        """All parts."""
        return sum_of(self.costs.values())

    def to_dict(self) -> dict[str, Any]:
        """In JSON types."""
        operators = [{"part": part, "operator": name, **asdict(cost)} for (part, name), cost in self.costs.items()]
        return {
            "total": asdict(self.total),
            "parts": {name: asdict(self.part(name)) for name in PARTS},
            "waits": dict(self.waits),
            "backends": self.backends,
            "operators": sorted(operators, key=lambda one: -one["floor_s"]),
        }


class _Recorder:
    """Watches the device and adds up what it sees, by the part of the step that a call belongs to.

    In the backward that is the part in which the forward made the present node of the graph: nodes have numbers, in
    order, and the number at which each part began is known.
    """

    def __init__(self, card: Card) -> None:
        self.trace, self.is_on, self._card = Trace(), True, card
        self._now, self._last = [OTHER], OTHER
        self._begins: list[tuple[int, str]] = [(0, OTHER)]

    def part(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose calls are that part of the step."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._now.append(name)
            self._begins.append((torch._C._autograd._get_sequence_nr(), name))
            try:
                return function(*args, **kwargs)
            finally:
                self._now.pop()
                self._begins.append((torch._C._autograd._get_sequence_nr(), self._now[-1]))

        return run

    def _part(self, gpu: FakeGpu) -> str:
        if not gpu.in_engine:
            return self._now[-1] if self._now[-1] != BASE else f"{BASE} forward"
        node = torch._C._current_autograd_node()
        if node is not None:  # else gradients of several uses are added: they belong to the node before
            place = bisect.bisect_right(self._begins, node._sequence_nr(), key=lambda begin: begin[0]) - 1
            self._last = self._begins[place][1]
        return self._last if self._last != BASE else f"{BASE} backward"

    def waits(self, reason: str) -> None:
        """See `Watcher`."""
        if self.is_on:
            self.trace.waits[f"{reason}: {place('step_profile', 'step_trace', 'fake_gpu', 'cpu_attention')}"] += 1

    def called(self, gpu: FakeGpu, operator: Any, arguments: tuple[Any, ...], options: Any, result: Any) -> None:
        """See `Watcher`."""
        if not self.is_on:
            return
        part, name = self._part(gpu), operator.overloadpacket.__name__
        if operator.namespace == "gakernels":
            self._library_called(gpu, part, name, arguments, result)
            return
        launches = _launches(operator, arguments, result)
        if launches or _is_copied(operator, arguments, result):
            moved, flops = _bytes((arguments, options), result), _flops(operator, arguments, options, result)
            self.trace.costs[part, name].add(self._cost(launches, moved, flops, arguments))

    def _library_called(self, gpu: FakeGpu, part: str, name: str, arguments: tuple[Any, ...], result: Any) -> None:
        """An operator of the library: matrix products by the plain algorithm, launches by its implementation."""
        *given, backend = arguments
        self.trace.backends[name.removesuffix("_backward")] = backend
        plain, _ = self._inside(gpu, name, given, "eager")
        if backend == "eager":
            for (_, inner), cost in plain.costs.items():
                self.trace.costs[part, inner].add(cost)
            return
        launches = CUDA_KERNELS[name] if backend == "cuda" else self._inside(gpu, name, given, backend)[1]
        cost = self._cost(launches, _bytes(given, result), plain.total.flops, arguments)
        self.trace.costs[part, f"{name} ({backend})"].add(cost)

    def _cost(self, launches: int, moved: float, flops: float, arguments: tuple[Any, ...]) -> Cost:
        """Matrix products are computed in the narrowest dtype among the arguments."""
        dtypes = [
            leaf.dtype for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]
        dtype = min(dtypes, key=lambda one: one.itemsize, default=torch.float32)
        return Cost(1, launches, moved, flops, self._card.seconds(moved, flops, dtype))

    def _inside(self, gpu: FakeGpu, name: str, given: Sequence[Any], backend: str) -> tuple[Trace, int]:
        """What an implementation of an operator of the library does, and the kernels that it launches."""
        operation, inner, kernels = name.removesuffix("_backward"), _Recorder(self._card), 0
        run = getattr(dispatch.module(operation, backend), "forward" if name == operation else "backward")
        given = [Steps(*one) if isinstance(one, list) and isinstance(one[0], Tensor) else one for one in given]

        def launch(*_: Any) -> None:
            nonlocal kernels
            kernels += 1

        before = launching.exchange_launcher(launch)
        try:
            with torch.no_grad(), gpu.watched_by(inner):
                run(*given)
        finally:
            launching.exchange_launcher(before)
        return inner.trace, kernels + inner.trace.total.launches


def _launches(operator: Any, arguments: tuple[Any, ...], result: Any) -> int:
    """The kernels of an operator of PyTorch."""
    name = operator.overloadpacket.__name__
    if operator.is_view or name in KERNELS:
        return KERNELS.get(name, 0)
    if name in COPIES:
        return int(result.dtype != _source(name, arguments).dtype or not _has_same_layout(name, arguments, result))
    if name.startswith("_foreach") or name == "_fused_adamw_":
        tensors = arguments[0]
        chunks = sum(math.ceil(tensor.numel() / CHUNK) for tensor in tensors)
        return max(math.ceil(len(tensors) / TENSORS_AT_ONCE), math.ceil(chunks / CHUNKS_AT_ONCE))
    return 1


def _is_copied(operator: Any, arguments: tuple[Any, ...], result: Any) -> bool:
    """Whether the copy engine copies a tensor."""
    name = operator.overloadpacket.__name__
    return name in ("clone", "copy_") and not operator.is_view


def _source(name: str, arguments: tuple[Any, ...]) -> Tensor:
    source: Tensor = arguments[1] if name == "copy_" else arguments[0]
    return source


def _has_same_layout(name: str, arguments: tuple[Any, ...], result: Any) -> bool:
    source = _source(name, arguments)
    same = source.shape == result.shape and source.stride() == result.stride()
    return same or (source.is_contiguous() and result.is_contiguous())


def _bytes(arguments: Any, result: Any) -> float:
    """Every tensor that goes in or comes out, once; what is repeated by a stride of zero is there once."""
    tensors = {id(leaf): leaf for leaf in tree_leaves((arguments, result)) if isinstance(leaf, Tensor)}
    return float(sum(_numbers(tensor) * tensor.element_size() for tensor in tensors.values()))


def _numbers(tensor: Tensor) -> int:
    return math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size)


def _flops(operator: Any, arguments: tuple[Any, ...], options: Any, result: Any) -> float:
    """The operations of a matrix product or of attention, of which a causal one has half."""
    count = flop_registry.get(operator.overloadpacket)
    if count is None:
        return 0.0
    whole = float(count(*arguments, **options, out_val=result))
    is_causal = "attention" in operator.overloadpacket.__name__ and any(one is True for one in arguments[4:])
    return whole / 2 if is_causal else whole


# The step


def trace_step(preset: Preset, card: Card, tuning: bool = False) -> Trace:
    """What the second step of a run would do on a GPU, the first with all that a run makes once.

    Args:
        preset: of the model and the step.
        card: the GPU.
        tuning: a step of instruction tuning instead of pretraining: each context has two conversations.

    Raises:
        BackendError: see `fake_gpu`.
    """
    recorder = _Recorder(card)
    recorder.is_on = False
    with ExitStack() as stack:
        stack.enter_context(fake_gpu(recorder, gpus.known(card.name)))
        stack.enter_context(_cuda_kernels())
        stack.enter_context(patch.object(dispatch, "_untrusted", lambda *_: None))
        stack.callback(polar_triton._poles.cache_clear)  # it keeps tensors of the device
        # The weights are tensors of another class, but not packed ones.
        stack.enter_context(patch.object(adapted_opaque_linear, "is_plain_linear", lambda one: type(one) is nn.Linear))
        model = GenerativeAdapter(make_base(preset, torch.device("cuda"), 0), preset.generator_config())
        for owner, name, part in _parts(model):
            stack.enter_context(patch.object(owner, name, recorder.part(part, getattr(owner, name))))
        objective = _tuning(model, preset) if tuning else _pretraining(model, preset)
        precision = "bfloat16" if preset.dtype == torch.bfloat16 else "float32"
        config = TrainerConfig(2, schedule="constant", warmup_steps=0, precision=precision)
        step = TrainingStep(config, dict(model.generators.named_parameters()), objective, Parallel())
        step(0)
        recorder.is_on = True
        step(1)
        recorder.is_on = False
    return recorder.trace


def _pretraining(model: GenerativeAdapter, preset: Preset) -> WindowObjective:
    segments = torch.zeros(preset.segments, preset.chunks * preset.window, dtype=torch.int64)
    batch = pretraining.pretraining_windows(segments, preset.chunks, torch.Generator().manual_seed(0))
    return WindowObjective(lambda _: [batch], lambda batch: pretraining.window_losses(model, batch))


def _tuning(model: GenerativeAdapter, preset: Preset) -> answers.InstructionObjective:
    said = EncodedConversation(
        np.zeros(preset.window // 2, np.int32), np.arange(preset.window // 2) > preset.window // 4
    )
    context = [0] * (preset.chunks * preset.window)
    count = preset.segments
    batch = instruction_batch([context] * count, [[said] * 2] * count, preset.window, preset.window)
    steps: Any = _OneBatch(batch)
    return answers.InstructionObjective(model, steps)


@dataclass(frozen=True)
class _OneBatch:
    """Steps of the same micro-batch."""

    batch: InstructionBatch

    def batches(self, step: int) -> list[InstructionBatch]:
        """Those of a step."""
        return [self.batch]


def _parts(model: GenerativeAdapter) -> Iterator[tuple[Any, str, str]]:
    """What belongs to which part of a step: an object, its function, and the part."""
    yield model.decoder, "forward", BASE
    yield AdapterGenerator, "states", GENERATORS
    yield AdapterGenerator, "factors", GENERATORS
    yield ContextPass, "factors", GENERATORS
    yield adapter_generator, "context_state", "context_state"
    yield adapter_generator, "low_rank_polar", "low_rank_polar"
    yield adapted_linear, "lowrank_linear", "lowrank_linear"
    yield gated_mlp, "gated_product", "gated_product"
    yield pretraining, "token_losses", LOSS
    yield answers, "token_losses", LOSS
    yield TrainingStep, "_update", OPTIMIZER


@contextmanager
def _cuda_kernels() -> Iterator[None]:
    """Have the rules take the CUDA extension for built, as it is on a machine with that GPU."""
    operation, name = ("low_rank_polar", "cuda"), "gakernels.ops.low_rank_polar.cuda"
    load, before = dispatch._load, sys.modules.get(name)
    stand_in: Any = ModuleType(name)
    stand_in.unsupported = lambda states, sketch, *_: extension.unsupported(states, sketch)
    sys.modules[name] = stand_in
    try:
        with patch.object(dispatch, "_load", lambda *call: stand_in if call == operation else load(*call)):
            yield
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before


def table(trace: Trace, title: str) -> str:
    """The trace as text."""
    rows = [*((name, trace.part(name)) for name in PARTS), ("all", trace.total)]
    lines = [title, f"{'part':<16} {'operators':>9} {'launches':>9} {'GB':>8} {'TFLOP':>8} {'floor ms':>9}"]
    for name, cost in rows:
        numbers = f"{cost.operators:9,} {cost.launches:9,} {cost.bytes / 1e9:8.2f} {cost.flops / 1e12:8.2f}"
        lines.append(f"{name:<16} {numbers} {cost.floor_s * 1e3:9.2f}")
    backends = ", ".join(f"{operation}: {backend}" for operation, backend in sorted(trace.backends.items()))
    lines += textwrap.wrap(backends, WIDTH)
    lines.append(f"the host waits {sum(trace.waits.values())} times")
    return "\n".join([*lines, *(f"{count:6d}  {where}" for where, count in trace.waits.most_common())])


def main(arguments: list[str] | None = None) -> int:
    """The command. The trace is added to the file, under `<preset> <kind of step>`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_trace", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--preset", default="mistral-7b", choices=PRESETS)
    parser.add_argument("--gpu", default="NVIDIA H200", help="one with committed measurements")
    parser.add_argument("--tuning", action="store_true", help="a step of instruction tuning")
    parser.add_argument("--json", type=Path, help="file of the traces")
    options = parser.parse_args(arguments)
    kind = "tuning" if options.tuning else "pretraining"
    card = Card.measured(options.gpu)
    trace = trace_step(PRESETS[options.preset], card, options.tuning)
    print(table(trace, f"{options.preset}, {kind}, as on {card.name}"))
    if options.json:
        traces = json.loads(options.json.read_text(encoding="utf-8")) if options.json.is_file() else {}
        traces[f"{options.preset} {kind}"] = {"gpu": card.name, "torch": torch.__version__, **trace.to_dict()}
        write_text(options.json, json.dumps(traces, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
