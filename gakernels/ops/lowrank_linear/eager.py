"""`lowrank_linear` in plain PyTorch: the base GEMM, then two thin batched GEMMs added into its output.

Saved for the backward: x only when lora_a needs a gradient (dA = dz^T x), z = x A^T (M r a window) only when lora_b
does. The frozen weight has no gradient, so nothing is saved for one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gakernels.ops import autocast


def sizes(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float = 1.0,
    adapter_index: Tensor | None = None,
    bias: Tensor | None = None,
) -> dict[str, int]:
    """What the speed of a call depends on."""
    windows, tokens, in_features = x.shape
    sizes = {"batch": windows, "tokens": tokens, "in": in_features, "out": weight.shape[0]}
    return {**sizes, "rank": lora_a.shape[1]}


@autocast.without
def forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    adapter_index: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Returns y (windows, M, d_out) and the shrunk input z = x A^T (windows, M, r)."""
    # In three dimensions F.linear with a bias returns a view, and PyTorch would let nobody change y in place.
    y = torch.ops.aten._unsafe_view(F.linear(x.flatten(0, 1), weight, bias), [*x.shape[:2], weight.shape[0]])
    return with_term(y, x, lora_a, lora_b, scale, adapter_index, in_place=True)


@autocast.without
def with_term(
    y: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    adapter_index: Tensor | None,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """y with the low-rank term of x added, and z."""
    z = x @ select(lora_a, adapter_index).mT
    add = y.baddbmm_ if in_place else y.baddbmm
    return add(z, select(lora_b, adapter_index).mT, alpha=scale), z


@autocast.without
def backward(
    grad_y: Tensor,
    x: Tensor | None,
    z: Tensor | None,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    adapter_index: Tensor | None,
    needs_x: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, lora_a, lora_b; without a weight, of the low-rank term alone (`with_term`).

    With dz = scale dy B: dx = dy W + dz A, dA_i = sum dz^T x, dB_i = scale sum dy^T z over the windows of adapter i.
    """
    grad_z, grad_a, grad_b = thin_gradients(grad_y, x, z, lora_a, lora_b, scale, adapter_index, needs_x)
    grad_x = None
    if needs_x and grad_z is not None:
        a = select(lora_a, adapter_index)
        grad_x = grad_z @ a if weight is None else (grad_y @ weight).baddbmm_(grad_z, a)
    return grad_x, grad_a, grad_b


def thin_gradients(
    grad_y: Tensor,
    x: Tensor | None,
    z: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    adapter_index: Tensor | None,
    needs_x: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dz, if something needs it, and the gradients of lora_a and lora_b."""
    grad_z = scale * (grad_y @ select(lora_b, adapter_index)) if needs_x or x is not None else None
    grad_a = grad_b = None
    if x is not None and grad_z is not None:
        grad_a = gather_windows(grad_z.mT @ x, adapter_index, lora_a.shape[0])
    if z is not None:
        grad_b = gather_windows(scale * (grad_y.mT @ z), adapter_index, lora_b.shape[0])
    return grad_z, grad_a, grad_b


def select(factors: Tensor, adapter_index: Tensor | None) -> Tensor:
    """The factors of each window (windows, ...); zeros where the index is -1, whatever the adapters hold."""
    if adapter_index is None:
        return factors
    chosen = factors.index_select(0, adapter_index.clamp(min=0))
    return chosen.masked_fill_((adapter_index < 0)[:, None, None], 0)


def gather_windows(per_window: Tensor, adapter_index: Tensor | None, adapters: int) -> Tensor:
    """Sum the factor gradients of the windows that share an adapter, in float32 or wider; the opposite of `select`."""
    if adapter_index is None:
        return per_window
    dtype = torch.promote_types(per_window.dtype, torch.float32)
    total = torch.zeros(adapters + 1, *per_window.shape[1:], dtype=dtype, device=per_window.device)
    slot = torch.where(adapter_index < 0, adapters, adapter_index)  # the last slot takes what belongs to no adapter
    return total.index_add(0, slot, per_window.to(dtype))[:adapters].to(per_window.dtype)
