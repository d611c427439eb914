"""The plain definition of `lowrank_linear`: any dtype and device, differentiated by autograd. The tests' oracle."""

import torch
from torch import Tensor

from gakernels.ops import autocast


@autocast.without
def lowrank_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    adapter_index: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """y_w = W x_w + bias + scale B_i A_i x_w with i = adapter_index[w]; no low-rank term where i = -1."""
    outputs = []
    indices = range(x.shape[0]) if adapter_index is None else adapter_index.tolist()
    for window, index in zip(x, indices, strict=True):
        y = window @ weight.mT
        if index >= 0:
            y = y + scale * (window @ lora_a[index].mT @ lora_b[index].mT)
        outputs.append(y if bias is None else y + bias)
    return torch.stack(outputs)
