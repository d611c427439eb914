"""Measure the damping of `low_rank_polar` on synthetic spectra and on states of a real model; print markdown tables.

    python studies/polar_spectra.py
    python studies/polar_spectra.py --model MODEL_FOLDER --text TEXT_FILE [TEXT_FILE ...]

Columns per damping tau, everything in float64:

    distance  ||N_tau(S) - N_0(S)|| / ||N_0(S)||, with N_0 from QR and SVD. For a state of rank below r, where N_0 is
              not defined, the polar factor of the state at its own rank takes its place.
    gain      ||dS|| ||S|| / ||G|| for a random upstream gradient G of N, the largest of a few draws
    bf16      relative change of N_tau when the state is formed from operands rounded to bfloat16 (real states), or when
              noise of 1e-4 s_1 is added to it (synthetic states)
"""

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gakernels.ops import context_state, low_rank_polar

TAUS = (1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
NOISE = 1e-4


@dataclass(frozen=True)
class State:
    """A state (d_r, d_r), the same state with realistic rounding noise, and the rank of its polar factor."""

    name: str
    exact: Tensor
    noisy: Tensor
    rank: int


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--model", type=Path, help="folder of a causal language model for transformers")
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="plain text files that the model reads")
    parser.add_argument("--state-size", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--rank", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a chunk")
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--draws", type=int, default=3, help="random upstream gradients per state")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if (arguments.model is None) != (not arguments.text):
        parser.error("--model and --text go together")

    generator = torch.Generator().manual_seed(arguments.seed)
    state_size, rank = max(arguments.state_size), max(arguments.rank)
    print(f"## Synthetic states, d_r = {state_size}, r = {rank}\n")
    print_table(synthetic_states(state_size, rank, generator), rank, arguments.draws, generator)
    for text in arguments.text:
        hidden = hidden_states(arguments.model, text, arguments.tokens, arguments.chunks)
        for state_size in arguments.state_size:
            for rank in arguments.rank:
                print(f"\n## {arguments.model.name} on {text.stem}, d_r = {state_size}, r = {rank}\n")
                print_table(real_states(hidden, state_size, rank, generator), rank, arguments.draws, generator)


def print_table(states: Iterable[State], rank: int, draws: int, generator: torch.Generator) -> None:
    print(f"| state | s1/s_r | | {' | '.join(f'{tau:g}' for tau in TAUS)} |")
    print("|---|---|---|" + "---|" * len(TAUS))
    for state in states:
        sketch = torch.randn(state.exact.shape[-1], rank, generator=generator, dtype=torch.float64)
        target = exact_polar(state.exact, sketch[:, : state.rank])
        rows: dict[str, list[str]] = {"distance": [], "gain": [], "bf16": []}
        for tau in TAUS:
            polar, gain = value_and_gain(state.exact, sketch, tau, draws, generator)
            change = relative(product(state.noisy, sketch, tau), polar)
            for name, value in (("distance", relative(polar, target)), ("gain", gain), ("bf16", change)):
                rows[name].append(f"{value:.2g}")
        singular_values = torch.linalg.svdvals(state.exact)
        spread = f"{(singular_values[0] / singular_values[rank - 1]).item():.2g}" if state.rank == rank else "inf"
        for index, (name, cells) in enumerate(rows.items()):
            head = f"{state.name} | {spread}" if index == 0 else " | "
            print(f"| {head} | {name} | {' | '.join(cells)} |", flush=True)


def product(state: Tensor, sketch: Tensor, tau: float) -> Tensor:
    u, v = low_rank_polar(state, sketch, damping=tau)
    return u @ v.mT


def value_and_gain(
    state: Tensor, sketch: Tensor, tau: float, draws: int, generator: torch.Generator
) -> tuple[Tensor, float]:
    """N_tau(S), and the largest ||dS|| ||S|| / ||G|| of a few random G."""
    variable = state.detach().clone().requires_grad_()
    value = product(variable, sketch, tau)
    gain = 0.0
    for _ in range(draws):
        upstream = torch.randn(state.shape, generator=generator, dtype=torch.float64)
        (gradient,) = torch.autograd.grad(value, variable, upstream, retain_graph=True)
        gain = max(gain, (gradient.norm() * state.norm() / upstream.norm()).item())
    return value.detach(), gain


def exact_polar(state: Tensor, sketch: Tensor) -> Tensor:
    """N_0(S): the sketched range by QR, then the polar factor of Q^T S by SVD (`torch.svd_lowrank` with niter=1)."""
    q = torch.linalg.qr(state @ sketch).Q
    q = torch.linalg.qr(state @ torch.linalg.qr(state.mT @ q).Q).Q
    left, _, right = torch.linalg.svd(q.mT @ state, full_matrices=False)
    return q @ left @ right


def relative(value: Tensor, target: Tensor) -> float:
    return ((value - target).norm() / target.norm()).item()


def synthetic_states(size: int, rank: int, generator: torch.Generator) -> list[State]:
    def orthogonal() -> Tensor:
        return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q

    def state(name: str, spectrum: Tensor, effective_rank: int = rank) -> State:
        exact = orthogonal() @ torch.diag(spectrum) @ orthogonal().mT
        noise = torch.randn(size, size, generator=generator, dtype=torch.float64)
        noise *= NOISE * spectrum[0] / torch.linalg.matrix_norm(noise, 2)
        return State(name, exact, exact + noise, effective_rank)

    k = torch.arange(size, dtype=torch.float64)
    few = rank // 4
    return [
        state("flat", torch.ones(size, dtype=torch.float64)),
        state("k^-1", 1 / (k + 1)),
        state("k^-2", (k + 1) ** -2),
        state("1 decade over r", 10 ** (-k / (rank - 1))),
        state("2 decades over r", 10 ** (-2 * k / (rank - 1))),
        state("4 decades over r", 10 ** (-4 * k / (rank - 1))),
        state(f"rank {few}, flat", (k < few).double(), few),
        state(f"rank {few}, 1 decade", torch.where(k < few, 10 ** (-k / max(few - 1, 1)), 0.0), few),
        state("rank 1", (k < 1).double(), 1),
    ]


def hidden_states(model: Path, text: Path, tokens: int, chunks: int) -> Tensor:
    """(layers, chunks, tokens, d_h) float64: inputs of the decoder layers, each chunk by itself, after an RMSNorm."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text.read_text(encoding="utf-8")[: 16 * tokens * chunks], return_tensors="pt").input_ids[0]
    if len(ids) < tokens * chunks:
        raise SystemExit(f"{text} has {len(ids)} tokens, fewer than {chunks} chunks of {tokens}")
    with torch.no_grad():
        network = AutoModelForCausalLM.from_pretrained(model)
        output = network(ids[: tokens * chunks].view(chunks, tokens), output_hidden_states=True)
    hidden = torch.stack(output.hidden_states[:-1]).double()
    return F.rms_norm(hidden, hidden.shape[-1:], eps=1e-6)


def real_states(hidden: Tensor, size: int, rank: int, generator: torch.Generator) -> Iterable[State]:
    """The state after one chunk and after all chunks, of the first, middle and last layer, through random maps."""
    width = hidden.shape[-1]
    for layer in sorted({0, hidden.shape[0] // 2, hidden.shape[0] - 1}):
        a2 = torch.randn(size, width, generator=generator, dtype=torch.float64) * math.sqrt(1 / 3 / width)
        b1 = torch.randn(width, size, generator=generator, dtype=torch.float64) * math.sqrt(1 / 3 / width)
        exact = context_state(hidden[layer : layer + 1], a2, b1)[0]
        operands = (tensor.bfloat16() for tensor in (hidden[layer : layer + 1], a2, b1))
        noisy = context_state(*operands)[0].double()
        for chunk in sorted({0, hidden.shape[1] - 1}):
            yield State(f"layer {layer}, {chunk + 1} chunks", exact[chunk], noisy[chunk], min(rank, width))


if __name__ == "__main__":
    main()
