"""FrozenRMSNorm: the RMSNorm of Llama-like layers around a frozen weight, with less memory and fewer passes."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gakernels.ops import autocast

NARROW = (torch.float32, torch.bfloat16, torch.float16)


class FrozenRMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps), with the weight of another module of this kind.

    If a gradient flows through it, the graph keeps x and one number per token, and the values equal that module's up to
    the rounding of the mean. Otherwise that module computes.
    """

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.weight: nn.Parameter = original.weight
        self._original = (original,)  # in a tuple: not a submodule

    @property
    def original(self) -> Any:
        """The module that this one replaces, with this module's current weight."""
        (original,) = self._original
        original.weight = self.weight
        return original

    @classmethod
    def can_stand_for(cls, module: Any) -> bool:
        """Whether a module has these parts and computes this: tested on some random tokens."""
        names = [name for name, _ in module.named_parameters()]
        if names != ["weight"] or list(module.children()) or not hasattr(module, "variance_epsilon"):
            return False
        weight = module.weight
        if weight.dim() != 1 or weight.is_meta or weight.dtype not in NARROW:
            return False
        values = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0), device="cpu")
        x = values.to(weight.device, weight.dtype)
        with torch.no_grad():
            ours = rms_norm(x, weight, module.variance_epsilon)
            theirs = module(x)
        return ours.dtype == theirs.dtype and torch.allclose(ours, theirs, rtol=8 * torch.finfo(x.dtype).eps, atol=0)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_h) -> (..., d_h)."""
        original = self.original
        if torch.is_grad_enabled() and x.requires_grad and x.dtype == self.weight.dtype and x.dtype in NARROW:
            return rms_norm(x, self.weight, original.variance_epsilon)
        y: Tensor = original(x)
        return y


@autocast.without  # which would take the mean in the low precision
def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) for a frozen weight, or none; x is float32 or narrower.

    The graph keeps x and one number per token.
    """
    if x.is_cuda:  # one kernel, which keeps the same; elsewhere PyTorch takes it apart and keeps more
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    y: Tensor = _NormFunction.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return y


class _NormFunction(torch.autograd.Function):
    """The mean and the division in float32, the product with the weight in the dtype of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        wide = x.float()
        mean = torch.linalg.vecdot(wide, wide)[..., None] / x.shape[-1]
        reciprocal = (mean + eps).rsqrt()
        ctx.save_for_backward(x, weight, reciprocal)
        y = autocast.to_dtype(wide * reciprocal, x.dtype)
        return y if weight is None else y * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight, reciprocal = ctx.saved_tensors
        wide = x.float()
        inner = (grad if weight is None else grad * weight).float() * reciprocal
        along = torch.linalg.vecdot(inner, wide)[..., None] * reciprocal.square() / -x.shape[-1]
        return torch.addcmul(inner, wide, along).to(x.dtype), None, None
