"""Questions as tokens: as plain text, or as a user's message in the tokenizer's chat template."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from gakernels.data.chat import ChatEncoder
from gakernels.data.conversations import Message
from gakernels.model.encoding import encode_text


class Asker:
    """Writes questions, and questions with an answer behind them.

    Args:
        tokenizer: of the model.
        chat: whether a question is a user's message, as instruction tuning writes it (docs/training.md).

    Raises:
        InputError: there is to be a chat, but the tokenizer is unfit for it; see `ChatEncoder`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: bool = False) -> None:
        self._tokenizer = tokenizer
        self._chat = ChatEncoder(tokenizer) if chat else None

    def question(self, text: str) -> list[int]:
        """The tokens behind which the answer begins."""
        if self._chat is not None:
            return self._chat.prompt([Message("user", text)])
        return encode_text(self._tokenizer, text)

    def answered(self, text: str, answer: str) -> tuple[list[int], int]:
        """The tokens of a question and an answer, and where the answer begins."""
        asked = self.question(text)
        if self._chat is not None:
            return asked + encode_text(self._tokenizer, answer, begins=False), len(asked)
        whole = encode_text(self._tokenizer, f"{text} {answer}")
        # A tokenizer may join the last characters of the question with the first of the answer.
        common = next((n for n, (one, other) in enumerate(zip(asked, whole, strict=False)) if one != other), len(asked))
        return whole, max(min(common, len(whole) - 1), 1)
