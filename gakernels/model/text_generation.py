"""Continuing texts with transformers' `generate`."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from gakernels.errors import InputError
from gakernels.model.attached_generators import AttachedGenerators
from gakernels.model.encoding import check_tokens, encode_text
from gakernels.model.positions import check_prompt, position_limit
from gakernels.model.windows import pad_left

NEW_TOKENS = 32  # unless the caller sets a number


@torch.no_grad()
def continue_texts(model: AttachedGenerators, prompts: str | Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """See `GenerativeAdapter.generate`."""
    if model.tokenizer is None:
        raise InputError("tokenizer is needed to turn text into tokens; pass one to GenerativeAdapter")
    if options.get("return_dict_in_generate"):
        raise InputError("return_dict_in_generate: texts are returned; for more, call model.base.generate instead")
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"prompts must be one text or several, but they are {prompts!r:.60}")
    with model.tokenizing:
        rows = [encode_text(model.tokenizer, text) for text in texts]
    if not all(rows) or not rows:
        raise InputError("prompts must be at least one prompt, each of at least one token")
    known = model.base.get_input_embeddings().num_embeddings
    for number, row in enumerate(rows, 1):
        check_tokens(model.tokenizer, row, known, f"prompt {number}")
    candidates = (model.tokenizer.pad_token_id, model.tokenizer.eos_token_id)
    padding = next((token for token in candidates if token is not None and token < known), 0)
    ids, mask = (tensor.to(model.device) for tensor in pad_left(rows, padding))
    settings = {"do_sample": False, **_length(model, ids.shape[1], options), **options}
    defaults = GenerationConfig(eos_token_id=list(end_tokens(model)) or None, pad_token_id=padding)
    with model.weights.in_use(merged=True):
        output = _with_defaults(model.base, defaults).generate(input_ids=ids, attention_mask=mask, **settings)
    with model.tokenizing:
        texts = model.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def end_tokens(model: AttachedGenerators) -> tuple[int, ...]:
    """The ids that end a text: those of the base model's generation settings, and the tokenizer's."""
    configured = getattr(model.base.generation_config, "eos_token_id", None)
    several = configured if isinstance(configured, list) else [configured]
    if model.tokenizer is not None:
        several = [*several, model.tokenizer.eos_token_id]
    return tuple(sorted({int(token) for token in several if token is not None}))


def _length(model: AttachedGenerators, prompt: int, options: Mapping[str, Any]) -> dict[str, int]:
    """The length option to use if the options set none. Raises: InputError: it exceeds the positions."""
    limit, given = position_limit(model.base.config), dict(options)
    config = given.get("generation_config")
    for name in ("max_new_tokens", "max_length"):
        given.setdefault(name, getattr(config, name, None))
    new_tokens, length = given["max_new_tokens"], given["max_length"]
    if new_tokens is None and length is None:
        room = NEW_TOKENS if limit is None else min(NEW_TOKENS, limit - prompt)
        check_prompt(limit, prompt, max(room, 1))
        return {"max_new_tokens": room}
    if new_tokens is None and length <= prompt:
        raise InputError(f"max_length must be above the {prompt} tokens of the prompt, but it is {length}")
    check_prompt(limit, prompt, length - prompt if new_tokens is None else new_tokens)
    return {}


def _with_defaults(base: PreTrainedModel, defaults: GenerationConfig) -> Any:
    """A view of a model with other generation settings: transformers fills in what a caller leaves open from those of
    the model, and changing them on the model itself would change them for everybody."""
    view = object.__new__(type(base))
    view.__dict__.update({**vars(base), "generation_config": defaults})
    return view
