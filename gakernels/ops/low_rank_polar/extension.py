"""Runs the compiled kernels of csrc/, on a GPU or emulated on the host: allocates their memory and passes addresses."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gakernels.ops.low_rank_polar.eager import Steps
from gakernels.ops.low_rank_polar.precision import is_exact

MOST_RANK, MOST_BATCH = 128, 65_535
RANK_MULTIPLE, STATE_MULTIPLE = 32, 128


class Target(NamedTuple):
    """What runs the kernels: the extension module, the address of the CUDA stream, and the size of the device."""

    kernels: Any
    stream: int
    multiprocessors: int


def unsupported(states: Tensor, sketch: Tensor) -> str | None:
    """Why the kernels can't run these arguments, whatever the device, or None if they can."""
    state_size, rank = sketch.shape
    if states.dtype != torch.float32:
        return f"the kernels take torch.float32, not {states.dtype}"
    if state_size % STATE_MULTIPLE:
        return f"d_r must be a multiple of {STATE_MULTIPLE}, but it is {state_size}"
    if rank % RANK_MULTIPLE or rank > MOST_RANK:
        return f"the rank must be a multiple of {RANK_MULTIPLE} up to {MOST_RANK}, but it is {rank}"
    batch = states.shape[:-2].numel()
    if batch > MOST_BATCH:
        return f"a call takes at most {MOST_BATCH} states, but there are {batch}"
    return None


def forward(
    target: Target, states: Tensor, sketch: Tensor, power_iterations: int, damping: float
) -> tuple[Tensor, Tensor, Steps]:
    """Returns u, v (..., d_r, r) and the steps, without an eigendecomposition."""
    states, sketch = _ready(states), _ready(sketch)
    batch, (state_size, rank), count = states.shape[:-2], sketch.shape, 2 + 2 * power_iterations
    exact = is_exact(states.dtype, damping)
    sizes = target.kernels.Sizes(batch.numel(), state_size, rank, count, damping, target.multiprocessors, exact)
    u, v = (states.new_empty(*batch, state_size, rank) for _ in range(2))
    inputs = states.new_empty((*batch, count, state_size, rank), dtype=torch.float64 if exact else states.dtype)
    transforms = states.new_empty((*batch, count, rank, rank), dtype=torch.float64)
    workspace = states.new_empty(target.kernels.forward_workspace(sizes), dtype=torch.uint8)
    target.kernels.forward(
        sizes,
        states=states.data_ptr(),
        sketch=sketch.data_ptr(),
        u=u.data_ptr(),
        v=v.data_ptr(),
        inputs=inputs.data_ptr(),
        transforms=transforms.data_ptr(),
        workspace=workspace.data_ptr(),
        stream=target.stream,
    )
    return u, v, Steps(inputs, transforms, transforms.new_empty(*batch, 0), transforms.new_empty(*batch, 0, 0))


def backward(
    target: Target,
    grad_u: Tensor,
    grad_v: Tensor,
    states: Tensor,
    sketch: Tensor,
    steps: Steps,
    damping: float,
) -> Tensor:
    """Gradient of the states (..., d_r, d_r)."""
    grad_u, grad_v, states, sketch = (_ready(tensor) for tensor in (grad_u, grad_v, states, sketch))
    inputs, transforms = _ready(steps.inputs), _ready(steps.transforms)
    (state_size, rank), count = sketch.shape, inputs.shape[-3]
    batch = states.shape[:-2].numel()
    exact = inputs.dtype == torch.float64
    sizes = target.kernels.Sizes(batch, state_size, rank, count, damping, target.multiprocessors, exact)
    grad_states = torch.empty_like(states)
    workspace = states.new_empty(target.kernels.backward_workspace(sizes), dtype=torch.uint8)
    target.kernels.backward(
        sizes,
        grad_u=grad_u.data_ptr(),
        grad_v=grad_v.data_ptr(),
        states=states.data_ptr(),
        sketch=sketch.data_ptr(),
        inputs=inputs.data_ptr(),
        transforms=transforms.data_ptr(),
        grad_states=grad_states.data_ptr(),
        workspace=workspace.data_ptr(),
        stream=target.stream,
    )
    return grad_states


def _ready(tensor: Tensor) -> Tensor:
    """Without gaps, and aligned as the kernels' copies of 16 bytes need."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor
