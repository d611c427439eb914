"""Limits: how much one server takes on."""

from __future__ import annotations

from dataclasses import dataclass, fields

from gakernels.errors import InputError


@dataclass(frozen=True)
class Limits:
    """Bounds of a server; what exceeds one is refused with a message that names it.

    Attributes:
        contexts: contexts on disk, all users together.
        contexts_per_key: contexts of one API key.
        body_bytes: size of a request.
        append_tokens: tokens of one append.
        context_tokens: tokens of a context, all appends together.
        prompts: prompts in one request.
        new_tokens: tokens generated for a prompt.
        rows: prompts decoded together.
        cache_tokens: key-value cache: rows times the tokens that the longest of them may reach.
        waiting: prompts and appends that wait or run at the same time.

    Raises:
        InputError: a bound is below 1.
    """

    contexts: int = 10_000
    contexts_per_key: int = 1_000
    body_bytes: int = 8 * 2**20
    append_tokens: int = 131_072
    context_tokens: int = 100_000_000
    prompts: int = 16
    new_tokens: int = 4_096
    rows: int = 64
    cache_tokens: int = 262_144
    waiting: int = 1_024

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise InputError(f"{field.name} must be at least 1, but it is {getattr(self, field.name)}")
