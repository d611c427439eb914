"""The position limit of a base model, and the checks that follow from it, in one place.

A context chunk, a window, and a prompt with its continuation must fit; each of them starts at position 0.
"""

from typing import Any

from gakernels.errors import InputError

_STRETCHED = ("linear", "dynamic", "yarn")  # kinds of rope scaling whose factor max_position_embeddings may leave out


def position_limit(config: Any) -> int | None:
    """The positions of a base model with this transformers configuration; None where there is no limit.

    That is `max_position_embeddings`. If rope is scaled by a factor that this number does not include, it is the factor
    times the original positions. A sliding window does not count: it limits what a token sees, not its position.
    Models without position embeddings (ALiBi, recurrent ones) have no limit.
    """
    config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1 or getattr(config, "alibi", False):
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in _STRETCHED and rope.get("factor"):
        original = rope.get("original_max_position_embeddings") or limit
        return max(limit, int(original * rope["factor"]))
    return limit


def check_chunk_size(config: Any, chunk_size: int) -> None:
    """Raises: InputError: the base model has fewer positions than a context chunk has tokens."""
    limit = position_limit(config)
    if limit is not None and chunk_size > limit:
        raise InputError(f"chunk_size must be at most the {limit} positions of the base model, but it is {chunk_size}")


def check_prompt(limit: int | None, prompt: int, new_tokens: int) -> None:
    """Raises: InputError: the prompt's tokens and its continuation exceed the positions of the base model."""
    if limit is not None and prompt + new_tokens > limit:
        raise InputError(
            f"the model reads {limit} tokens, but the prompt has {prompt} and max_new_tokens is {new_tokens}"
        )
