"""Tells transformers whether a row holds several sequences one after the other, which the caller knows.

By itself it looks at the positions, and the host waits for the GPU to see them. The answer is the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from transformers import masking_utils

_packed: ContextVar[bool | None] = ContextVar("packed", default=None)
_look = masking_utils.find_packed_sequence_indices


@contextmanager
def rows_packed(packed: bool) -> Iterator[None]:
    """Within the block, in this thread or task, at least one row holds several sequences, or (`False`) none does."""
    token = _packed.set(packed)
    try:
        yield
    finally:
        _packed.reset(token)


def _find(position_ids: Tensor) -> Tensor | None:
    """The number (B, M) of the sequence that each token belongs to, from its position in it; None for one in each row.

    Takes the place of transformers' function, and of its meaning only the question that needs no answer.
    """
    packed = None if torch.compiler.is_compiling() else _packed.get()  # torch.compile can't trace a context variable
    if packed is None:
        return _look(position_ids)
    if not packed:
        return None
    return (position_ids.diff(prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)


masking_utils.find_packed_sequence_indices = _find
