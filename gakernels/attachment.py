"""Where generators attach: the decoder layers of a transformers model and the linear layers inside them."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from gakernels.errors import InputError
from gakernels.nn import AdaptedLinear


@dataclass(frozen=True)
class Site:
    """One linear layer to adapt."""

    name: str  # full name in the base model: "model.layers.0.self_attn.o_proj"
    layer: int  # number of its decoder layer
    parent: nn.Module
    attribute: str

    @property
    def linear(self) -> nn.Linear:
        """The layer that is there now."""
        linear: nn.Linear = getattr(self.parent, self.attribute)
        return linear

    def replace(self, linear: nn.Linear) -> None:
        """Put another layer in its place."""
        setattr(self.parent, self.attribute, linear)


def decoder_layers(base: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The decoder layers of a causal language model and their name.

    Raises:
        InputError: the model has no list of `num_hidden_layers` layers.
    """
    count = base.config.get_text_config().num_hidden_layers
    for name, module in base.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise InputError(f"base must be a decoder-only transformers model; {type(base).__name__} has no {count} layers")


def find_sites(base: PreTrainedModel, linears: tuple[str, ...], layers: tuple[int, ...] | None) -> list[Site]:
    """All linear layers with the given names in the given decoder layers, in the order of the layers.

    Raises:
        InputError: a name or number fits nothing; the message lists what there is.
    """
    prefix, modules = decoder_layers(base)
    numbers = range(len(modules)) if layers is None else layers
    for number in numbers:
        if not 0 <= number < len(modules):
            raise InputError(f"layers must be between 0 and {len(modules) - 1}, but contains {number}")
    found = [
        Site(f"{prefix}.{number}.{name}", number, *_parent(modules[number], name))
        for number in numbers
        for name, module in modules[number].named_modules()
        if isinstance(module, nn.Linear) and any(_matches(name, wanted) for wanted in linears)
    ]
    for wanted in linears:
        if not any(_matches(site.name, wanted) for site in found):
            there = sorted({name for name, module in modules[0].named_modules() if isinstance(module, nn.Linear)})
            raise InputError(f"linears: no linear layer is named {wanted!r}; there are {', '.join(there) or 'none'}")
    if any(isinstance(site.linear, AdaptedLinear) for site in found):
        raise InputError("base already carries generators; call detach() on the other GenerativeAdapter first")
    return found


def _matches(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith("." + wanted)


def _parent(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return module.get_submodule(path), attribute
