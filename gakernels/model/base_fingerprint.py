"""The fingerprint of a base model: which one a file belongs to."""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gakernels.errors import InputError
from gakernels.nn.offloading import offloaded_weight

_REMEMBERED = "_gakernels_fingerprint"
_SAMPLES = 256
_TINY = 2.0**-16  # below it, float16 holds fewer bits than bfloat16


def model_fingerprint(model: nn.Module, under: str = "") -> str:
    """Fingerprint of a base model: names and shapes of all parameters, and evenly spaced values of each.

    Values are compared after rounding to bfloat16, tiny ones as zero, so a model loaded in float32 or in bfloat16 has
    the same one, and also in float16 where its files hold bfloat16 numbers. Reading a sample of each tensor keeps it
    to a moment for a model of any size. A model that was quantised here has the one from before.

    Args:
        model: the base model; weights that accelerate has offloaded are read from where they are.
        under: of the parameters of the module of this name alone.
    """
    remembered: dict[str, str] = getattr(model, _REMEMBERED, {})
    if under in remembered:
        return remembered[under]
    digest = hashlib.sha256()
    named = ((name, value) for name, value in _parameters(model) if not under or name.startswith(f"{under}."))
    tensors = [part for name, value in named for part in _tensors(name, value)]
    for name, parameter in sorted(tensors, key=lambda item: item[0]):
        flat = parameter.reshape(-1)
        count = min(_SAMPLES, flat.numel())
        positions = torch.linspace(0, flat.numel() - 1, count, dtype=torch.float64).long().to(flat.device)
        values = flat[positions].bfloat16()
        values = torch.where(values.abs() < _TINY, torch.zeros_like(values), values)
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(values.cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters with their names, each once, with the values that a forward pass computes with."""
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        path, _, attribute = name.rpartition(".")
        value = offloaded_weight(modules[path], attribute) if parameter.is_meta else parameter.detach()
        if value is None:
            raise InputError(f"base must have values for all of its parameters, but {name} is on the device meta")
        yield name, value


def _tensors(name: str, parameter: Tensor) -> list[tuple[str, Tensor]]:
    """A parameter with its name; of one that other libraries pack numbers into, the tensors inside."""
    if type(parameter).__module__.partition(".")[0] == "torch" or not hasattr(parameter, "__tensor_flatten__"):
        return [(name, parameter)]
    inside, _ = parameter.__tensor_flatten__()
    return [part for key in inside for part in _tensors(f"{name}.{key}", getattr(parameter, key))]


def remember_fingerprint(model: nn.Module, *under: str) -> None:
    """Have `model_fingerprint` give the present fingerprints from now on, whatever becomes of the parameters: of the
    whole model, and of the modules of these names."""
    setattr(model, _REMEMBERED, {name: model_fingerprint(model, name) for name in ("", *under)})
