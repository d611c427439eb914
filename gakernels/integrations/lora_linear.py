"""PEFT's LoRA linear layer on `lowrank_linear`, and the rule for which of its forward passes can run there."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gakernels.ops import lowrank_linear
from gakernels.ops.checks import FLOATING

_BASE_OF_ROW = "__base__"  # PEFT's name for a row of a mixed batch without an adapter
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class LowRankLoraLinear(Linear):
    """PEFT's `lora.Linear` with one call of `lowrank_linear` for the base product and all adapters of a forward pass.

    `use_lowrank_linear` turns a `lora.Linear` into this class and `restore` turns it back. Only `forward` differs, and
    it stores nothing between calls: adapters may be added, switched, scaled, merged and disabled as before.

    Factors are cast to the dtype of the base weight; PEFT casts the input to the dtype of the factors.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y (..., d_out) of x (..., d_in), with the active adapters or, given `adapter_names`, one adapter per row.

        Runs PEFT's own forward if there is nothing low-rank to add and, with a warning, if
        `layer_reason`, `adapter_reason` or dropout rules out the operation.
        """
        self._check_forward_args(x, *args, **kwargs)  # type: ignore[no-untyped-call]
        rows: list[str] | None = kwargs.get("adapter_names")
        adapters = _present(self, self.active_adapters if rows is None else dict.fromkeys(rows))
        plain = self.disable_adapters or self.merged or not adapters
        if plain or args or kwargs.keys() - {"adapter_names", "alora_offsets"}:
            return super().forward(x, *args, **kwargs)
        reason = _reason_now(self, adapters)
        if reason is not None:
            _warn(reason)
            return super().forward(x, *args, **kwargs)
        return _shared(self, x, adapters) if rows is None else _per_row(self, x, adapters, rows)


def layer_reason(layer: Any) -> str | None:
    """Why no adapter of this layer can run on `lowrank_linear`; None if the layer allows it."""
    if type(layer) not in (Linear, LowRankLoraLinear):
        return f"the layer is a peft {type(layer).__name__}, not peft's lora.Linear for nn.Linear and Conv1D"
    if "forward" in vars(layer):
        return "the layer has a forward of its own"
    reason = _submodule_reason("its base layer", layer.base_layer, (nn.Linear, Conv1D))
    if reason is None and layer.base_layer.weight.requires_grad:
        reason = "its base weight is trainable"
    if reason is None and not layer.cast_input_dtype_enabled:
        reason = "casting of its input is disabled"
    return reason


def adapter_reason(layer: Any, adapter: str) -> str | None:
    """Why one adapter of a layer can't run on `lowrank_linear` in any mode; None if it can, apart from dropout."""
    if adapter in layer.lora_variant:
        return f"adapter {adapter!r} is not a plain LoRA but a {type(layer.lora_variant[adapter]).__name__}"
    return (
        _submodule_reason(f"lora_A of adapter {adapter!r}", layer.lora_A[adapter], (nn.Linear,))
        or _submodule_reason(f"lora_B of adapter {adapter!r}", layer.lora_B[adapter], (nn.Linear,))
        or _submodule_reason(f"lora_dropout of adapter {adapter!r}", layer.lora_dropout[adapter], _DROPOUTS)
    )


def dropout_reason(layer: Any, adapter: str) -> str | None:
    """Why an adapter can't run on `lowrank_linear` in training mode: the operation has one input for both products."""
    dropout = layer.lora_dropout[adapter]
    if isinstance(dropout, nn.Dropout) and dropout.p > 0:
        return f"adapter {adapter!r} has lora_dropout {dropout.p} and is in training mode"
    return None


_DROPOUTS = (nn.Identity, nn.Dropout)


def _submodule_reason(what: str, module: nn.Module, classes: tuple[type[nn.Module], ...]) -> str | None:
    """Why the weight of a submodule can't be used without calling it; None if it can."""
    if type(module) not in classes:
        return f"{what} is a {type(module).__name__}"
    if "forward" in vars(module) or any(getattr(module, hooks) for hooks in _HOOKS):
        return f"{what} has hooks, or a forward of its own"
    weight = getattr(module, "weight", None)  # dropout has none
    if weight is not None and (type(weight) not in (Tensor, nn.Parameter) or weight.dtype not in FLOATING):
        return f"{what} has a weight of type {type(weight).__name__}, {weight.dtype}"
    return None


def _present(layer: Any, adapters: Iterable[str]) -> list[str]:
    """The adapters that this layer has."""
    return [adapter for adapter in adapters if adapter != _BASE_OF_ROW and adapter in layer.lora_A]


def _reason_now(layer: Any, adapters: Sequence[str]) -> str | None:
    """Why a forward pass with these adapters can't run on `lowrank_linear` in the layer's current state."""
    reason = layer_reason(layer)
    for adapter in adapters:
        reason = reason or adapter_reason(layer, adapter)
        if layer.lora_dropout[adapter].training:
            reason = reason or dropout_reason(layer, adapter)
    return reason


def _warn(reason: str) -> None:
    if not torch.compiler.is_compiling():  # a warning would break the graph
        warnings.warn(f"a LoRA layer runs PEFT's own forward instead of lowrank_linear: {reason}", stacklevel=3)


def _shared(layer: Any, x: Tensor, adapters: Sequence[str]) -> Tensor:
    """The same adapters for all tokens: a single window with all tokens, and one adapter with concatenated ranks."""
    if len(adapters) == 1:
        lora_a, lora_b = layer.lora_A[adapters[0]].weight, layer.lora_B[adapters[0]].weight
        scale = float(layer.scaling[adapters[0]])
    else:
        a, b = zip(*(_scaled_factors(layer, adapter) for adapter in adapters), strict=True)
        lora_a, lora_b, scale = torch.cat(a), torch.cat(b, dim=1), 1.0
    biases = [_scaled_bias(layer, adapter) for adapter in _biased(layer, adapters)]
    y = _linear(layer, x.reshape(1, -1, x.shape[-1]), lora_a[None], lora_b[None], scale, None, biases)
    return y.view(*x.shape[:-1], y.shape[-1])


def _per_row(layer: Any, x: Tensor, adapters: Sequence[str], rows: Sequence[str]) -> Tensor:
    """An adapter for each row of the batch: a window per row, smaller ranks padded with zeros."""
    a, b = zip(*(_scaled_factors(layer, adapter) for adapter in adapters), strict=True)
    rank = max(factor.shape[0] for factor in a)
    lora_a = torch.stack([F.pad(factor, (0, 0, 0, rank - factor.shape[0])) for factor in a])
    lora_b = torch.stack([F.pad(factor, (0, rank - factor.shape[1])) for factor in b])
    position = {adapter: i for i, adapter in enumerate(adapters)}
    index = torch.tensor([position.get(adapter, -1) for adapter in rows], device=x.device)
    biases = []
    for adapter in _biased(layer, adapters):
        chosen = (index == position[adapter])[:, None, None]
        biases.append(torch.where(chosen, _scaled_bias(layer, adapter), 0))
    y = _linear(layer, x.reshape(x.shape[0], -1, x.shape[-1]), lora_a, lora_b, 1.0, index, biases)
    return y.view(*x.shape[:-1], y.shape[-1])


def _scaled_factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """lora_A (r, d_in) and scaling * lora_B (d_out, r) of one adapter, in the dtype of the base weight."""
    dtype = layer.base_layer.weight.dtype
    lora_a, lora_b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight * layer.scaling[adapter]
    return lora_a.to(dtype), lora_b.to(dtype)


def _biased(layer: Any, adapters: Sequence[str]) -> list[str]:
    """The adapters with `lora_bias`."""
    return [adapter for adapter in adapters if layer.lora_B[adapter].bias is not None]


def _scaled_bias(layer: Any, adapter: str) -> Tensor:
    return layer.lora_B[adapter].bias * layer.scaling[adapter]


def _linear(
    layer: Any,
    windows: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    index: Tensor | None,
    biases: list[Tensor],
) -> Tensor:
    """The operation on the base layer; biases for which it has no gradient are added to its output."""
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    if isinstance(layer.base_layer, Conv1D):
        weight = weight.mT  # it is stored as (d_in, d_out)
    if bias is not None and bias.requires_grad:
        biases = [bias, *biases]
        bias = None
    y = lowrank_linear(windows, weight, lora_a.to(weight.dtype), lora_b.to(weight.dtype), scale, index, bias)
    for added in biases:
        y = y + added.to(y.dtype)
    return y
