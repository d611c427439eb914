"""The weights of a base model, which many may use at a time and which an adapter can be merged into."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from gakernels.errors import InputError
from gakernels.model.own_lock import OwnLock
from gakernels.nn import AdaptedLinear
from gakernels.nn.adapted_quantized_linear import AdaptedQuantizedLinear


class SharedWeights:
    """Who uses the weights of adapted linear layers, and the originals of those that have an adapter merged in.

    A copy of a model that is in use has no users.
    """

    def __init__(self) -> None:
        self._users = _Users()
        self._originals: dict[str, Tensor] = {}

    @contextmanager
    def in_use(self, merged: bool = False) -> Iterator[None]:
        """Keep `merge` and `unmerge` from running while the block runs; wait for one that has begun.

        Args:
            merged: whether the block can use weights with an adapter merged in.

        Raises:
            InputError: an adapter is merged into the base model, and the block can't use that.
        """
        user = object()
        with self._users:
            if self._originals and not merged:
                raise InputError("an adapter is merged into the base model; call unmerge() first")
            self._users.there.add(user)
        try:
            yield
        finally:
            self._users.there.discard(user)  # without the lock: this may run inside any other code, as a finalizer

    @torch.no_grad()
    def merge(self, linears: Mapping[str, AdaptedLinear], deltas: Mapping[str, Tensor]) -> None:
        """Add deltas (d_out, d_in) to weights, and keep copies of the weights.

        Raises:
            InputError: the weights are in use, or `check_mergeable` refuses them.
        """
        with self._alone():
            self.check_mergeable(linears)
            for name, linear in linears.items():
                self._originals[name] = linear.weight.detach().clone()
                linear.weight.copy_(merged_weight(linear, deltas[name]))

    @torch.no_grad()
    def unmerge(self, linears: Mapping[str, AdaptedLinear]) -> None:
        """Restore the weights from before `merge`. Raises: InputError: they are in use."""
        if not self._originals:
            return
        with self._alone():
            for name, original in self._originals.items():
                linears[name].weight.copy_(original)
            self._originals.clear()

    def check_mergeable(self, linears: Mapping[str, AdaptedLinear]) -> None:
        """Raises: InputError: an adapter is merged in already, or weights are quantised or offloaded."""
        if self._originals:
            raise InputError("an adapter is merged into the base model already; call unmerge() first")
        if any(isinstance(linear, AdaptedQuantizedLinear) for linear in linears.values()):
            raise InputError(
                "an adapter can't be merged into weights that are quantised or offloaded; merge it into the full base "
                "model (nor into layers that compute in a way of their own)"
            )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While the block runs, nobody begins to use the weights. Raises: InputError: they are in use."""
        with self._users:
            if self._users.there:
                raise InputError(
                    "the base model is in use, here or in another thread or task; leave the block of adapted() before "
                    "merge() and unmerge()"
                )
            yield


class _Users(OwnLock):
    """Who uses the weights, behind a lock for whoever wants to begin to."""

    def __init__(self) -> None:
        super().__init__()
        self.there: set[object] = set()


def merged_weight(linear: AdaptedLinear, delta: Tensor) -> Tensor:
    """The weight of a layer with an adapter's delta added, rounded once."""
    weight = linear.weight.detach()
    return (weight.to(delta.dtype) + delta.to(weight.device)).to(weight.dtype)
