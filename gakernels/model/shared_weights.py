"""The weights of a base model: many may use them at a time, and an adapter can be merged into them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from gakernels.errors import InputError
from gakernels.model.own_lock import OwnLock
from gakernels.nn import AdaptedLinear


class SharedWeights:
    """Tracks who uses the weights of adapted linear layers, and keeps the originals while an adapter is merged in.

    A copy of a model that is in use has no users.
    """

    def __init__(self) -> None:
        self._users = _Users()
        self._originals: dict[str, Tensor] = {}

    @contextmanager
    def in_use(self, merged: bool = False) -> Iterator[None]:
        """Keep `merge` and `unmerge` from running while the block runs; wait for one that has already started.

        Args:
            merged: whether the block can use weights with an adapter merged in.

        Raises:
            InputError: an adapter is merged into the base model, and the block can't use merged weights.
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
            InputError: the weights are in use, or `check_mergeable` rejects them.
        """
        with self._alone():
            self.check_mergeable(linears)
            for name, linear in linears.items():
                self._originals[name] = linear.weight.detach().clone()
                linear.weight.copy_(linear.merged_weight(deltas[name]))

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
        if not all(linear.mergeable for linear in linears.values()):
            raise InputError(
                "an adapter can't be merged into weights that are quantised or offloaded; merge it into the full base "
                "model (nor into layers with a forward of their own)"
            )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep new users from the weights while the block runs. Raises: InputError: they are in use."""
        with self._users:
            if self._users.there:
                raise InputError(
                    "the base model is in use, here or in another thread or task; leave the block of adapted() before "
                    "merge() and unmerge()"
                )
            yield


class _Users(OwnLock):
    """The current users of the weights, with a lock to hold while adding one."""

    def __init__(self) -> None:
        super().__init__()
        self.there: set[object] = set()
