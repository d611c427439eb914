"""The dispatch rule, and what all operations share: opcheck, compile, autocast, checkpoint, func, meta, repetition."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

import pytest
import torch
from oracles import draw, gradients, relative, well_conditioned
from torch import Generator, Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from gakernels import AdapterGenerator, BackendError, context_state, delta_state, low_rank_polar, lowrank_linear
from gakernels.ops import gated_product
from gakernels.ops.dispatch import choose


@dataclass(frozen=True)
class Call:
    """An operation as a function of its differentiable inputs to one tensor, and the operator call underneath."""

    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    operator: Callable[..., object]
    operator_arguments: tuple[object, ...]


def context_state_call(generator: Generator, dtype: torch.dtype, variant: int) -> Call:
    hidden = draw(generator, 2, 3, 4, 5, dtype=dtype)
    a2, b1 = draw(generator, 6, 5, dtype=dtype), draw(generator, 5, 6, dtype=dtype)
    mask = torch.rand(2, 3, 4, generator=generator) < 0.5 if variant else None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = (hidden, a2, b1) if variant < 2 else (hidden, a2, b1, draw(generator, 2, 6, 6, dtype=wide))

    def function(hidden: Tensor, a2: Tensor, b1: Tensor, initial: Tensor | None = None) -> Tensor:
        return context_state(hidden, a2, b1, mask, initial)

    arguments = (*inputs[:3], mask, inputs[3] if variant == 2 else None)
    return Call(function, inputs, torch.ops.gakernels.context_state.default, (*arguments, "eager"))


def delta_state_call(generator: Generator, dtype: torch.dtype, variant: int) -> Call:
    plain = context_state_call(generator, dtype, variant)
    hidden, a2, b1, mask, initial, _ = plain.operator_arguments
    strength = torch.rand(2, 3, 4, generator=generator, dtype=torch.float64)
    strength = strength.to(torch.float64 if dtype == torch.float64 else torch.float32)

    def function(hidden: Tensor, a2: Tensor, b1: Tensor, strength: Tensor, initial: Tensor | None = None) -> Tensor:
        return delta_state(hidden, a2, b1, strength, mask, initial)

    arguments = (hidden, a2, b1, strength, mask, initial)
    inputs = (*plain.inputs[:3], strength, *plain.inputs[3:])
    return Call(function, inputs, torch.ops.gakernels.delta_state.default, (*arguments, "eager"))


def low_rank_polar_call(generator: Generator, dtype: torch.dtype, variant: int) -> Call:
    shape, power_iterations, damping = (((), 1, 1e-3), ((3,), 0, 0.0), ((2, 2), 2, 1e-2))[variant]
    states, sketch = (well_conditioned(generator, *size, dtype=dtype) for size in ((*shape, 9, 9), (9, 4)))

    def function(states: Tensor) -> Tensor:
        u, v = low_rank_polar(states, sketch, power_iterations, damping)
        # The basis differs from backend to backend. No matrix product, which autocast would cast.
        return (u[..., :, None, :] * v[..., None, :, :]).sum(-1)

    arguments = (states, sketch, power_iterations, damping)
    return Call(function, (states,), torch.ops.gakernels.low_rank_polar.default, (*arguments, "eager"))


def lowrank_linear_call(generator: Generator, dtype: torch.dtype, variant: int) -> Call:
    index = (None, torch.tensor([1, -1, 1]), torch.tensor([0, 2, 1]))[variant]
    bias = draw(generator, 7, dtype=dtype) if variant == 2 else None
    weight = draw(generator, 7, 5, dtype=dtype)
    inputs = tuple(draw(generator, *shape, dtype=dtype) for shape in ((3, 4, 5), (3, 2, 5), (3, 7, 2)))

    def function(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        frozen = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        return lowrank_linear(x, frozen[0], lora_a, lora_b, 0.5, index, frozen[1])

    arguments = (inputs[0], weight, *inputs[1:], 0.5, index, bias)
    return Call(function, inputs, torch.ops.gakernels.lowrank_linear.default, (*arguments, "eager"))


def gated_product_call(generator: Generator, dtype: torch.dtype, variant: int) -> Call:
    shape = ((5,), (3, 4), (2, 3, 5))[variant]
    inputs = draw(generator, *shape, dtype=dtype), draw(generator, *shape, dtype=dtype)
    return Call(gated_product, inputs, torch.ops.gakernels.gated_product.default, (*inputs, "eager"))


OPERATIONS = [context_state_call, delta_state_call, low_rank_polar_call, lowrank_linear_call, gated_product_call]
every_operation = pytest.mark.parametrize("make", OPERATIONS, ids=lambda make: make.__name__.removesuffix("_call"))
every_variant = pytest.mark.parametrize("variant", [0, 1, 2])


def upstream_of(call: Call, generator: Generator) -> Tensor:
    output = call.function(*call.inputs)
    return draw(generator, *output.shape, dtype=output.dtype)


def assert_same(ours: tuple[Tensor, ...], wanted: tuple[Tensor, ...], tolerance: float = 0.0) -> None:
    assert len(ours) == len(wanted)
    for mine, theirs in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


# --- the dispatch rule ------------------------------------------------------------------------------------------------


@every_operation
@every_variant
def test_the_reference_backend_gives_the_same_numbers(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, make: Callable[..., Call], variant: int
) -> None:
    call = make(generator, torch.float64, variant)
    upstream = upstream_of(call, generator)
    monkeypatch.setenv("GAKERNELS_BACKEND", "eager")
    ours = (call.function(*call.inputs), *gradients(call.function, upstream, *call.inputs))
    monkeypatch.setenv("GAKERNELS_BACKEND", "reference")
    wanted = (call.function(*call.inputs), *gradients(call.function, upstream, *call.inputs))
    assert_same(ours, wanted, 1e-8)


@every_operation
def test_the_reference_backend_is_really_another_one(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, make: Callable[..., Call]
) -> None:
    call = make(generator, torch.float64, 0)

    def operators_used() -> set[str]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            call.function(*call.inputs)
        return {event.key for event in profile.key_averages() if event.key.startswith("gakernels::")}

    assert operators_used()
    monkeypatch.setenv("GAKERNELS_BACKEND", "reference")
    assert not operators_used()


@every_operation
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_backend_that_is_not_there_is_an_error(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, make: Callable[..., Call], backend: str
) -> None:
    call = make(generator, torch.float64, 0)
    monkeypatch.setenv("GAKERNELS_BACKEND", backend)
    name = make.__name__.removesuffix("_call")
    with pytest.raises(BackendError, match=f"GAKERNELS_BACKEND={backend}.*{name}"):
        call.function(*call.inputs)


@every_operation
def test_a_backend_of_no_such_name_is_an_error(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, make: Callable[..., Call]
) -> None:
    call = make(generator, torch.float64, 0)
    monkeypatch.setenv("GAKERNELS_BACKEND", "nonsense")
    with pytest.raises(BackendError, match="must be one of reference, eager, triton, cuda, but it is 'nonsense'"):
        call.function(*call.inputs)


def test_the_choice_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = torch.eye(4), torch.eye(4)[:, :2]
    monkeypatch.delenv("GAKERNELS_BACKEND", raising=False)
    choice = choose("low_rank_polar", *arguments)
    assert choice.backend == "eager"
    assert "cpu" in choice.reason
    monkeypatch.setenv("GAKERNELS_BACKEND", "reference")
    choice = choose("low_rank_polar", *arguments)
    assert choice.backend == "reference"
    assert "GAKERNELS_BACKEND" in choice.reason


# --- what every operation works under ---------------------------------------------------------------------------------


@every_operation
@every_variant
@pytest.mark.parametrize(("needs_gradient", "strided"), [(False, False), (True, False), (True, True)])
def test_opcheck(
    generator: Generator, make: Callable[..., Call], variant: int, needs_gradient: bool, strided: bool
) -> None:
    call = make(generator, torch.float32, variant)
    differentiable = {id(value) for value in call.inputs}

    def prepare(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        copy = value.mT.contiguous().mT.detach() if strided and value.dim() >= 2 else value.detach().clone()
        return copy.requires_grad_(needs_gradient and id(value) in differentiable)

    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if make is low_rank_polar_call and variant == 2:
        checks.pop()  # six steps with symbolic shapes take seconds
    torch.library.opcheck(call.operator, tuple(map(prepare, call.operator_arguments)), test_utils=checks)


def check_compiled(generator: Generator, call: Call, backend: str, tolerance: float) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(call.function, fullgraph=True, backend=backend)
    upstream = upstream_of(call, generator)
    assert_same((compiled(*call.inputs),), (call.function(*call.inputs),), tolerance)
    assert_same(
        gradients(compiled, upstream, *call.inputs), gradients(call.function, upstream, *call.inputs), tolerance
    )


@every_operation
@every_variant
def test_compile(generator: Generator, make: Callable[..., Call], variant: int) -> None:
    check_compiled(generator, make(generator, torch.float64, variant), "aot_eager", 1e-10)


@pytest.mark.slow
@every_operation
def test_compile_with_inductor(generator: Generator, make: Callable[..., Call]) -> None:
    check_compiled(generator, make(generator, torch.float64, 2), "inductor", 1e-10)


def test_compile_with_dynamic_shapes(generator: Generator) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lowrank_linear, fullgraph=True, backend="aot_eager", dynamic=True)
    weight = draw(generator, 7, 5)
    for windows, tokens in ((2, 3), (4, 9), (3, 17)):
        arguments = (
            draw(generator, windows, tokens, 5),
            weight,
            draw(generator, windows, 2, 5),
            draw(generator, windows, 7, 2),
        )
        assert_same((compiled(*arguments),), (lowrank_linear(*arguments),), 1e-12)


@every_operation
@every_variant
@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_autocast(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, make: Callable[..., Call], variant: int, backend: str
) -> None:
    """Inputs are cast to bfloat16 once; what is inside keeps its own precision, forward and backward."""
    monkeypatch.setenv("GAKERNELS_BACKEND", backend)
    call = make(generator, torch.float32, variant)
    keeps = {
        context_state_call: (3,),
        delta_state_call: (3, 4),
        low_rank_polar_call: (0,),
        gated_product_call: (0, 1),
    }.get(make, ())  # not cast
    cast = tuple(value if i in keeps else value.bfloat16() for i, value in enumerate(call.inputs))
    wanted = call.function(*cast)
    upstream = draw(generator, *wanted.shape, dtype=wanted.dtype)
    leaves = [value.clone().requires_grad_() for value in call.inputs]
    with torch.autocast("cpu", torch.bfloat16):
        ours = call.function(*leaves)
    assert ours.dtype == wanted.dtype
    assert_same((ours,), (wanted,))
    wanted_gradients = tuple(g.float() for g in gradients(call.function, upstream, *cast))
    assert_same(torch.autograd.grad(ours, leaves, upstream, retain_graph=True), wanted_gradients)
    if backend == "eager":  # the backward of the operators is guarded too
        with torch.autocast("cpu", torch.bfloat16):
            assert_same(torch.autograd.grad(ours, leaves, upstream), wanted_gradients)


@every_operation
def test_autocast_leaves_float64_alone(generator: Generator, make: Callable[..., Call]) -> None:
    call = make(generator, torch.float64, 2)
    with torch.autocast("cpu", torch.bfloat16):
        ours = call.function(*call.inputs)
    assert ours.dtype == torch.float64
    assert relative(ours, call.function(*call.inputs)) <= 1e-14


@every_operation
@every_variant
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(
    generator: Generator, make: Callable[..., Call], variant: int, reentrant: bool
) -> None:
    call = make(generator, torch.float32, variant)
    upstream = upstream_of(call, generator)

    def checkpointed(*values: Tensor) -> Tensor:
        return checkpoint(call.function, *values, use_reentrant=reentrant)

    assert_same(_backward(checkpointed, upstream, call), _backward(call.function, upstream, call))


def _backward(function: Callable[..., Tensor], upstream: Tensor, call: Call) -> tuple[Tensor, ...]:
    leaves = [value.detach().clone().requires_grad_() for value in call.inputs]
    function(*leaves).backward(upstream)
    return tuple(leaf.grad for leaf in leaves)


@every_operation
@every_variant
@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_torch_func_grad_and_vjp(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, make: Callable[..., Call], variant: int, backend: str
) -> None:
    monkeypatch.setenv("GAKERNELS_BACKEND", backend)
    call = make(generator, torch.float64, variant)
    upstream = upstream_of(call, generator)
    wanted = gradients(call.function, upstream, *call.inputs)
    arguments = tuple(range(len(call.inputs)))
    grad = torch.func.grad(lambda *v: (call.function(*v) * upstream).sum(), argnums=arguments)
    if backend == "eager" and not pytorch_allows_func_of_custom_operators():
        with pytest.raises(RuntimeError, match="functorch"):
            grad(*call.inputs)
        return
    assert_same(grad(*call.inputs), wanted, 1e-10)
    value, pull = torch.func.vjp(call.function, *call.inputs)
    assert_same((value, *pull(upstream)), (call.function(*call.inputs), *wanted), 1e-10)


def pytorch_allows_func_of_custom_operators() -> bool:
    """Whether `torch.func.grad` takes any custom operator of `torch.library` that has an autograd formula."""

    @torch.library.custom_op("gakernels_tests::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return 2 * x

    twice.register_autograd(lambda _, grad: 2 * grad)
    try:
        return torch.func.grad(twice)(torch.tensor(1.0)).item() == 2
    except RuntimeError:
        return False


def test_torch_func_functional_call(generator: Generator) -> None:
    """The part of torch.func that needs no transform works with every backend."""
    layer = AdapterGenerator(5, 6, 7, state_size=4, rank=2).double()
    replacement = {name: draw(generator, *value.shape) for name, value in layer.named_parameters()}
    hidden = draw(generator, 1, 2, 3, 5)
    ours = torch.func.functional_call(layer, replacement, (hidden,))
    layer.load_state_dict({**replacement, "sketch": layer.sketch})
    assert_same(ours, layer(hidden), 1e-12)


@every_operation
@every_variant
def test_deterministic_algorithms_and_repetition(generator: Generator, make: Callable[..., Call], variant: int) -> None:
    call = make(generator, torch.float32, variant)
    upstream = upstream_of(call, generator)
    plain = (call.function(*call.inputs), *gradients(call.function, upstream, *call.inputs))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            assert_same((call.function(*call.inputs), *gradients(call.function, upstream, *call.inputs)), plain)
    finally:
        torch.use_deterministic_algorithms(before)


@every_operation
@every_variant
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_shapes_without_data(generator: Generator, make: Callable[..., Call], variant: int, kind: str) -> None:
    call = make(generator, torch.bfloat16 if make is not low_rank_polar_call else torch.float32, variant)
    real = call.operator(*call.operator_arguments)
    if kind == "meta":
        fake = call.operator(*(v.to("meta") if isinstance(v, Tensor) else v for v in call.operator_arguments))
    else:
        with FakeTensorMode() as mode:
            fake = call.operator(
                *(mode.from_tensor(v) if isinstance(v, Tensor) else v for v in call.operator_arguments)
            )
    for without_data, with_data in zip(fake, real, strict=True):
        assert (without_data.shape, without_data.dtype) == (with_data.shape, with_data.dtype)
        assert without_data.stride() == with_data.stride()


@every_operation
def test_a_call_that_nothing_observes_goes_around_the_dispatcher(
    generator: Generator, make: Callable[..., Call]
) -> None:
    """And computes the same; with a gradient, a mode, a profiler or a transform it is an operator."""
    call = make(generator, torch.float64, 0)
    leaves = [value.clone().requires_grad_() for value in call.inputs]
    wanted = call.function(*leaves)
    assert _is_dispatched(lambda: call.function(*leaves))
    assert not _is_dispatched(lambda: call.function(*call.inputs))
    assert torch.equal(call.function(*call.inputs), wanted)
    with torch.no_grad():
        assert not _is_dispatched(lambda: call.function(*leaves))
    for observer in (FlopCounterMode(display=False), profile(activities=[ProfilerActivity.CPU])):
        with observer:
            assert _is_dispatched(lambda: call.function(*call.inputs))


def _is_dispatched(function: Callable[[], object]) -> bool:
    """Whether something calls an operator of this library."""
    found = False

    def watch(frame: FrameType, event: str, _: object) -> None:
        nonlocal found
        if event == "call" and frame.f_code is torch._ops.OpOverload.__call__.__code__:
            found = found or "gakernels" in str(frame.f_locals["self"])

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        function()
    finally:
        sys.setprofile(before)
    return found


@every_operation
def test_operators_may_be_compiled(generator: Generator, make: Callable[..., Call]) -> None:
    forward = make(generator, torch.float32, 0).operator
    backward = getattr(torch.ops.gakernels, forward.overloadpacket.__name__ + "_backward").default
    for operator in (forward, backward):
        assert torch.Tag.pt2_compliant_tag in operator.tags


def test_public_functions_on_meta_tensors_with_backward() -> None:
    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta", requires_grad=True)

    hidden, a2, b1 = meta(2, 3, 4, 5), meta(6, 5), meta(5, 6)
    states = context_state(hidden, a2, b1, torch.empty(2, 3, 4, dtype=torch.bool, device="meta"))
    assert states.shape == (2, 3, 6, 6)
    u, v = low_rank_polar(states, meta(6, 2).detach())
    assert u.shape == v.shape == (2, 3, 6, 2)
    lora_a, lora_b = v[0].mT @ meta(6, 8), meta(9, 6) @ u[0]
    y = lowrank_linear(meta(3, 7, 8), meta(9, 8).detach(), lora_a, lora_b)
    assert y.shape == (3, 7, 9)
    y.sum().backward()
    assert hidden.grad.shape == hidden.shape
    assert a2.grad.shape == a2.shape


@every_operation
@every_variant
def test_inputs_are_left_as_they_were(generator: Generator, make: Callable[..., Call], variant: int) -> None:
    call = make(generator, torch.float32, variant)
    before = [v.clone() if isinstance(v, Tensor) else v for v in call.operator_arguments]
    gradients(call.function, upstream_of(call, generator), *call.inputs)
    for value, copy in zip(call.operator_arguments, before, strict=True):
        if isinstance(value, Tensor):
            assert torch.equal(value, copy)
