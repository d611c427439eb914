"""The events of a stream: pieces of text as the OpenAI interface sends them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from gakernels.generation.scheduler import LENGTH, Piece
from gakernels.server.protocol import ChatChunk, ChatChunkChoice, Completion, CompletionChoice, FinishReason

DONE = "data: [DONE]\n\n"


@dataclass(frozen=True)
class EventStream:
    """The events of an answer.

    Attributes:
        events: as text.
        end: what else must happen when nobody wants them any more, even if nobody has asked for the first one.
    """

    events: AsyncGenerator[str, None]
    end: Callable[[], None] = lambda: None

    async def close(self) -> None:
        """The answer is out, or its reader has gone."""
        self.end()
        await self.events.aclose()


def completion_event(frame: Callable[..., Completion], index: int, piece: Piece) -> Completion:
    """A piece of the completion of prompt number `index`; `frame` makes an event of its choices."""
    return frame(choices=[CompletionChoice(index=index, text=piece.text, finish_reason=finish_reason(piece.finished))])


def chat_event(frame: Callable[..., ChatChunk], index: int, piece: Piece) -> ChatChunk:
    """A piece of the model's turn."""
    delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
    return frame(choices=[ChatChunkChoice(index=index, delta=delta, finish_reason=finish_reason(piece.finished))])


def chat_opening(frame: Callable[..., ChatChunk]) -> ChatChunk:
    """The event in front of the model's turn: whose it is."""
    return frame(choices=[ChatChunkChoice(index=0, delta={"role": "assistant", "content": ""})])


def finish_reason(finished: str | None) -> FinishReason | None:
    """Why a text ended, in OpenAI's words; None while it goes on."""
    if finished is None:
        return None
    return "length" if finished == LENGTH else "stop"


def as_event(event: BaseModel) -> str:
    """As a server-sent event."""
    return f"data: {event.model_dump_json()}\n\n"
