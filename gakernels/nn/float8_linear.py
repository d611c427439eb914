"""Float8Linear: a frozen linear layer whose products run in 8-bit floating point, forward and backward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gakernels.errors import BackendError, InputError
from gakernels.nn.float8 import MULTIPLE, Float8Rows, last_rows, product, quantize_rows
from gakernels.ops import autocast

MINIMUM_CAPABILITY = (8, 9)
WIDE = (torch.float32, torch.bfloat16, torch.float16)


def check_linear(linear: nn.Linear) -> None:
    """Whether products in 8-bit floating point can replace a layer's; there is no slower fallback.

    Raises:
        InputError: the weight has another dtype; or, on a GPU, a size is not a multiple of 16.
        BackendError: the weight is on a device without such products.
    """
    if linear.weight.dtype not in WIDE:
        raise InputError(f"fp8 needs weights in float32, bfloat16 or float16, but they are {linear.weight.dtype}")
    check_device(linear.weight.device)
    sizes = (linear.in_features, linear.out_features)
    if linear.weight.is_cuda and any(size % MULTIPLE for size in sizes):
        raise InputError(
            f"fp8 needs sizes that are multiples of {MULTIPLE} on a GPU, but a linear layer maps {sizes[0]} to "
            f"{sizes[1]} features"
        )


def check_device(device: torch.device) -> None:
    """Raises: BackendError: 8-bit floating-point products do not run there."""
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise BackendError(f"fp8 needs an NVIDIA GPU or a CPU, but the base model is on {device.type}")
    capability = torch.cuda.get_device_capability(device)
    if capability < MINIMUM_CAPABILITY:
        found = ".".join(map(str, capability))
        raise BackendError(f"fp8 needs a GPU of compute capability 8.9 or more, but this one has {found}")


class Float8Linear(nn.Module):
    """y = x W^T + b, W rounded once to `float8_e4m3fn` with a scale per output, x rounded per token at each call.

    The backward computes dx = dy W with exactly the W of the forward: dy is multiplied by the scales of W before it is
    rounded, again per token. A GPU needs W^T in memory for this, so it is stored when a gradient is first needed:
    training takes two bytes per weight, inference one. Nothing is kept for the backward, and W gets no gradient.

    Sums are float32; x, y and dy are float32, bfloat16 or float16.

    Args:
        linear: a plain linear layer; it is not changed.

    Raises:
        InputError, BackendError: as `check_linear`.
    """

    weight: nn.Parameter  # (d_out, d_in)
    weight_scale: Tensor  # (d_out, 1) float32, powers of two

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        check_linear(linear)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        rows = quantize_rows(linear.weight.detach())
        self.weight = nn.Parameter(rows.values, requires_grad=False)
        self.register_buffer("weight_scale", rows.scale)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        self._transposed: Tensor | None = None
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """x (..., d_in) -> y (..., d_out), in the dtype of x, or of autocast if that is on."""
        rows, weight = last_rows.of(input), Float8Rows(self.weight, self.weight_scale)
        dtype = torch.get_autocast_dtype(input.device.type) if autocast.is_enabled(input.device) else input.dtype
        if torch.is_grad_enabled() and input.requires_grad:
            x = input.flatten(0, -2)
            y: Tensor = _Product.apply(x, *rows, *weight, self.transposed(), dtype)  # type: ignore[no-untyped-call]
        else:
            y = product(rows, weight, dtype)
        y = y if self.bias is None else y.add_(self.bias.to(y.dtype))
        return y.view(*input.shape[:-1], self.out_features)

    def transposed(self) -> Tensor:
        """W^T (d_in, d_out) in 8 bits, contiguous."""
        if self._transposed is None:
            self._transposed = self.weight.detach().t().contiguous()
        return self._transposed

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Float8Linear":
        """Moves to another device; a cast to another dtype does not change the 8-bit weight and its scales."""
        self._transposed = None

        def kept(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        super()._apply(kept, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._transposed = None
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """Sizes, as those of `nn.Linear`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class _Product(torch.autograd.Function):
    """The product in 8 bits; x itself is passed only to get its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        scale: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        transposed: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(weight_scale, transposed)
        ctx.dtype = x.dtype
        return product(Float8Rows(values, scale), Float8Rows(weight, weight_scale), dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight_scale, transposed = ctx.saved_tensors
        rows = quantize_rows(grad, factor=weight_scale.flatten())
        ones = weight_scale.new_ones(len(transposed), 1)
        return product(rows, Float8Rows(transposed, ones), ctx.dtype), None, None, None, None, None, None
