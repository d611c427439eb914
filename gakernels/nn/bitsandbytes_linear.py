"""Linear layers of bitsandbytes from plain ones: 8-bit integers and 4-bit NormalFloat."""

from typing import Any

import torch
from torch import nn

from gakernels.errors import BackendError, InputError


def int8_linear(linear: nn.Linear) -> nn.Module:
    """A layer whose weight is rounded to 8-bit integers, with one scale per output (LLM.int8, arXiv:2208.07339).

    Inputs are rounded per token at each call; features of the input above 6 in magnitude are multiplied separately,
    unrounded.
    """
    library, bias = _bitsandbytes(), linear.bias is not None
    quantized = library.nn.Linear8bitLt(
        linear.in_features, linear.out_features, bias=bias, has_fp16_weights=False, threshold=6.0, device="meta"
    )
    weight = linear.weight.detach()
    quantized.weight = library.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    return _finish(quantized, linear)


def nf4_linear(linear: nn.Linear) -> nn.Module:
    """A layer whose weight is rounded to 4-bit NormalFloat in blocks of 64 whose scales are 8-bit numbers again
    (QLoRA, arXiv:2305.14314). Products are formed in the dtype that the weight had."""
    library, bias = _bitsandbytes(), linear.bias is not None
    weight = linear.weight.detach()
    quantized = library.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=bias,
        compute_dtype=weight.dtype,
        quant_type="nf4",
        compress_statistics=True,
        device="meta",
    )
    # On some CPUs a pass without gradients would repack the weight for good, and no gradient goes through that form.
    quantized.support_avx512bf16_for_cpu = False
    quantized.weight = library.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    return _finish(quantized, linear)


def _finish(quantized: Any, linear: nn.Linear) -> nn.Module:
    """Its bias; and rounding, which bitsandbytes does when a weight is moved to its device."""
    quantized.bias = linear.bias
    moved: nn.Module = quantized.to(linear.weight.device).train(linear.training)
    return moved.requires_grad_(False)


def check_bitsandbytes(linear: nn.Linear) -> None:
    """Whether a layer can be quantised.

    Raises:
        InputError: bitsandbytes does not support the weight's dtype.
        BackendError: bitsandbytes is missing.
    """
    if linear.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise InputError(
            f"int8 and nf4 need weights in float32, bfloat16 or float16, but they are {linear.weight.dtype}"
        )
    _bitsandbytes()


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise BackendError(f"int8 and nf4 need bitsandbytes (pip install bitsandbytes): {error}") from error
    return bitsandbytes
