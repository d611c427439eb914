"""The Triton kernels of `gated_product`, over contiguous tensors. A program owns a block of their numbers.

Everything is computed in float32, and rounded to the tensors' dtype where PyTorch's separate operations store it.
"""

import triton
import triton.language as tl


@triton.jit
def product(gate, up, result, numbers, NUMBERS: tl.constexpr):
    """silu(gate) up."""
    first = tl.program_id(0).to(tl.int64) * NUMBERS
    n = tl.arange(0, NUMBERS)
    inside = n < numbers - first
    g = tl.load(gate + first + n, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + first + n, mask=inside, other=0.0).to(tl.float32)
    activated = (g / (1 + tl.exp(-g))).to(result.dtype.element_ty).to(tl.float32)
    tl.store(result + first + n, (activated * u).to(result.dtype.element_ty), mask=inside)


@triton.jit
def gradients(grad, gate, up, grad_gate, grad_up, numbers, NUMBERS: tl.constexpr):
    """grad up s (1 + gate (1 - s)) with s = sigmoid(gate), and grad silu(gate)."""
    first = tl.program_id(0).to(tl.int64) * NUMBERS
    n = tl.arange(0, NUMBERS)
    inside = n < numbers - first
    upstream = tl.load(grad + first + n, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + first + n, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + first + n, mask=inside, other=0.0).to(tl.float32)
    divisor = 1 + tl.exp(-g)
    sigmoid = 1 / divisor
    activated = (g / divisor).to(grad_up.dtype.element_ty).to(tl.float32)
    tl.store(grad_up + first + n, (activated * upstream).to(grad_up.dtype.element_ty), mask=inside)
    of_activated = (upstream * u).to(grad_gate.dtype.element_ty).to(tl.float32)
    of_gate = of_activated * sigmoid * (1 + g * (1 - sigmoid))
    tl.store(grad_gate + first + n, of_gate.to(grad_gate.dtype.element_ty), mask=inside)
