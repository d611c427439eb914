"""The two forms of the last step of `low_rank_polar` in plain PyTorch, timed forward and backward on a CPU.

python studies/polar_forms.py
"""

import time
from unittest.mock import patch

import torch

from gakernels import low_rank_polar
from gakernels.ops.low_rank_polar import eager

SIZES = [(1, 32, 8), (64, 32, 8), (1, 128, 32), (16, 128, 32), (1, 256, 64), (16, 256, 64), (64, 256, 64)]
SIZES += [(1, 1024, 128), (8, 1024, 128), (1, 1024, 256)]
SECONDS = 2.0  # of repetitions per row and form; the fastest counts


def main() -> None:
    print("| batch | d_r | r | dtype | eigenvectors, ms | shifted inverses, ms |\n|---|---|---|---|---|---|")
    for batch, state_size, rank in SIZES:
        for dtype in (torch.float32, torch.float64):
            states = torch.randn(batch, state_size, state_size, dtype=dtype, requires_grad=True)
            sketch = torch.randn(state_size, rank, dtype=dtype)
            times = [milliseconds(states, sketch, form) for form in (True, False)]
            print(
                f"| {batch} | {state_size} | {rank} | {str(dtype)[6:]} | {times[0]:.3g} | {times[1]:.3g} |", flush=True
            )


def milliseconds(states: torch.Tensor, sketch: torch.Tensor, eigenvectors: bool) -> float:
    """The fastest forward and backward."""
    best, until = float("inf"), time.perf_counter() + SECONDS
    with patch.object(eager, "uses_lapack", lambda device: eigenvectors):
        while time.perf_counter() < until or best == float("inf"):
            start = time.perf_counter()
            u, v = low_rank_polar(states, sketch)
            torch.autograd.grad((u.sum(), v.sum()), states)
            best = min(best, time.perf_counter() - start)
    return 1e3 * best


if __name__ == "__main__":
    main()
