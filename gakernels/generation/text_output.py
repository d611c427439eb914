"""From tokens to text piece by piece, without incomplete characters or any part of a stop text."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"  # what a tokenizer writes for the first bytes of a character
_TAIL = 6  # tokens of the prompt that tell how its continuation is joined to it


class TokenText:
    """The text of a growing sequence of tokens, as a continuation of the prompt.

    A token's text depends on the tokens before it (a space or none, bytes of one character), so each piece is the
    difference of two decodings of the last few tokens.

    Args:
        tokenizer: decodes.
        prompt: token ids of the prompt.
        skip_special_tokens: whether special tokens are left out of the text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._tokens = list(prompt[-_TAIL:])
        self._start, self._read = 0, len(self._tokens)  # decode from here; text has been returned up to there

    def push(self, token: int) -> str:
        """The text that one more token completes."""
        self._tokens.append(token)
        piece = self._rest()
        if not piece or piece.endswith(_UNFINISHED):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return piece

    def flush(self) -> str:
        """The text that was held back; nothing may follow it."""
        piece = self._rest()
        self._read = len(self._tokens)
        return piece

    def _rest(self) -> str:
        before = self._decode(self._tokens[self._start : self._read])
        return self._decode(self._tokens[self._start :])[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=self._skip))


class StopTexts:
    """Passes text on up to the first stop text, and holds back what may be the start of one.

    Args:
        stops: the stop texts.
        special: texts of special tokens: a stop text that contains one is also searched for in hidden text.
    """

    def __init__(self, stops: Sequence[str], special: Collection[str] = ()) -> None:
        self._stops = [(stop, any(token in stop for token in special)) for stop in stops]
        self._held: list[tuple[str, bool]] = []  # characters, and whether they are part of the output

    def push(self, piece: str, hidden: str = "") -> tuple[str, bool]:
        """The text that can be output, and whether a stop text was found, after which no more is output.

        Args:
            piece: more text.
            hidden: text after it that is not output but may be part of a stop text.
        """
        self._held += [(character, True) for character in piece] + [(character, False) for character in hidden]
        found, sure = [], len(self._held)
        for stop, sees_hidden in self._stops:
            places = [place for place, (_, shown) in enumerate(self._held) if shown or sees_hidden]
            text = "".join(self._held[place][0] for place in places)
            if stop in text:
                found.append(places[text.index(stop)])
            elif overlap := _overlap(text, stop):
                sure = min(sure, places[-overlap])
        if found:
            text = self._take(min(found))
            self._held = []
            return text, True
        return self._take(sure), False

    def flush(self) -> str:
        """What was held back, when no more text follows."""
        return self._take(len(self._held))

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        return "".join(character for character, shown in taken if shown)


class TextOutput:
    """The text of a growing continuation, up to the first stop text.

    Args:
        tokenizer: decodes.
        prompt: token ids of the prompt.
        stops: it ends before the first of these texts; they may contain special tokens.
        skip_special_tokens: whether special tokens are left out of the text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Sequence[int],
        stops: Sequence[str] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        special = special_tokens(tokenizer) if stops and skip_special_tokens else {}
        self._text, self._hidden = TokenText(tokenizer, prompt, skip_special_tokens), special
        self._stops = StopTexts(stops, special.values())

    def push(self, token: int) -> tuple[str, bool]:
        """The text that can be output after one more token, and whether a stop text was found."""
        return self._stops.push(self._text.push(token), self._hidden.get(token, ""))

    def flush(self) -> tuple[str, bool]:
        """The text that was held back, which may contain a stop text after all; nothing may follow it."""
        piece, stopped = self._stops.push(self._text.flush())
        return piece if stopped else piece + self._stops.flush(), stopped


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The texts of a tokenizer's special tokens, by id."""
    added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_ids, map(str, tokenizer.all_special_tokens), strict=True))


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """What a token adds to a text: the text of it twice minus that of it once, because many tokenizers drop a leading
    space.

    A token that is a part of a character only has the text `\ufffd`, one or several.
    """
    once, twice = (str(tokenizer.decode([token] * times, skip_special_tokens=False)) for times in (1, 2))
    return twice[len(once) :]


def _overlap(text: str, stop: str) -> int:
    """The longest end of the text that is also a start of the stop text."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
