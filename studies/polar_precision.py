"""Measure what the arithmetic of `low_rank_polar` loses, by spectrum and damping; print markdown tables.

    python studies/polar_precision.py
    python studies/polar_precision.py --state-size 1024 --rank 128
    python studies/polar_precision.py --host build/host/HASH/_host.so

The error of norm(S) = u v^T is the distance from float64 arithmetic on the same float32 state. The products with S and
the r x r work are done in one of these ways, all formed in PyTorch:

    fp32      everything in float32
    fp64 sym  products rounded to float32, sums in chunks of 32; r x r work in float64, symmetric root in every step
    fp64      the same with a Cholesky factor in every step but the last
    TF32      products of operands rounded to TF32, the rest as in fp64
    TF32x3    products of high and low TF32 parts, as the kernels of csrc/ form them; the rest as in fp64
    exact     products in float64, rounded to float32; the rest as in fp64

With --host the kernels themselves run, emulated (a library that tests/ops/cuda_host.py builds), value and gradient;
for a small damping these compute in float64 throughout.
"""

import argparse
import importlib.machinery
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gakernels.ops import low_rank_polar
from gakernels.ops.low_rank_polar import extension

TAUS = (0.0, 1e-5, 1e-4, 1e-3)
LEAST = 2.0**-25  # of the kernels
CHUNK = 32
Product = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--state-size", type=int, default=256)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--draws", type=int, default=3, help="states per row; the median is printed")
    parser.add_argument("--host", type=Path, help="the emulated kernels")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(options.seed)
    kernels = None if options.host is None else _load(options.host)
    columns = list(VARIANTS) if kernels is None else ["value", "gradient"]
    print(f"d_r = {options.state_size}, r = {options.rank}, medians of {options.draws}\n")
    print(f"| spectrum | s_1/s_r | tau | {' | '.join(columns)} |")
    print("|---|---|---|" + "---|" * len(columns))
    for name, values in spectra(options.state_size, options.rank).items():
        spread = f"{values[0] / values[options.rank - 1]:.0e}" if values[options.rank - 1] > 0 else "inf"
        for tau in TAUS:
            if tau == 0 and not 0 < values[0] / values[options.rank - 1] < 1e5:
                continue  # below the rounding error of the state
            draws = []
            for _ in range(options.draws):
                state = _orthogonal(len(values), generator) * values @ _orthogonal(len(values), generator).mT
                sketch = torch.randn(len(values), options.rank, generator=generator)
                if kernels is None:
                    draws.append([error(state.float(), sketch, tau, variant) for variant in VARIANTS.values()])
                else:
                    draws.append(kernel_errors(kernels, state.float(), sketch, tau, generator))
            medians = torch.tensor(draws).nan_to_num(nan=torch.inf).median(0).values.tolist()
            print(f"| {name} | {spread} | {tau:g} | {' | '.join(f'{x:.1e}' for x in medians)} |", flush=True)


def spectra(size: int, rank: int) -> dict[str, Tensor]:
    k = torch.arange(size, dtype=torch.float64)
    made = {"flat": torch.ones(size, dtype=torch.float64)}
    made |= {f"k^-{power}": (k + 1) ** -power for power in (1, 2)}
    made["4 clusters"] = 10.0 ** -(4 * k / rank).floor().clamp(max=4)
    made |= {f"{decades} decades": 10 ** (-decades * k / (rank - 1)) for decades in (1, 2, 3, 4, 5, 7)}
    made["rank r/4"] = (k < rank // 4).double()
    return made


# --- the variants -----------------------------------------------------------------------------------------------------


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() @ b.double()).float()


def chunked_product(a: Tensor, b: Tensor) -> Tensor:
    return _sum_of_chunks(a, b, lambda left, right: left.double() @ right.double())


def tf32_product(a: Tensor, b: Tensor) -> Tensor:
    return _sum_of_chunks(to_tf32(a), to_tf32(b), lambda left, right: left.double() @ right.double())


def tf32x3_product(a: Tensor, b: Tensor) -> Tensor:
    def product(left: Tensor, right: Tensor) -> Tensor:
        (a_high, a_low), (b_high, b_low) = (_split(x) for x in (left, right))
        return a_low @ b_high + a_high @ b_low + a_high @ b_high

    return _sum_of_chunks(a, b, product)


def _sum_of_chunks(a: Tensor, b: Tensor, product: Product) -> Tensor:
    total = torch.zeros(a.shape[0], b.shape[1])
    for first in range(0, a.shape[1], CHUNK):
        total += product(a[:, first : first + CHUNK], b[first : first + CHUNK]).float()
    return total


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    high = to_tf32(x)
    return high.double(), to_tf32(x - high).double()


def to_tf32(x: Tensor) -> Tensor:
    """A tensor rounded to 11 significant bits, ties away from zero."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def symmetric_root(gram: Tensor, shift: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return (vectors / (values.clamp(min=0) + shift).sqrt()) @ vectors.mT


def cholesky_root(gram: Tensor, shift: Tensor) -> Tensor:
    identity = torch.eye(len(gram), dtype=gram.dtype)
    factor, info = torch.linalg.cholesky_ex(gram + shift * identity)
    return (
        torch.linalg.solve_triangular(factor, identity, upper=False).mT
        if info == 0
        else torch.full_like(gram, torch.nan)
    )


VARIANTS: dict[str, tuple[Product, bool, torch.dtype]] = {
    "fp32": (lambda a, b: a @ b, True, torch.float32),
    "fp64 sym": (chunked_product, True, torch.float64),
    "fp64": (chunked_product, False, torch.float64),
    "TF32": (tf32_product, False, torch.float64),
    "TF32x3": (tf32x3_product, False, torch.float64),
    "exact": (exact_product, False, torch.float64),
}


def error(state: Tensor, sketch: Tensor, tau: float, variant: tuple[Product, bool, torch.dtype]) -> float:
    product, symmetric, dtype = variant
    previous = basis = sketch
    for k in range(4):
        x = product(state if k % 2 == 0 else state.mT.contiguous(), basis.contiguous())
        gram = x.to(dtype).mT @ x.to(dtype)
        shift = max(tau, LEAST) ** 2 * gram.trace()
        root = (symmetric_root if symmetric or k == 3 else cholesky_root)(gram, shift)
        previous, basis = basis, (x.to(dtype) @ root).float()
    return relative(previous.double() @ basis.double().mT, exact_norm(state, sketch, tau))


def exact_norm(state: Tensor, sketch: Tensor, tau: float) -> Tensor:
    u, v = low_rank_polar(state.double(), sketch.double(), damping=tau)
    return u @ v.mT


def relative(value: Tensor, target: Tensor) -> float:
    return ((value - target).norm() / target.norm()).item()


# --- the kernels ------------------------------------------------------------------------------------------------------


def kernel_errors(kernels: Any, state: Tensor, sketch: Tensor, tau: float, generator: torch.Generator) -> list[float]:
    """Errors of norm(S), and of the gradient of <G, norm(S)> for a random G."""
    upstream = torch.randn(state.shape, generator=generator)
    target = extension.Target(kernels, 0, 132)
    u, v, steps = extension.forward(target, state, sketch, 1, tau)
    gradient = extension.backward(target, upstream @ v, upstream.mT @ u, state, sketch, steps, tau)
    wide = state.double().requires_grad_()
    value = exact_norm(wide, sketch, tau)
    (wanted,) = torch.autograd.grad(value, wide, upstream.double())
    return [relative(u.double() @ v.double().mT, value.detach()), relative(gradient, wanted)]


def _load(library: Path) -> Any:
    spec = importlib.util.spec_from_loader("_host", importlib.machinery.ExtensionFileLoader("_host", str(library)))
    if spec is None or spec.loader is None:
        raise SystemExit(f"{library} is no extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _orthogonal(size: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


if __name__ == "__main__":
    main()
