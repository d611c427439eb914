"""Making adapters, plain and compact, from context states; and checking that an adapter fits a model."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gakernels.adapters.adapter import Adapter
from gakernels.adapters.compact import CompactAdapter
from gakernels.adapters.quantized_compact import QuantizedCompactAdapter
from gakernels.errors import FormatError, InputError
from gakernels.model.attached_generators import AttachedGenerators

AnyAdapter = Adapter | CompactAdapter | QuantizedCompactAdapter


@torch.no_grad()
def make_adapters(model: AttachedGenerators, states: Mapping[str, Tensor], tokens_seen: Sequence[int]) -> list[Adapter]:
    """See `GenerativeAdapter.adapters`."""
    factors = {name: model.generator(name).factors(states[name]) for name in model.adapted_names}
    description = {**_description(model), "generator_fingerprint": model.generator_fingerprint()}
    return [
        Adapter(
            # Copies, so that keeping one adapter does not keep the memory of all.
            lora_a={name: pair[0][row].clone() for name, pair in factors.items()},
            lora_b={name: pair[1][row].clone() for name, pair in factors.items()},
            tokens_seen=tokens,
            **description,
        )
        for row, tokens in enumerate(tokens_seen)
    ]


@torch.no_grad()
def make_compact_adapters(
    model: AttachedGenerators, states: Mapping[str, Tensor], tokens_seen: Sequence[int], dtype: torch.dtype | None
) -> list[CompactAdapter]:
    """See `GenerativeAdapter.compact_adapters`."""
    if model.config.norm == "frobenius":
        raise InputError('norm="frobenius" has no compact form: its factors are not smaller than the state itself')
    factors = {name: model.generator(name).norm_factors(states[name]) for name in model.adapted_names}
    left, right = (
        {name: pair[side].to(dtype or pair[side].dtype) for name, pair in factors.items()} for side in (0, 1)
    )
    fingerprint = model.generator_fingerprint()
    return [
        CompactAdapter(
            # Copies, so that keeping one does not keep the memory of all.
            left={name: factor[row].clone() for name, factor in left.items()},
            right={name: factor[row].clone() for name, factor in right.items()},
            base_fingerprint=model.base_fingerprint(),
            generator_fingerprint=fingerprint,
            tokens_seen=tokens,
        )
        for row, tokens in enumerate(tokens_seen)
    ]


@torch.no_grad()
def expand(model: AttachedGenerators, compact: CompactAdapter) -> Adapter:
    """See `GenerativeAdapter.expand`."""
    _check_compact(model, compact)
    factors = {}
    for name in model.adapted_names:
        generator = model.generator(name)
        left, right = (factor[name].to(generator.sketch.device) for factor in (compact.left, compact.right))
        factors[name] = generator.expand(left, right)
    return Adapter(
        lora_a={name: pair[0] for name, pair in factors.items()},
        lora_b={name: pair[1] for name, pair in factors.items()},
        generator_fingerprint=compact.generator_fingerprint,
        tokens_seen=compact.tokens_seen,
        **_description(model),
    )


def expanded(model: AttachedGenerators, adapter: AnyAdapter) -> Adapter:
    """Turn an adapter of any form into a plain one, and check that it fits the model.

    Raises:
        InputError: it is not an adapter.
        FormatError: it was made for another base model or for other layers; or it is compact and was made by another
            generator.
    """
    if isinstance(adapter, QuantizedCompactAdapter):
        adapter = adapter.dequantize()
    if isinstance(adapter, CompactAdapter):
        adapter = expand(model, adapter)
    if not isinstance(adapter, Adapter):
        raise InputError(
            f"adapters must be Adapter objects, as adapt() and Adapter.load(path) give, but one is {adapter!r:.60}"
        )
    _check_adapter(model, adapter)
    return adapter


def _description(model: AttachedGenerators) -> dict[str, Any]:
    """The attributes of an adapter that depend only on the model."""
    return {
        "scale": model.config.adapter_scale,
        "base_fingerprint": model.base_fingerprint(),
        "base_name": model.base.config.name_or_path,
        "target_modules": model.target_modules,
        "base_config": model.base_config,
    }


def _check_compact(model: AttachedGenerators, compact: CompactAdapter) -> None:
    for what, found, own in (
        ("base model", compact.base_fingerprint, model.base_fingerprints()),
        ("generator", compact.generator_fingerprint, (model.generator_fingerprint(),)),
    ):
        if found not in own:
            raise FormatError(
                f"the compact adapter belongs to a {what} with fingerprint {found}, but this one has {own[0]}"
            )
    size = (model.config.state_size, compact.rank)
    if any(set(side) != set(model.adapted_names) for side in (compact.left, compact.right)) or any(
        factor.shape != size for factor in [*compact.left.values(), *compact.right.values()]
    ):
        raise FormatError("the compact adapter is of other linear layers or another size than this generator")


def _check_adapter(model: AttachedGenerators, adapter: Adapter) -> None:
    if adapter.base_fingerprint not in model.base_fingerprints():
        raise FormatError(
            f"adapter belongs to a base model with fingerprint {adapter.base_fingerprint} "
            f"({adapter.base_name or 'no name'}), but this base model has {model.base_fingerprint()}"
        )
    if set(adapter.lora_a) != set(model.adapted_names):
        raise FormatError("adapter adapts other linear layers than this generator")
    linears = model.linears()
    for name, lora_a in adapter.lora_a.items():
        sizes = (linears[name].out_features, linears[name].in_features)
        if (adapter.lora_b[name].shape[0], lora_a.shape[1]) != sizes:
            raise FormatError(f"adapter does not have the sizes of {name}, {sizes}")
