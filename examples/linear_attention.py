"""Causal linear attention in chunks: the key-value state between the chunks comes from `context_state`.

    python examples/linear_attention.py

Linear attention replaces the softmax by a feature map phi (Katharopoulos et al., 2020; here without the normaliser):
y_i = sum over j <= i of (phi(q_i) . phi(k_j)) v_j. Within a chunk that is a small masked product. All earlier chunks
act through one matrix S = sum of v_j phi(k_j)^T: y_i += S phi(q_i).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gakernels import context_state


def chunked_attention(
    queries: Tensor, keys: Tensor, values: Tensor, chunk_size: int, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Linear attention of the queries, after what the state holds.

    Args:
        queries, keys, values: (batch, tokens, size), the feature map applied; a head counts as a row of the batch.
        chunk_size: tokens in a chunk; the last chunk is filled up.
        state: (batch, size, size) of the tokens before, float32 or wider; none at the start of a text.

    Returns:
        (batch, tokens, size), and the state after the last token.
    """
    tokens, size = queries.shape[1:]
    queries, keys, values = (
        F.pad(x, (0, 0, 0, -tokens % chunk_size)).unflatten(1, (-1, chunk_size)) for x in (queries, keys, values)
    )
    # context_state sums (A2 h)(B1^T h)^T. With h = [v, k], A2 picks the value and B1 the key.
    pick = torch.eye(2 * size, dtype=keys.dtype, device=keys.device)
    states = context_state(torch.cat([values, keys], -1), pick[:size], pick[:, size:], initial_state=state)
    # These include each chunk's own tokens. A chunk needs the state before it: the one of its predecessor.
    first = torch.zeros_like(states[:, :1]) if state is None else state[:, None]
    before = torch.cat([first, states[:, :-1]], 1).to(queries.dtype)
    within = (queries @ keys.mT).tril() @ values
    return (within + queries @ before.mT).flatten(1, 2)[:, :tokens], states[:, -1]


class LinearAttention(nn.Module):
    """A self-attention layer with several heads and phi(x) = elu(x) + 1.

    Args:
        hidden_size: a multiple of heads.
        heads: number of heads, each with a state of (hidden_size / heads)^2 numbers.
        chunk_size: tokens in a chunk.
    """

    def __init__(self, hidden_size: int, heads: int, chunk_size: int) -> None:
        super().__init__()
        self.heads, self.chunk_size = heads, chunk_size
        self.qkv_proj = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Output (B, tokens, hidden_size) of hidden (B, tokens, hidden_size), and the state to continue from."""
        queries, keys, values = self.split(self.qkv_proj(hidden))
        y, state = chunked_attention(F.elu(queries) + 1, F.elu(keys) + 1, values, self.chunk_size, state)
        return self.o_proj(y.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2)), state

    def split(self, projected: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values (B * heads, tokens, size) of (B, tokens, 3 * hidden_size)."""
        return projected.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).flatten(1, 2).unbind()


def main() -> None:
    """A text at once, the same text in two parts, and the definition: the largest differences."""
    batch, tokens, hidden_size = 2, 1000, 128
    layer, hidden = LinearAttention(hidden_size, heads=4, chunk_size=64), torch.randn(batch, tokens, hidden_size)
    with torch.no_grad():
        at_once, _ = layer(hidden)
        start, state = layer(hidden[:, :700])
        rest, _ = layer(hidden[:, 700:], state)
        queries, keys, values = layer.split(layer.qkv_proj(hidden))
        y = ((F.elu(queries) + 1) @ (F.elu(keys) + 1).mT).tril() @ values
        definition = layer.o_proj(y.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2))
    in_parts, largest = torch.cat([start, rest], 1), definition.abs().max()
    print(f"{tokens} tokens in chunks of {layer.chunk_size}; a state of {state[0].numel()} numbers a head")
    print(f"from the quadratic definition, relative: {(at_once - definition).abs().max() / largest:.1e}")
    print(f"read in two parts, relative: {(in_parts - at_once).abs().max() / largest:.1e}")


if __name__ == "__main__":
    main()
