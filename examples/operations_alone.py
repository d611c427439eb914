"""The operations in a module of one's own: a linear layer that remembers pairs, with a memory per row of the batch.

    python examples/operations_alone.py

`PairMemory` sees pairs (key, value) once and is then a linear layer whose low-rank term maps keys to values. There is
no language model here: the three operations are functions of tensors.
"""

import torch
from torch import Tensor, nn

from gakernels import context_state, low_rank_polar, lowrank_linear


class PairMemory(nn.Module):
    """y = W x + U V^T B x, where U V^T = norm(sum of A v k^T B^T) over the pairs of the row.

    Args:
        size: of keys and values.
        state_size: of the memory; at most `rank` pairs can be told apart.
        rank: of the low-rank term.
    """

    sketch: Tensor

    def __init__(self, size: int, state_size: int, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, size), requires_grad=False)
        self.read_value = nn.Parameter(torch.randn(state_size, size) / size**0.5)
        self.read_key = nn.Parameter(torch.randn(size, state_size) / size**0.5)
        self.write = nn.Parameter(torch.randn(size, state_size) / state_size**0.5)
        self.register_buffer("sketch", torch.randn(state_size, rank))

    def forward(self, keys: Tensor, values: Tensor, x: Tensor) -> Tensor:
        """Remember pairs (rows, pairs, size), answer x (rows, M, size)."""
        pick = torch.eye(2 * keys.shape[-1])
        states = context_state(
            torch.cat([values, keys], -1)[:, None],
            self.read_value @ pick[: keys.shape[-1]],
            pick[:, keys.shape[-1] :] @ self.read_key,
        )[:, -1]
        u, v = low_rank_polar(states, self.sketch)
        return lowrank_linear(x, self.weight, v.mT @ self.read_key.mT, self.write @ u)


def main(steps: int = 60) -> tuple[float, float]:
    """Train on random pairs; returns the loss at the start and at the end, on pairs that were never seen."""
    torch.manual_seed(0)
    memory = PairMemory(size=16, state_size=32, rank=8)
    optimizer = torch.optim.Adam([p for p in memory.parameters() if p.requires_grad], lr=1e-2)

    def loss() -> Tensor:
        keys, values = torch.randn(2, 32, 4, 16).unbind(0)
        return (memory(keys, values, keys) - values).square().mean()

    with torch.no_grad():
        before = float(torch.stack([loss() for _ in range(10)]).mean())
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    with torch.no_grad():
        after = float(torch.stack([loss() for _ in range(10)]).mean())
    print(f"mean squared error of remembered values: {before:.3f} before training, {after:.3f} after {steps} steps")
    return before, after


if __name__ == "__main__":
    main()
