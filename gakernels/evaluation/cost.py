"""The cost of a context with each method: operations to read it, operations per question, numbers to store.

All from shapes: `flops` has the formulas; docs/evaluation.md says what they count and how the paper's differ.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gakernels.cost import flops
from gakernels.cost.flops import Flops
from gakernels.cost.shapes import ModelShape
from gakernels.errors import InputError, check_known, check_least
from gakernels.model.config import GeneratorConfig

TOKEN_ID_BYTES, STATE_BYTES = 4, 4


@dataclass(frozen=True)
class CostSettings:
    """What is asked and how, apart from the length of the context.

    Attributes:
        prompt_tokens: tokens of a question with its instruction, without the context.
        new_tokens: tokens of the answer.
        retrieved_tokens: tokens of the passage that retrieval puts before the question: 100 words, at 4 tokens for
            3 words.
        epochs: of fine-tuning on the context; 8 is the paper's number for continual pretraining (appendix C).
        number_bytes: of a stored weight, factor, key or value; 2 for bfloat16. Token ids and states take 4.

    Raises:
        InputError: a value is below 1.
    """

    prompt_tokens: int = 51
    new_tokens: int = 20
    retrieved_tokens: int = 134
    epochs: int = 8
    number_bytes: int = 2

    def __post_init__(self) -> None:
        check_least(1, **vars(self))


@dataclass(frozen=True)
class Storage:
    """What is stored for a context in addition to the base model: how many numbers of which kind, and their bytes."""

    kind: str
    numbers: int
    bytes: int


@dataclass(frozen=True)
class MethodCost:
    """Cost of one method.

    Attributes:
        method: key of COUNTED_METHODS.
        contextualization: operations, once per context.
        query: operations of one question and its answer.
        storage: what is kept between questions.
    """

    method: str
    contextualization: Flops
    query: Flops
    storage: Storage

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "method": self.method,
            "contextualization_flops": self.contextualization.to_dict(),
            "query_flops": self.query.to_dict(),
            "storage": vars(self.storage),
        }


COUNTED_METHODS = {
    "closed_book": "no context at all",
    "prompt": "context read again with every question",
    "prompt_cached": "context read once, its keys and values kept",
    "retrieval": "best passage of the context (BM25) read with every question",
    "adapter": "generated adapter, not merged into the weights",
    "adapter_merged": "generated adapter added to the weights",
    "adapter_compact": "generated adapter kept as U and V",
    "adapter_retrieval": "generated adapter, not merged, and the best passage read with every question",
    "static_lora": "one trained LoRA for all contexts: nothing is kept of this one",
    "lora_tuning": "LoRA of the same layers and rank trained on the context",
    "full_tuning": "all weights trained on the context",
}


def method_cost(
    method: str, shape: ModelShape, config: GeneratorConfig, context: int, settings: CostSettings | None = None
) -> MethodCost:
    """The cost of one method for a context of so many tokens.

    A tuned model is trained on the even chunks of the context, as separate sequences; what a method's training on
    other data costs, once for all contexts, is not included. A merged adapter
    is stored as factors; while it is merged, `GenerativeAdapter.merge` also keeps the original weights of the layers.

    Args:
        method: key of COUNTED_METHODS.
        shape: of the base model.
        config: of the generator; the trained LoRA has its layers and rank.
        context: tokens, at least 1.
        settings: the question and other sizes.

    Raises:
        InputError: there is no such method, the context has no token, the generator's layers are not in the model, or
            the generator's norm is `frobenius`, which has no compact form.
    """
    settings = settings or CostSettings()
    check_known("method", method, COUNTED_METHODS)
    if context < 1:
        raise InputError(f"context must be at least 1 token, but it is {context}")
    contextualization = _contextualization(method, shape, config, context, settings)
    query = _query(method, shape, config, context, settings)
    return MethodCost(method, contextualization, query, _storage(method, shape, config, context, settings))


def all_costs(
    shape: ModelShape, config: GeneratorConfig, contexts: Iterable[int], settings: CostSettings | None = None
) -> dict[int, list[MethodCost]]:
    """The costs of all methods that the generator has, by length of the context. Raises: as `method_cost`."""
    methods = [method for method in COUNTED_METHODS if method != "adapter_compact" or config.norm != "frobenius"]
    return {context: [method_cost(name, shape, config, context, settings) for name in methods] for context in contexts}


def _contextualization(
    method: str, shape: ModelShape, config: GeneratorConfig, context: int, settings: CostSettings
) -> Flops:
    if method == "prompt_cached":
        return flops.decoder(shape, context)
    if method in ("lora_tuning", "full_tuning"):
        sequences, length = flops.even_chunks(context, config.chunk_size)
        if method == "full_tuning":
            return flops.full_training_pass(shape, length) * (sequences * settings.epochs)
        return flops.lora_training_pass(shape, config, length) * (sequences * settings.epochs)
    if not method.startswith("adapter"):
        return Flops()  # what training a static LoRA cost, once for all contexts, is not included
    normed = flops.context_states(shape, config, context) + flops.norm(shape, config)
    if method == "adapter_compact":
        return normed
    factors = normed + flops.expansion(shape, config)
    return factors + flops.merging(shape, config) if method == "adapter_merged" else factors


def _query(method: str, shape: ModelShape, config: GeneratorConfig, context: int, settings: CostSettings) -> Flops:
    prompt, new = settings.prompt_tokens, settings.new_tokens
    read = prompt + new - 1
    if method == "prompt":
        return flops.generation(shape, context + prompt, new)
    if method == "prompt_cached":
        return flops.generation(shape, prompt, new, before=context)
    if method == "retrieval":
        return flops.generation(shape, min(settings.retrieved_tokens, context) + prompt, new)
    if method == "adapter_retrieval":
        found = min(settings.retrieved_tokens, context)
        return flops.generation(shape, found + prompt, new) + flops.low_rank_products(shape, config, found + read)
    closed_book = flops.generation(shape, prompt, new)
    if method in ("adapter", "lora_tuning", "static_lora"):
        return closed_book + flops.low_rank_products(shape, config, read)
    if method == "adapter_compact":
        return closed_book + flops.compact_products(shape, config, read)
    return closed_book


def _storage(method: str, shape: ModelShape, config: GeneratorConfig, context: int, settings: CostSettings) -> Storage:
    if method in ("closed_book", "static_lora"):
        return Storage("nothing", 0, 0)
    if method == "adapter_retrieval":
        numbers, kept = adapter_numbers(shape, config), TOKEN_ID_BYTES * context
        return Storage("factors and token ids", numbers + context, settings.number_bytes * numbers + kept)
    if method in ("prompt", "retrieval"):
        return Storage("token ids", context, TOKEN_ID_BYTES * context)
    if method == "prompt_cached":
        kind, numbers = "keys and values", key_value_numbers(shape, context)
    elif method == "adapter_compact":
        kind, numbers = "U and V", compact_numbers(shape, config)
    elif method == "full_tuning":
        kind, numbers = "all weights", shape.parameters
    else:
        kind, numbers = "factors", adapter_numbers(shape, config)
    return Storage(kind, numbers, settings.number_bytes * numbers)


def adapter_numbers(shape: ModelShape, config: GeneratorConfig) -> int:
    """Numbers in lora_A and lora_B of all adapted linear layers: r (d_in + d_out) each."""
    each = sum(linear.inputs + linear.outputs for linear in flops.adapted_linears(shape, config))
    return len(flops.adapted_layers(shape, config)) * flops.adapter_rank(config) * each


def compact_numbers(shape: ModelShape, config: GeneratorConfig) -> int:
    """Numbers in U and V of all adapted linear layers: 2 d_r r each.

    Raises:
        InputError: the generator's norm is `frobenius`, whose factors are not smaller than the state.
    """
    if config.norm == "frobenius":
        raise InputError('norm="frobenius" has no compact form: its factors are not smaller than the state itself')
    sites = len(flops.adapted_layers(shape, config)) * len(flops.adapted_linears(shape, config))
    return 2 * sites * config.state_size * config.rank


def stream_state(shape: ModelShape, config: GeneratorConfig) -> Storage:
    """What a context needs to be extended later, whatever its length: S_t of all adapted layers, d_r^2 each."""
    sites = len(flops.adapted_layers(shape, config)) * len(flops.adapted_linears(shape, config))
    numbers = sites * config.state_size**2
    return Storage("states", numbers, STATE_BYTES * numbers)


def key_value_numbers(shape: ModelShape, tokens: int) -> int:
    """Numbers in the key-value cache of so many tokens; a sliding window keeps only what the next token sees."""
    kept = sum(tokens if window is None else min(tokens, window - 1) for window in shape.windows)
    return 2 * shape.kv_heads * shape.head_dim * kept
