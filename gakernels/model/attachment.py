"""Where generators attach: the decoder layers of a transformers model and the linear layers inside them."""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from gakernels.errors import InputError
from gakernels.nn import AdaptedLinear, FrozenRMSNorm, GatedMLP
from gakernels.nn.adapted_linear import has_hooks
from gakernels.nn.adapted_opaque_linear import is_linear

# Wrappers that compute the same as their module, and the attribute that holds it: compiled, replicated, recomputed.
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}


@dataclass(frozen=True)
class Site:
    """One linear layer to adapt."""

    name: str  # full name in the base model: "model.layers.0.self_attn.o_proj"
    layer: int  # number of its decoder layer
    parent: nn.Module
    attribute: str

    @property
    def linear(self) -> Any:
        """The layer that is currently there."""
        return getattr(self.parent, self.attribute)

    def replace(self, linear: nn.Module) -> None:
        """Replace the layer by another one."""
        setattr(self.parent, self.attribute, linear)


def unwrapped(base: nn.Module) -> PreTrainedModel:
    """The transformers model itself, not compiled and without wrappers around or inside it, which would change its
    parameter names.

    Raises:
        InputError: it is sharded, contains PEFT adapters, or is not a transformers model.
    """
    base = _content(base)
    for parent in list(base.modules()):
        if parent._compiled_call_impl is not None:
            parent._compiled_call_impl = None
        for name, child in list(parent.named_children()):
            if _content(child) is not child:
                setattr(parent, name, _content(child))
    for name, module in base.named_modules():
        if any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__):
            raise InputError(
                f"base has an adapter of PEFT in it ({name or type(module).__name__}); merge it into the weights "
                "first: peft.AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload()"
            )
        own = module.parameters(recurse=False)
        if isinstance(module, FullyShardedDataParallel) or any(isinstance(tensor, DTensor) for tensor in own):
            raise InputError("base is sharded (FSDP); attach generators first, then use gakernels.training.Shards")
    if not isinstance(base, PreTrainedModel):
        raise InputError(f"base must be a transformers model (PreTrainedModel), but it is a {type(base).__name__}")
    return base


def _content(module: nn.Module) -> nn.Module:
    """The module inside a wrapper; any other module itself."""
    while type(module).__name__ in _WRAPPERS:
        module = getattr(module, _WRAPPERS[type(module).__name__])
    return module


_NOT_CAUSAL = frozenset({"cpmant", "git", "xlm", "xlnet"})  # a token may see later ones, in the prompt at least
_ALWAYS_CAUSAL = frozenset({"gpt_neox", "gpt_neox_japanese"})  # whatever `is_decoder` says


def check_kind(base: PreTrainedModel) -> None:
    """Raises: InputError: the model has an encoder, no attention, or tokens that see later ones."""
    kind, config = type(base).__name__, base.config.get_text_config()
    if base.config.is_encoder_decoder:
        raise InputError(f"base must be a decoder-only transformers model, but {kind} has an encoder too")
    if getattr(config, "num_attention_heads", None) is None:
        raise InputError(f"base must have attention in its layers, but {kind} has none")
    is_encoder = getattr(config, "is_decoder", True) is False and config.model_type not in _ALWAYS_CAUSAL
    if config.model_type in _NOT_CAUSAL or is_encoder:
        raise InputError(f"base must read from left to right, but {kind} with these settings does not")


def decoder_name(base: PreTrainedModel) -> str:
    """The name of the text decoder: the innermost transformers model that holds the embedding of the input.

    That is not another tower of a model of text and images, and has no head. (`get_decoder` may return either.)

    Raises:
        InputError: there is none.
    """
    embedding = base.get_input_embeddings()
    names = [
        name
        for name, module in base.named_modules()
        if isinstance(module, PreTrainedModel) and any(part is embedding for part in module.modules())
    ]
    if not names or names[-1] == "":
        raise InputError(f"base must hold a text decoder without a head, but {type(base).__name__} does not")
    return names[-1]


def decoder_of(base: PreTrainedModel) -> Any:
    """The text decoder of a causal language model; see `decoder_name`."""
    return base.get_submodule(decoder_name(base))


def decoder_layers(base: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The name and the list of the decoder layers of a causal language model.

    Raises:
        InputError: the model has no list of `num_hidden_layers` layers.
    """
    config = base.config.get_text_config()
    count = getattr(config, "num_layers", config.num_hidden_layers)  # LongCat counts each of its double layers as two
    inside = {id(module) for module in decoder_of(base).modules()}
    for name, module in base.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and id(module) in inside:
            return name, module
    raise InputError(f"base must be a decoder-only transformers model; {type(base).__name__} has no {count} layers")


def find_sites(base: PreTrainedModel, linears: tuple[str, ...], layers: tuple[int, ...] | None) -> list[Site]:
    """All linear layers with the given names in the given decoder layers, in the order of the layers.

    Raises:
        InputError: a name or number matches nothing (the message lists what there is), or a layer already carries a
            generator.
    """
    prefix, modules = decoder_layers(base)
    numbers = range(len(modules)) if layers is None else sorted(layers)
    for number in numbers:
        if not 0 <= number < len(modules):
            raise InputError(f"layers must be between 0 and {len(modules) - 1}, but contains {number}")
    there = [(number, name) for number in numbers for name in _linear_names(modules[number])]
    for wanted in linears:
        if not any(_matches(name, wanted) for _, name in there):
            names = ", ".join(dict.fromkeys(name for _, name in there)) or "none"
            raise InputError(f"linears: no linear layer is named {wanted!r}; there are {names}")
    found = [
        Site(f"{prefix}.{number}.{name}", number, *_parent(modules[number], name))
        for number, name in there
        if any(_matches(name, wanted) for wanted in linears)
    ]
    for site in found:
        _check_free(site)
    return found


LEAN_MODULES = (GatedMLP, FrozenRMSNorm)


def put_in_lean_modules(base: PreTrainedModel) -> None:
    """Replace the feed-forward parts and norms that `GatedMLP` and `FrozenRMSNorm` can replace."""
    for parent, name, module in _parts(base):
        lean = next((kind for kind in LEAN_MODULES if kind.can_stand_for(module)), None)
        if lean is not None and not has_hooks(module):
            setattr(parent, name, lean(module).train(module.training))


def take_out_lean_modules(base: PreTrainedModel) -> None:
    """The opposite of `put_in_lean_modules`."""
    for parent, name, module in lean_modules(base):
        setattr(parent, name, module.original)


def lean_modules(base: PreTrainedModel) -> list[tuple[nn.Module, str, GatedMLP | FrozenRMSNorm]]:
    """The lean modules in the model, each with its parent and name."""
    return [
        (parent, name, module) for parent, name, module in _parts(base) if isinstance(module, (GatedMLP, FrozenRMSNorm))
    ]


def _parts(base: PreTrainedModel) -> list[tuple[nn.Module, str, nn.Module]]:
    """The direct submodules of the decoder layers and of the decoder, each with its parent and name."""
    parents = [*decoder_layers(base)[1], decoder_of(base)]
    return [(parent, name, module) for parent in parents for name, module in parent.named_children()]


def target_modules(base: PreTrainedModel, names: Sequence[str]) -> tuple[str, ...]:
    """Names as PEFT's `target_modules` that select exactly the named layers of the base model.

    PEFT selects every module whose name is a listed one, or ends with a dot and a listed one. So the last part of a
    name (`o_proj`) is listed if all layers with it are meant; otherwise the full names are listed.
    """
    targets: list[str] = []
    for last in dict.fromkeys(name.rpartition(".")[2] for name in names):
        meant = [name for name in names if name.rpartition(".")[2] == last]
        selected = [name for name, _ in base.named_modules() if name.rpartition(".")[2] == last]
        targets += [last] if set(meant) == set(selected) else meant
    return tuple(targets)


def describe(base: PreTrainedModel) -> dict[str, Any]:
    """The type and sizes of a base model that adapter formats of other programs depend on."""
    config = base.config.get_text_config()
    heads = config.num_attention_heads
    return {
        "model_type": base.config.model_type,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
    }


def _linear_names(layer: nn.Module) -> list[str]:
    return [name for name, module in layer.named_modules() if is_linear(module)]


def _check_free(site: Site) -> None:
    if isinstance(site.linear, AdaptedLinear):
        raise InputError("base already carries generators; call detach() on the other GenerativeAdapter first")


def _matches(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith("." + wanted)


def _parent(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return module.get_submodule(path), attribute


def cache_name(module: nn.Module) -> str:
    """The name of the cache of a model or decoder, as argument and in its output: it differs between transformers
    versions."""
    return _cache_name(type(module).forward)


@functools.cache
def _cache_name(forward: Callable[..., Any]) -> str:
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"
