"""A model in pieces over the processes, for base models that do not fit one GPU: PyTorch's `fully_shard` (FSDP2)."""

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

GENERATOR_METHODS = ("states", "factors")  # what a pass over windows calls


class Shards(Parallel):
    """A model whose decoder layers and generators are sharded; what is outside of the layers stays on every process.

    Every decoder layer and every generator is gathered when it is needed, in forward and backward, and let go again.
    Make this before the parameters are handed to a `Trainer`: they become `DTensor`s, under their old names. The
    generators run in line (see `GenerativeAdapter.overlap_generators`).

    Args:
        ranks: of a process group that is running.
        model: the same on every process; sharded in place. It may be on the host: each layer goes to the device when
            its turn has come, so that no device ever holds all of them.
        device: of this process; that of the model if not given.
    """

    def __init__(self, ranks: Ranks, model: GenerativeAdapter, device: torch.device | str | None = None) -> None:
        super().__init__(ranks)
        device = torch.device(model.device if device is None else device)
        model.base_fingerprint(), model.base_layers_fingerprint()  # need the whole base; they are remembered
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
        self._units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for unit in self._units:
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)

    def prepare(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """See `Parallel`.

        Raises:
            InputError: a parameter is not of the sharded model.
        """
        for name, parameter in parameters.items():
            if not isinstance(parameter, DTensor):
                raise InputError(f"parameters must be those of the model after it was sharded, but {name} is not")

    def backward(self, loss: Tensor, last: bool) -> None:
        """See `Parallel`: gradients stay whole on each process until the last micro-batch."""
        for unit in self._units:
            unit.set_requires_gradient_sync(last, recurse=False)
        loss.backward()


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, whole on this process; a call that all processes make together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
