"""Rows: the generations of one request, and their pieces as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from gakernels.generation.scheduler import Generation, Piece
from gakernels.server.api_errors import from_failure
from gakernels.server.protocol import Usage


@dataclass(frozen=True)
class Rows:
    """What a request is waiting for.

    Attributes:
        generations: one for each prompt.
        pieces: number of the generation and piece, put here by the engine.
        model: the model's name in the request, for messages.
    """

    generations: list[Generation]
    pieces: asyncio.Queue[tuple[int, Piece]]
    model: str

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        """Number of the row and piece, until all rows are finished.

        Raises:
            ApiError: a row went wrong.
        """
        unfinished = len(self.generations)
        try:
            while unfinished:
                index, piece = await self.pieces.get()
                if piece.error is not None:
                    raise from_failure(piece.error, self.model) from piece.error
                unfinished -= piece.finished is not None
                yield index, piece
        finally:
            self.cancel()

    def cancel(self) -> None:
        """End them at the next step; nothing happens to finished ones."""
        for generation in self.generations:
            generation.cancel()

    @property
    def usage(self) -> Usage:
        """Numbers of tokens so far."""
        return Usage.of(
            sum(len(row.prompt) for row in self.generations), sum(len(row.tokens) for row in self.generations)
        )
