"""Models that read words."""

from words import text, tokenizer  # noqa: F401
