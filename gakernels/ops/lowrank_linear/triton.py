"""`lowrank_linear` in three Triton kernels, as docs/lowrank_linear.md describes them. What is saved is eager's."""

from typing import Any

import torch
import triton
from torch import Tensor

from gakernels.ops import launching, tuned
from gakernels.ops.lowrank_linear import kernels

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_RANK_BLOCK = 128
SHORT = 64  # windows of at most this many tokens have their own settings


def unsupported(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float = 1.0,
    adapter_index: Tensor | None = None,
    bias: Tensor | None = None,
) -> str | None:
    """Why the kernels can't run these arguments here, or None if they can. They take any sizes and strides."""
    if x.dtype not in DTYPES:
        return f"the kernels compute in float32, but x is {x.dtype}"
    return launching.obstacle(x.device)


def forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    adapter_index: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Returns y (windows, M, d_out) and the shrunk input z = x A^T (windows, M, r), both contiguous."""
    x, index = _rows_contiguous(x), _contiguous(adapter_index)
    z = _shrink(x, lora_a.mT, index, 1.0)
    return _linear(x, weight.mT, z, lora_b.mT, index, scale, bias), z


def backward(
    grad_y: Tensor,
    x: Tensor | None,
    z: Tensor | None,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    adapter_index: Tensor | None,
    needs_x: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, lora_a, lora_b, contiguous; None for one that is not needed.

    With dz = scale dy B: dx = dy W + dz A, dA_i = sum dz^T x, dB_i = scale sum dy^T z over the windows of adapter i.
    """
    grad_y, index = _rows_contiguous(grad_y), _contiguous(adapter_index)
    grad_x = grad_a = grad_b = None
    if needs_x or x is not None:
        grad_z = _shrink(grad_y, lora_b, index, scale)
        if needs_x:
            grad_x = _linear(grad_y, weight, grad_z, lora_a, index, 1.0, None)
        if x is not None:
            grad_a = lora_a.new_empty(lora_a.shape)
            _write_factor_gradient(grad_a.mT, _rows_contiguous(x), grad_z, index, 1.0)
    if z is not None:
        grad_b = lora_b.new_empty(lora_b.shape)
        _write_factor_gradient(grad_b, grad_y, z.contiguous(), index, scale)
    return grad_x, grad_a, grad_b


def _shrink(inputs: Tensor, factors: Tensor, index: Tensor | None, scale: float) -> Tensor:
    """scale inputs factors_i: (windows, M, depth) by (adapters, depth, r); zero for windows without an adapter."""
    windows, tokens, depth = inputs.shape
    rank = factors.shape[2]
    aligned = _aligned(_wide(rank), inputs)
    options, programs = _settings(kernels.shrink, inputs, aligned=aligned, depth=depth, rank=rank)
    options["BLOCK_R"] = _rank_block(rank)
    row_tiles = windows * triton.cdiv(tokens, options["BLOCK_M"])
    rank_tiles = triton.cdiv(rank, options["BLOCK_R"])
    splits, share = _split(depth, options["BLOCK_K"], row_tiles * rank_tiles, programs)
    outputs = inputs.new_empty(windows, tokens, rank)
    parts = outputs[None] if splits == 1 else outputs.new_empty(splits, *outputs.shape, dtype=torch.float32)
    launching.launch(
        kernels.shrink,
        (row_tiles, rank_tiles, splits),
        *(inputs, factors, index, parts, tokens, depth, rank, share, scale, *inputs.stride(), *factors.stride()),
        **options,
    )
    return outputs if splits == 1 else outputs.copy_(parts.sum(0))


def _linear(
    inputs: Tensor,
    weight: Tensor,
    shrunk: Tensor,
    factors: Tensor,
    index: Tensor | None,
    scale: float,
    bias: Tensor | None,
) -> Tensor:
    """inputs weight + scale shrunk factors_i (+ bias): weight is (depth, width), factors are (adapters, r, width)."""
    windows, tokens, depth = inputs.shape
    rank, width = factors.shape[1:]
    aligned = _aligned(width, inputs, weight)
    options, _ = _settings(kernels.linear, inputs, aligned=aligned, depth=depth, width=width, rank=rank)
    options["BLOCK_R"] = 16 if rank % 16 else min(_rank_block(rank), options["BLOCK_K"])
    tiles = windows * triton.cdiv(tokens, options["BLOCK_M"]) * triton.cdiv(width, options["BLOCK_N"])
    outputs = inputs.new_empty(windows, tokens, width)
    strides = (*inputs.stride(), *weight.stride(), *factors.stride(), 1 if bias is None else bias.stride(0))
    launching.launch(
        kernels.linear,
        (tiles,),
        *(inputs, weight, shrunk, factors, index, bias, outputs, windows, tokens, depth, width, rank, scale, *strides),
        **options,
    )
    return outputs


def _write_factor_gradient(gradient: Tensor, wide: Tensor, shrunk: Tensor, index: Tensor | None, scale: float) -> None:
    """Write scale times the sum of wide^T shrunk over the windows of each adapter to gradient (adapters, width, r)."""
    adapters, width, rank = gradient.shape
    windows, tokens, _ = wide.shape
    aligned = _aligned(_wide(rank), wide)
    options, programs = _settings(kernels.factor_gradient, wide, aligned=aligned, width=width, rank=rank)
    options["BLOCK_R"] = _rank_block(rank)
    column_tiles = adapters * triton.cdiv(width, options["BLOCK_N"])
    rank_tiles = triton.cdiv(rank, options["BLOCK_R"])
    splits, share = _split(tokens, options["BLOCK_K"], column_tiles * rank_tiles, programs)
    parts = gradient[None] if splits == 1 else gradient.new_empty(splits, *gradient.shape, dtype=torch.float32)
    strides = (*wide.stride(), *parts.stride())
    launching.launch(
        kernels.factor_gradient,
        (column_tiles, rank_tiles, splits),
        *(wide, shrunk, index, parts, windows, tokens, width, rank, share, scale, *strides),
        **options,
    )
    if splits > 1:
        gradient.copy_(parts.sum(0))


def _split(size: int, block: int, tiles: int, programs: int) -> tuple[int, int]:
    """Into how many shares a sum over `size` is split to have `programs` of them, and the size of a share.

    Each share is a whole number of blocks, four or more; the parts are added in a second step, so that nothing depends
    on the order in which programs end.
    """
    blocks = triton.cdiv(size, block)
    wanted = max(1, min(programs // max(tiles, 1), blocks // 4))
    share = max(1, triton.cdiv(blocks, wanted)) * block
    return max(1, triton.cdiv(size, share)), share


def _settings(kernel: Any, inputs: Tensor, **sizes: int) -> tuple[dict[str, Any], int]:
    """The launch settings of a kernel, and the number of programs that its sum may be split for."""
    tf32 = inputs.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    found: dict[str, Any] = tuned.settings(
        f"lowrank_linear.{kernel.fn.__name__}",
        inputs.device,
        inputs.dtype,
        **sizes,
        short=int(inputs.shape[1] <= SHORT),
        tf32=int(tf32),
    )
    programs = found.pop("PROGRAMS", 1)
    return {**found, "PRECISION": "tf32" if tf32 else "ieee"}, programs


def _aligned(size: int, *tensors: Tensor) -> int:
    """1 where 16 bytes can be copied at once: size, and the tensors' addresses, sizes and strides, are multiples of 16.

    Otherwise numbers go one by one through registers, of which there are enough for small blocks only.
    """
    strides = [stride for tensor in tensors for stride in tensor.stride() if stride != 1]
    numbers = (size, *strides, *(tensor.shape[-1] for tensor in tensors), *(tensor.data_ptr() for tensor in tensors))
    return int(all(number % 16 == 0 for number in numbers))


def _wide(rank: int) -> int:
    """The rank if its blocks are so wide that registers would not do for them, else 0, which is always aligned."""
    return rank if rank > 32 else 0


def _rank_block(rank: int) -> int:
    """A power of two of at least 16, the least that `tl.dot` takes, and at most LARGEST_RANK_BLOCK."""
    return min(LARGEST_RANK_BLOCK, max(16, triton.next_power_of_2(rank)))


def _rows_contiguous(tensor: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous: copied once if it is not, rather than read badly many times."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _contiguous(index: Tensor | None) -> Tensor | None:
    return None if index is None else index.contiguous()
