"""quantize_base: quantise the linear layers in the decoder layers of a loaded base model to 8 or 4 bits."""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from gakernels.errors import InputError, check_known
from gakernels.model.attachment import decoder_layers
from gakernels.model.base_model import remember_fingerprint
from gakernels.nn import AdaptedLinear
from gakernels.nn.adapted_opaque_linear import is_plain_linear
from gakernels.nn.bitsandbytes_linear import check_bitsandbytes, int8_linear, nf4_linear
from gakernels.nn.float8_linear import Float8Linear, check_linear

Check = Callable[[nn.Linear], None]
Make = Callable[[nn.Linear], nn.Module]
_KINDS: dict[str, tuple[Check, Make]] = {
    "fp8": (check_linear, Float8Linear),
    "int8": (check_bitsandbytes, int8_linear),
    "nf4": (check_bitsandbytes, nf4_linear),
}
QUANTIZATIONS = tuple(_KINDS)


def quantize_base(base: PreTrainedModel, kind: str) -> PreTrainedModel:
    """Quantise the linear layers of all decoder layers in place; embedding, head, norms and all else stay.

    The model keeps its fingerprint: a generator or adapter made for it in full precision also fits it in fewer bits,
    and vice versa. Cast the model before this, not after; then pass it to `GenerativeAdapter`.

    Args:
        base: a decoder-only transformers model without generators, in float32, bfloat16 or float16.
        kind: `fp8` (`Float8Linear`), or with bitsandbytes `int8` or `nf4` (4 bits).

    Returns:
        The same model.

    Raises:
        InputError: the kind is unknown, the model carries generators, or a layer can't be quantised.
        BackendError: the device does not support such products, or bitsandbytes is missing. The model is unchanged.
    """
    check_known("kind", kind, QUANTIZATIONS)
    if any(isinstance(module, AdaptedLinear) for module in base.modules()):
        raise InputError("base carries generators already; quantise it before it is passed to GenerativeAdapter")
    parents = [parent for layer in decoder_layers(base)[1] for parent in layer.modules()]
    places: list[tuple[nn.Module, str, Any]] = [
        (parent, name, part) for parent in parents for name, part in parent.named_children() if is_plain_linear(part)
    ]
    if not places:
        raise InputError("base must have plain linear layers in its decoder layers; this one is quantised already")
    check, make = _KINDS[kind]
    for *_, linear in places:
        check(linear)
    remember_fingerprint(base, decoder_layers(base)[0])
    for parent, name, linear in places:
        setattr(parent, name, make(linear))
    return base
