"""A model sharded over the processes, for base models that do not fit on one GPU: PyTorch's `fully_shard` (FSDP2)."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from gakernels.distributed import Parallel, Ranks
from gakernels.errors import InputError
from gakernels.model import GenerativeAdapter
from gakernels.model.attachment import decoder_layers

GENERATOR_METHODS = ("states", "factors", "empty_factors")  # the methods that a pass over windows calls


class Shards(Parallel):
    """A model whose decoder layers and generators are sharded; everything outside the layers stays on every process.

    Every decoder layer and generator is gathered when it is needed, in forward and backward, then freed again.
    Create this before the parameters are given to a `Trainer`: they become `DTensor`s, under their old names. The
    generators run on the main stream (see `GenerativeAdapter.overlap_generators`).

    Args:
        ranks: of a running process group.
        model: the same on every process; sharded in place. It may be on the host: each layer moves to the device in
            turn, so no device ever holds all of them.
        device: of this process; by default that of the model.
    """

    def __init__(self, ranks: Ranks, model: GenerativeAdapter, device: torch.device | str | None = None) -> None:
        super().__init__(ranks)
        device = torch.device(model.device if device is None else device)
        model.base_fingerprint(), model.base_layers_fingerprint()  # these need the whole base; the model caches them
        model.overlap_generators(False)
        mesh = init_device_mesh(device.type, (ranks.world,))
        layers = decoder_layers(model.base)[1]
        inside = {parameter for layer in layers for parameter in layer.parameters()}
        outside = {parameter for parameter in model.base.parameters() if parameter not in inside}
        for parameter in model.generators.parameters():
            dist.broadcast(parameter.data, src=0)
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        for generator in model.generators.values():
            fully_shard(generator, mesh=mesh)
            for method in GENERATOR_METHODS:
                register_fsdp_forward_method(generator, method)
        for tensor in (*outside, *model.buffers()):
            tensor.data = tensor.data.to(device)
        fully_shard(model, mesh=mesh, ignored_params=outside)
        register_fsdp_forward_method(model, "read")
        self._units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for unit in self._units:
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)

    def prepare(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """See `Parallel`.

        Raises:
            InputError: a parameter does not belong to the sharded model.
        """
        for name, parameter in parameters.items():
            if not isinstance(parameter, DTensor):
                raise InputError(f"parameters must be those of the model after it was sharded, but {name} is not")

    def backward(self, loss: Tensor, last: bool) -> None:
        """See `Parallel`: each process keeps full gradients until the last micro-batch."""
        for unit in self._units:
            unit.set_requires_gradient_sync(last, recurse=False)
        loss.backward()


def whole(tensor: Tensor) -> Tensor:
    """A possibly sharded tensor, whole on this process; all processes must make this call together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_part(tensor: Tensor) -> Tensor:
    """The part of a possibly sharded tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
