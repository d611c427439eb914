"""From tokens to text piece by piece: no half characters, and nothing of a stop text gets out."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"  # what a tokenizer writes for the first bytes of a character
_TAIL = 6  # tokens of the prompt that tell how its continuation is joined to it


class TokenText:
    """The text of a growing sequence of tokens, as it continues the prompt.

    A token's text depends on the tokens in front of it (a space or none, bytes of one character), so each piece is the
    difference of two decodings of the last few tokens.

    Args:
        tokenizer: decodes; special tokens have no text.
        prompt: token ids in front.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-_TAIL:])
        self._start, self._read = 0, len(self._tokens)  # decode from here; text is out up to there

    def push(self, token: int) -> str:
        """The text that is complete with one more token."""
        self._tokens.append(token)
        piece = self._rest()
        if not piece or piece.endswith(_UNFINISHED):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return piece

    def flush(self) -> str:
        """The text that was held back; nothing comes after it."""
        piece = self._rest()
        self._read = len(self._tokens)
        return piece

    def _rest(self) -> str:
        before = self._decode(self._tokens[self._start : self._read])
        return self._decode(self._tokens[self._start :])[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


class StopTexts:
    """Passes text on up to the first of some stop texts, and holds back what may be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """The text that may go out, and whether a stop text has come: nothing goes out after it."""
        text = self._held + piece
        found = [position for position in (text.find(stop) for stop in self._stops) if position >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        longest = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - longest :]
        return text[: len(text) - longest], False

    def flush(self) -> str:
        """What was held back, now that no more comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The longest end of the text that is a start of the stop text."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
