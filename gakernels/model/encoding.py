"""Encoding texts as token ids: one rule for contexts and prompts, used everywhere."""

from collections.abc import Sequence
from numbers import Integral

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gakernels.errors import InputError


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, begins: bool = True) -> list[int]:
    """Token ids of a text that may be continued.

    The special tokens that the tokenizer puts before a text (BOS, CLS) are kept; those that it puts after it (EOS, SEP)
    would mark the end of the text, and are left out.

    Args:
        tokenizer: the base model's tokenizer.
        text: a context, a piece of one, or a prompt.
        begins: whether the text is the beginning; later pieces get no special tokens.
    """
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return opening_tokens(tokenizer) + ids if begins else ids


def opening_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that a tokenizer puts before a text, if any."""
    # A special token always encodes to a token. Other texts may not: a vocabulary may lack their characters.
    for text in (*tokenizer.all_special_tokens, "a"):
        encoded = tokenizer(text, return_special_tokens_mask=True)
        if 0 in encoded["special_tokens_mask"]:
            return list(encoded["input_ids"][: encoded["special_tokens_mask"].index(0)])
    return []


def check_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], rows: int, place: str) -> None:
    """Check that the base model knows the tokens: a tokenizer may have more, as long as no text contains them.

    Raises:
        InputError: the base model does not know one of the tokens.
    """
    largest = max(ids, default=0)
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(int(largest))
        raise InputError(
            f"{place} has the token {token!r} ({largest}), but the base model's embedding has {rows} rows: it does not "
            "know this token, or the tokenizer is that of another model"
        )


def is_token(value: object) -> bool:
    """Whether a value is a single token id rather than a text or a sequence of token ids."""
    return isinstance(value, Integral) or (isinstance(value, Tensor) and value.dim() == 0)


def encode_context(tokenizer: PreTrainedTokenizerBase | None, context: str | Sequence[int], first: bool) -> list[int]:
    """Token ids of a piece of context; text gets opening tokens (BOS) only at the start of the context.

    Raises:
        InputError: the context is empty or not a sequence of token ids, or it is a text and there is no tokenizer.
    """
    if isinstance(context, str):
        if tokenizer is None:
            raise InputError("tokenizer is needed to turn text into tokens; pass one to GenerativeAdapter")
        if not context.strip():
            raise InputError("the context must have at least one token, but it is empty")
        return encode_text(tokenizer, context, first)
    try:
        tokens = [int(token) for token in context]
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"a context must be a text or a sequence of token ids, but it is {context!r:.60}") from error
    if not tokens:
        raise InputError("the context must have at least one token, but it is empty")
    return tokens
