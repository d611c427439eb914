"""The processes of a run: their ranks, and how their gradients are combined.

The loss of a step is taken over the targets of all processes, so gradients are summed, never averaged.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gakernels.errors import InputError

Value = TypeVar("Value")
BUCKET_BYTES = 25 << 20


@dataclass(frozen=True)
class Ranks:
    """One of the processes of a run; `Ranks()` is a run with a single process.

    Attributes:
        rank: number of this process, from 0.
        world: number of processes.
        local_rank: number of this process on its machine, and of its GPU.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> "Ranks":
        """Read RANK, WORLD_SIZE and LOCAL_RANK, which `torchrun` sets; a single process if none of them is set.

        Raises:
            InputError: only some of them are set, or one is not a number in its range.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        values = [os.environ.get(name) for name in names]
        if values == [None, None, None]:
            return cls()
        if not all(value is not None and value.isdecimal() for value in values):
            found = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
            raise InputError(f"{', '.join(names)} must be the numbers that torchrun sets, but they are {found}")
        rank, world, local_rank = (int(str(value)) for value in values)
        if rank >= world:
            raise InputError(f"RANK must be below WORLD_SIZE, but they are {rank} and {world}")
        return cls(rank, world, local_rank)


@contextmanager
def process_group(device: torch.device | str) -> Iterator[Ranks]:
    """Connect the processes that torchrun started while the block runs: NCCL between GPUs, Gloo on the host.

    Raises:
        InputError: see `Ranks.from_environment`.
    """
    ranks = Ranks.from_environment()
    if ranks.world == 1:
        yield ranks
        return
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.set_device(ranks.local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", rank=ranks.rank, world_size=ranks.world)
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


class Parallel:
    """How the gradients of a run are computed; this class is for a single process.

    Attributes:
        ranks: this process and the number of processes.
        group: the connections; None for the default ones.
    """

    def __init__(self, ranks: Ranks | None = None, group: dist.ProcessGroup | None = None) -> None:
        self.ranks, self.group = ranks or Ranks(), group

    def aside(self) -> "Parallel":
        """The same processes with connections of their own on the host, for a thread beside the training.

        All processes call this together.
        """
        return Parallel(self.ranks, dist.new_group(backend="gloo") if self.ranks.world > 1 else None)

    def prepare(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Called once, with the trained parameters."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Run the backward of a micro-batch; the last one of a step may start summing the gradients."""
        loss.backward()

    def finish(self) -> None:
        """After this call, the gradients are summed over all processes."""

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes, bitwise the same on each."""
        if self.ranks.world > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def broadcast(self, value: Value) -> Value:
        """The value of the first process, returned on each."""
        if self.ranks.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes in rank order, returned on each."""
        if self.ranks.world == 1:
            return [value]
        values: list[Any] = [None] * self.ranks.world
        dist.all_gather_object(values, value, group=self.group)
        return values


class Replicas(Parallel):
    """Every process holds all parameters; gradients are summed in buckets while the backward is still running.

    The buckets are the same on every process and are sent in the same order, whatever the order in which the gradients
    arrive. The gradient of a parameter that a process did not use counts as zero.
    """

    def __init__(self, ranks: Ranks, bucket_bytes: int = BUCKET_BYTES) -> None:
        super().__init__(ranks)
        self._bucket_bytes = bucket_bytes
        self._buckets: list[_Bucket] = []
        self._bucket_of: dict[nn.Parameter, _Bucket] = {}
        self._last = False
        self._sent = 0

    def prepare(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Copy the first process's parameters to every process, and register hooks for their gradients."""
        for parameter in parameters.values():
            dist.broadcast(parameter.data, src=0)
        # Gradients of the last layers come first.
        self._buckets = _buckets(list(parameters.values())[::-1], self._bucket_bytes)
        self._bucket_of = {parameter: bucket for bucket in self._buckets for parameter in bucket.parameters}
        for parameter in self._bucket_of:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def backward(self, loss: Tensor, last: bool) -> None:
        """See `Parallel`: buckets are sent during the backward of the last micro-batch."""
        self._last = last
        loss.backward()

    def finish(self) -> None:
        """Send the remaining buckets and wait for all of them."""
        self._send(len(self._buckets))
        for bucket in self._buckets:
            bucket.receive()
        self._last, self._sent = False, 0

    def _arrived(self, parameter: Tensor) -> None:
        if not self._last:
            return
        self._bucket_of[parameter].arrived(parameter)  # type: ignore[index] # the hook receives the parameter itself
        complete = self._sent
        while complete < len(self._buckets) and self._buckets[complete].missing == 0:
            complete += 1
        self._send(complete)

    def _send(self, end: int) -> None:
        for bucket in self._buckets[self._sent : end]:
            bucket.send()
        self._sent = max(self._sent, end)


class _Bucket:
    """Parameters of one dtype whose gradients are sent together."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.missing = len(parameters)
        self._flat = torch.empty(0)
        self._work: Any = None
        self._events: list[Any] = []

    def arrived(self, parameter: Tensor) -> None:
        """Note that a gradient was computed; on a GPU it is ready once the stream of its backward gets that far."""
        self.missing -= 1
        if parameter.is_cuda:
            self._events.append(torch.cuda.current_stream().record_event())

    def send(self) -> None:
        """Start summing the gradients over all processes."""
        for event in self._events:
            torch.cuda.current_stream().wait_event(event)
        parts = [
            torch.zeros(parameter.numel(), dtype=parameter.dtype, device=parameter.device)
            if parameter.grad is None
            else parameter.grad.flatten()
            for parameter in self.parameters
        ]
        self._flat = torch.cat(parts)
        if self._events:  # the allocator must know that another stream reads the gradient
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.record_stream(torch.cuda.current_stream())
        self._work = dist.all_reduce(self._flat, async_op=True)

    def receive(self) -> None:
        """Replace the gradients by the sums, as views of the bucket."""
        self._work.wait()
        parts = self._flat.split([parameter.numel() for parameter in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        self._work, self._flat, self._events, self.missing = None, torch.empty(0), [], len(self.parameters)


def _buckets(parameters: Sequence[nn.Parameter], size: int) -> list[_Bucket]:
    groups: list[list[nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        room -= parameter.nbytes
        if not groups or room < 0 or groups[-1][0].dtype != parameter.dtype:
            groups.append([])
            room = size - parameter.nbytes
        groups[-1].append(parameter)
    return [_Bucket(group) for group in groups]
