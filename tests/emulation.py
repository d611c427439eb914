"""8-bit floating point by its definition, in float64: the oracle, and a stand-in for another library's layer."""

from typing import Any

import torch
from torch import Tensor, nn


def codes(dtype: torch.dtype) -> Tensor:
    """All finite numbers of an 8-bit type, ascending, once each (float64)."""
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    return numbers[numbers.isfinite()].unique()


def nearest(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest number of an 8-bit type, of two equally near ones the one with an even last bit."""
    table = codes(dtype)
    above = torch.searchsorted(table, values.double().contiguous()).clamp(1, len(table) - 1)
    low, high = table[above - 1], table[above]
    down, up = values.double() - low, high - values.double()
    odd = (low.to(torch.float32).to(dtype).view(torch.uint8) & 1).bool()
    return torch.where((up < down) | ((up == down) & odd), high, low)


def rounded(x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn, factor: Tensor | None = None) -> Tensor:
    """A matrix after a round trip through 8 bits, with a scale for each row (float64)."""
    wide = x.double() if factor is None else x.double() * factor.double()
    scale = row_scales(wide, dtype)
    return nearest(wide / scale, dtype) * scale


def row_scales(x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """(rows, 1) float64: the least power of two by which a row can be divided without overflow."""
    return torch.exp2(torch.log2(x.double().abs().amax(-1, keepdim=True) / torch.finfo(dtype).max).ceil())


class EmulatedProduct(torch.autograd.Function):
    """y = Q(x) Q(W)^T, dx = Q(dy diag(s)) (Q(W) / s), with the scales s of W's rows, in float64."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight, ctx.scale = rounded(weight), row_scales(weight).flatten()
        y = rounded(x.flatten(0, -2)) @ ctx.weight.mT
        return y.view(*x.shape[:-1], -1).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rows = rounded(grad.flatten(0, -2), factor=ctx.scale)
        return (rows @ (ctx.weight / ctx.scale[:, None])).view(*grad.shape[:-1], -1).to(grad.dtype), None


class EmulatedLinear(nn.Module):
    """A linear layer of another library: no `nn.Linear`, its weight packed (here: two halves), products in its way."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(linear.weight.detach().view(torch.uint8), requires_grad=False)
        self.register_buffer("zero", torch.zeros(()))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = EmulatedProduct.apply(x, self.weight.view(torch.float32))
        return y if self.bias is None else y + self.bias.to(y.dtype)
