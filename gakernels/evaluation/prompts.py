"""The prompts of the paper's figure 7, the end of an answer, and the tokens of a question."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from gakernels.data.chat import ChatEncoder
from gakernels.data.conversations import Message
from gakernels.errors import check_known
from gakernels.model.encoding import encode_text

QA_INSTRUCTION = (
    "Instruction: Answer the question based on the context above. Respond with a short phrase only. Keep the answer "
    "short and concise, without any explanation or additional words"
)
ICL_INSTRUCTION = (
    "Instruction: Based on the demonstration above, provide a short and concise answer, without any explanation or "
    "additional words."
)
STYLES = ("paper", "released", "plain", "bare")

QA_STOPS, QA_NEW_TOKENS = ("\n", "Question:"), 20
ICL_STOPS, ICL_NEW_TOKENS = ("\n",), 10


def qa_prompt(question: str, context: str | None = None, style: str = "paper") -> str:
    """The prompt of document question answering.

    Args:
        question: the question.
        context: the documents, or None to ask closed-book.
        style: `paper`: figure 7; `released`: the authors' code, which puts "## " before the instruction; `plain`:
            "Question: ... Answer:" without an instruction; `bare`: the question itself, as that code asks tuned and
            adapted models.

    Raises:
        InputError: there is no such style.
    """
    check_known("style", style, STYLES)
    instruction = _instruction(QA_INSTRUCTION, style)
    text = question if style == "bare" else f"{instruction}Question: {question}\nAnswer:"
    return text if context is None else f"{context}\n\n{text}"


def icl_prompt(item: str, demonstrations: str | None = None, style: str = "paper") -> str:
    """The prompt of in-context learning.

    Args:
        item: the input to answer.
        demonstrations: as `demonstration_text` writes them, or None for no demonstrations.
        style: `paper`: figure 7 (the paper's Llama-2 runs); `released`: the same with "## " before the
            instruction; `plain` and `bare`: no instruction (the paper's Mistral runs).

    Raises:
        InputError: there is no such style.
    """
    check_known("style", style, STYLES)
    text = f"{_instruction(ICL_INSTRUCTION, style)}Input: {item}\nOutput:"
    return text if demonstrations is None else f"{demonstrations}\n\n{text}"


def demonstration_text(pairs: Iterable[tuple[str, str]]) -> str:
    """Demonstrations, each an input and an output, joined in order."""
    return "\n\n".join(f"Input: {given}\nOutput: {wanted}" for given, wanted in pairs)


def _instruction(text: str, style: str) -> str:
    return {"paper": f"{text}\n\n", "released": f"## {text}\n\n"}.get(style, "")


class Asker:
    """Writes questions, with or without an answer after them, as tokens.

    Args:
        tokenizer: of the model.
        chat: whether a question is a user's message, as instruction tuning writes it (docs/training.md).

    Raises:
        InputError: `chat` is set, but the tokenizer does not support it; see `ChatEncoder`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: bool = False) -> None:
        self._tokenizer = tokenizer
        self._chat = ChatEncoder(tokenizer) if chat else None

    def question(self, text: str) -> list[int]:
        """The tokens after which the answer begins."""
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
