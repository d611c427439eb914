"""`low_rank_polar` by the CUDA extension: refusals where it can't run, and on a GPU the cases of test_cuda_host.py."""

import importlib
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from oracles import draw, gradients, orthogonal, relative, state_of, svd_norm
from torch import Generator, Tensor

from gakernels import low_rank_polar
from gakernels.errors import BackendError
from gakernels.ops.low_rank_polar import DEFAULT_DAMPING

pytestmark = pytest.mark.kernels

VALUE_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4


@pytest.fixture
def cuda() -> ModuleType:
    """The backend's module."""
    pytest.importorskip("gakernels._cuda", reason="the CUDA extension is not built", exc_type=ImportError)
    return importlib.import_module("gakernels.ops.low_rank_polar.cuda")


# --- without a GPU ----------------------------------------------------------------------------------------------------


def test_it_imports_and_refuses_states_on_the_cpu(cuda: ModuleType, generator: Generator) -> None:
    states, sketch = draw(generator, 1, 128, 128).float(), draw(generator, 128, 32).float()
    assert "the states are on cpu" in cuda.unsupported(states, sketch, 1, DEFAULT_DAMPING)
    with pytest.raises(BackendError, match=r"can't run in CUDA: the states are on cpu, and the kernels need"):
        cuda.forward(states, sketch, 1, DEFAULT_DAMPING)
    with pytest.raises(BackendError, match="the states are on cpu"):
        cuda.backward(sketch, sketch, states, sketch, None, DEFAULT_DAMPING)


def test_forcing_it_on_the_cpu_is_an_error(
    cuda: ModuleType, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GAKERNELS_BACKEND", "cuda")
    with pytest.raises(BackendError, match="the states are on cpu"):
        low_rank_polar(draw(generator, 1, 128, 128).float(), draw(generator, 128, 32).float())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_launch_without_a_gpu_says_so(cuda: ModuleType) -> None:
    sizes = cuda.kernels.Sizes(1, 128, 32, 4, 1e-3, 132, exact=False)
    none = dict.fromkeys(("states", "sketch", "u", "v", "inputs", "transforms", "workspace", "stream"), 0)
    with pytest.raises(cuda.kernels.LaunchError, match=r"(?i)cuda|driver|device"):
        cuda.kernels.forward(sizes, **none)


@pytest.mark.parametrize(
    ("architecture", "capability", "runs"),
    [
        *[("90a", (9, 0), True), ("90a", (9, 1), False), ("90a", (10, 0), False), ("80", (8, 0), True)],
        *[("80", (8, 9), True), ("86", (8, 0), False), ("80", (9, 0), False), ("100", (10, 3), True)],
    ],
)
def test_machine_code_is_for_some_chips(
    cuda: ModuleType, architecture: str, capability: tuple[int, int], runs: bool
) -> None:
    assert cuda._runs_on(architecture, capability) is runs


@pytest.mark.parametrize("exact", [False, True])
def test_the_workspace_grows_with_the_batch(cuda: ModuleType, exact: bool) -> None:
    sizes = [cuda.kernels.Sizes(batch, 1024, 128, 4, 1e-3, 132, exact) for batch in (1, 8, 256)]
    for bytes_of in (cuda.kernels.forward_workspace, cuda.kernels.backward_workspace):
        assert 0 < bytes_of(sizes[0]) < bytes_of(sizes[1]) < bytes_of(sizes[2])
        assert bytes_of(sizes[2]) < 4 << 30


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def geometric(decades: float, state_size: int, rank: int) -> Tensor:
    return 10 ** (-decades * torch.arange(state_size, dtype=torch.float64) / (rank - 1))


STATES: dict[str, Callable[[Generator, int, int], Tensor]] = {
    "1 decade": lambda g, n, r: state_of(g, geometric(1, n, r)),
    "4 decades": lambda g, n, r: state_of(g, geometric(4, n, r)),
    "7 decades": lambda g, n, r: state_of(g, geometric(7, n, r)),
    "rank 8": lambda g, n, r: draw(g, n, 8) @ draw(g, 8, n),
    "rank 1": lambda g, n, r: draw(g, n, 1) @ draw(g, 1, n),
    "orthogonal": lambda g, n, r: 3 * orthogonal(g, n),
}


def norm(states: Tensor, sketch: Tensor, damping: float = DEFAULT_DAMPING) -> Tensor:
    u, v = low_rank_polar(states, sketch, damping=damping)
    return u @ v.mT


def expected(states: Tensor, sketch: Tensor, upstream: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """norm(S) and its gradient in float64 on the CPU, by plain PyTorch."""
    wide = states.cpu().double(), sketch.cpu().double()
    (gradient,) = gradients(lambda s: norm(s, wide[1], damping), upstream.cpu().double(), wide[0])
    return svd_norm(*wide, damping), gradient


@pytest.mark.gpu
@pytest.mark.parametrize(("state_size", "rank", "batch"), [(128, 32, 3), (256, 64, 2), (384, 96, 2), (1024, 128, 2)])
@pytest.mark.parametrize("damping", [1e-4, DEFAULT_DAMPING])
@pytest.mark.parametrize("kind", STATES)
def test_equals_the_definition_on_the_gpu(
    cuda: ModuleType,
    generator: Generator,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    damping: float,
    state_size: int,
    rank: int,
    batch: int,
) -> None:
    states = torch.stack([STATES[kind](generator, state_size, rank).float() for _ in range(batch)]).cuda()
    sketch, upstream = draw(generator, state_size, rank).float().cuda(), draw(generator, *states.shape).float().cuda()
    value, gradient = expected(states, sketch, upstream, damping)
    monkeypatch.setenv("GAKERNELS_BACKEND", "cuda")
    assert relative(norm(states, sketch, damping).cpu(), value) <= VALUE_TOLERANCE
    (ours,) = gradients(lambda s: norm(s, sketch, damping), upstream, states)
    assert relative(ours.cpu(), gradient) <= GRADIENT_TOLERANCE


@pytest.mark.gpu
def test_large_and_small_batches_agree_on_the_gpu(
    cuda: ModuleType, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """256 matrices take other tiles, partial sums and groups than one."""
    monkeypatch.setenv("GAKERNELS_BACKEND", "cuda")
    states = draw(generator, 256, 256, 256).float().cuda()
    sketch, upstream = draw(generator, 256, 128).float().cuda(), draw(generator, *states.shape).float().cuda()
    values, (grads,) = norm(states, sketch), gradients(lambda s: norm(s, sketch), upstream, states)
    for i in (0, 100, 255):
        assert relative(values[i], norm(states[i], sketch)) <= VALUE_TOLERANCE
        (single,) = gradients(lambda s: norm(s, sketch), upstream[i], states[i])
        assert relative(grads[i], single) <= GRADIENT_TOLERANCE


@pytest.mark.gpu
def test_it_is_deterministic_and_agrees_with_the_emulation(
    cuda: ModuleType, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cuda_host

    states, sketch = draw(generator, 2, 128, 128).float(), draw(generator, 128, 64).float()
    upstream = draw(generator, *states.shape).float()
    emulated = cuda_host.norm_and_gradient(states, sketch, upstream)
    monkeypatch.setenv("GAKERNELS_BACKEND", "cuda")
    on_gpu = states.cuda(), sketch.cuda()
    first = norm(*on_gpu), gradients(lambda s: norm(s, on_gpu[1]), upstream.cuda(), on_gpu[0])[0]
    for _ in range(5):
        again = norm(*on_gpu), gradients(lambda s: norm(s, on_gpu[1]), upstream.cuda(), on_gpu[0])[0]
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, again, strict=True))
    for mine, theirs in zip(first, emulated, strict=True):
        assert relative(mine.cpu(), theirs) <= VALUE_TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_zero_and_not_finite_states_on_the_gpu(
    cuda: ModuleType, generator: Generator, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    monkeypatch.setenv("GAKERNELS_BACKEND", "cuda")
    states, sketch = draw(generator, 3, 128, 128).float().cuda(), draw(generator, 128, 32).float().cuda()
    upstream = draw(generator, *states.shape).float().cuda()
    wanted = norm(states, sketch), gradients(lambda s: norm(s, sketch), upstream, states)[0]
    states[1] = bad
    ours = norm(states, sketch), gradients(lambda s: norm(s, sketch), upstream, states)[0]
    for mine, theirs in zip(ours, wanted, strict=True):
        assert torch.equal(mine[[0, 2]], theirs[[0, 2]])
        assert not mine[1].any() if bad == 0 else mine[1].isnan().all()


@pytest.mark.gpu
def test_streams_and_graphs(cuda: ModuleType, generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAKERNELS_BACKEND", "cuda")
    states, sketch = draw(generator, 2, 256, 256).float().cuda(), draw(generator, 256, 128).float().cuda()
    upstream = draw(generator, *states.shape).float().cuda()
    leaf = states.clone().requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        value = norm(leaf, sketch)
        return value.detach(), torch.autograd.grad(value, leaf, upstream)[0]

    wanted = run()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        aside = run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    torch.cuda.synchronize()
    for other in (aside, captured):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(other, wanted, strict=True))
    with torch.no_grad():
        leaf.copy_(3 * states)
    graph.replay()
    torch.cuda.synchronize()
    assert relative(captured[0], wanted[0]) <= VALUE_TOLERANCE  # of the new states, which have the same norm
    assert relative(3 * captured[1], wanted[1]) <= GRADIENT_TOLERANCE
