"""Which factors adapted layers use: a property of the thread or asyncio task (`contextvars`), not of the layers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from typing import Any, NoReturn

from torch import nn

from gakernels.errors import InputError


class Block:
    """The factors of some layers while a block of code runs.

    Args:
        factors: by layer; None for no adapter. They may change while the block runs. A missing layer uses the factors
            of the enclosing block.
        work: what the block is for, if code inside needs to know (`model.context_pass.ContextPass`).
    """

    def __init__(self, factors: dict[nn.Module, Any], work: Any = None) -> None:
        self.factors, self.work = factors, work
        self.outer: Block | None = None
        self.ended = False  # for other contexts, which can't be reset: only the one that the block ends in can

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Use the factors in the current thread or task, and in those that it starts with a copy of its context.

        Raises:
            InputError: it ends in a different context than it began in, or before a block that began inside it (a
                generator that yields in a block can do both). Its factors are no longer used in either case.
        """
        self.outer = innermost()
        token = _INNERMOST.set(self)
        try:
            yield
        except BaseException:
            self._end(token)
            raise
        if not self._end(token):
            raise InputError(
                "a block with an adapter must end in the thread or task where it began, and before the blocks around "
                "it, but it did not: what ran in between may have had another adapter"
            )

    def _end(self, token: Token[Block | None]) -> bool:
        """Whether the block ended in its place."""
        in_place = _INNERMOST.get() is self
        if in_place:
            try:
                _INNERMOST.reset(token)
            except ValueError:  # a copy of the context that the block began in
                in_place = False
        self.ended = not in_place
        _INNERMOST.set(innermost())
        return in_place


_INNERMOST: ContextVar[Block | None] = ContextVar("gakernels_innermost_block", default=None)


class HandedOver(threading.local):
    """The factors of one layer in the current thread: for a compiled graph, since torch.compile can't trace a context
    variable. Whoever calls the graph sets `factors` (no default in the class: torch 2.11 can't guard that)."""

    def __reduce__(self) -> NoReturn:
        refuse_copy()


def refuse_copy() -> NoReturn:
    """Raises: InputError: what is compiled belongs to one layer; its copy would compute with that layer's weights."""
    raise InputError("a compiled layer can't be copied or pickled; call uncompile_layers(base) first")


def innermost() -> Block | None:
    """The innermost block of the current thread or task."""
    block = _INNERMOST.get()
    while block is not None and block.ended:
        block = block.outer
    return block


def factors_in_force(layer: nn.Module, otherwise: Any = None) -> Any:
    """The factors of a layer in the current thread or task."""
    block = _INNERMOST.get()
    while block is not None:
        if not block.ended and layer in block.factors:
            return block.factors[layer]
        block = block.outer
    return otherwise
