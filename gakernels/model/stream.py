"""ContextStream: the running state of a context that grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gakernels.adapters.adapter import Adapter
from gakernels.adapters.compact import CompactAdapter
from gakernels.errors import FormatError, InputError
from gakernels.files import count_entry, entry, read_tensors, write_tensors
from gakernels.model.adapter_making import make_adapters, make_compact_adapters
from gakernels.model.attached_generators import AttachedGenerators
from gakernels.model.own_lock import OwnLock
from gakernels.model.state_arithmetic import Part, scale_states, state_fingerprint, subtract_states, sum_states


class ContextStream:
    """A context that is read piece by piece, keeping only its state S_t per adapted layer (equation 3).

    Attributes:
        tokens_seen: number of tokens appended so far, including those of added contexts.
        parts: the contexts that were added as a whole, with their weights in the state.
    """

    def __init__(self, model: AttachedGenerators) -> None:
        self._model = model
        self._states: dict[str, Tensor] = {}
        self.tokens_seen = 0
        self.parts: tuple[Part, ...] = ()
        self._lock = OwnLock()  # serialises changes, so that nobody reads a half-made one

    def append(self, context: str | Sequence[int], chunks_per_pass: int = 8) -> ContextStream:
        """Read more of the context, each chunk with the adapter of everything before it.

        Args:
            context: text or token ids; cut into even chunks of at most the generator's chunk size. Text gets the
                tokenizer's opening tokens (BOS) only at the very start, and never closing ones (EOS).
            chunks_per_pass: see `GenerativeAdapter.states`.

        Returns:
            The stream itself.

        Raises:
            InputError: the context is empty, or there is no tokenizer for a text.
        """
        with self._lock:
            tokens = self._model.encode_context(context, first=self.tokens_seen == 0)
            self._states = self._model.states([tokens], self._states or None, chunks_per_pass)
            self.tokens_seen += len(tokens)
        return self

    def add(self, other: ContextStream, weight: float = 1.0) -> ContextStream:
        """Add the state of another context that was read separately (docs/method.md).

        Args:
            other: a stream of the same generator; it is not changed.
            weight: factor of its state.

        Returns:
            The stream itself.

        Raises:
            InputError: the other stream is empty or of another generator, or the weight is 0 or not finite.
        """
        if weight == 0:
            raise InputError("weight must not be 0; a context of weight 0 need not be added")
        self._check_same_model(other)
        states, tokens, _ = other._content()
        with self._lock:
            before, weights = ([self._states], [1.0]) if self._states else ([], [])
            self._states = sum_states([*before, states], [*weights, weight])
            self.tokens_seen += tokens
            self.parts += (Part(state_fingerprint(states), tokens, weight),)
        return self

    def remove(self, other: ContextStream) -> ContextStream:
        """Remove an added context by subtraction: exact up to the rounding of the sum.

        To avoid rounding, add the other contexts to a new stream. Pieces that were appended while the context was part
        of the stream were encoded with its adapter and stay as they are.

        Returns:
            The stream itself.

        Raises:
            InputError: this context has not been added in exactly this state.
        """
        states = other.states()
        fingerprint = state_fingerprint(states)
        with self._lock:
            positions = [number for number, part in enumerate(self.parts) if part.fingerprint == fingerprint]
            if not positions:
                raise InputError(
                    "the context to remove must have been added in exactly this state, but it has not been"
                )
            part = self.parts[positions[-1]]
            left = self.parts[: positions[-1]] + self.parts[positions[-1] + 1 :]
            if part.tokens == self.tokens_seen:  # subtraction would leave rounding, which norm() would scale up to 1
                self._states, self.tokens_seen, self.parts = {}, 0, ()
            else:
                self._states = subtract_states(self._states, states, part.weight)
                self.tokens_seen, self.parts = self.tokens_seen - part.tokens, left
        return self

    def decay(self, factor: float) -> ContextStream:
        """Fade the state by a factor, so that what is appended or added from now on weighs more.

        This does not change the adapter of the stream itself: norm(a S) = norm(S).

        Returns:
            The stream itself.

        Raises:
            InputError: nothing has been appended yet, or the factor is not above 0 and at most 1.
        """
        if not 0 < factor <= 1:
            raise InputError(f"factor must be above 0 and at most 1, but it is {factor}")
        with self._lock:
            self._states = scale_states(self._filled(), factor)
            self.parts = tuple(part.faded(factor) for part in self.parts)
        return self

    def _check_same_model(self, other: ContextStream) -> None:
        if other._model is self._model:
            return
        own, others = (
            (model.base_fingerprint(), model.generator_fingerprint()) for model in (self._model, other._model)
        )
        if own != others:
            raise InputError("only contexts of the same generator and base model can be added, but these differ")

    def states(self) -> dict[str, Tensor]:
        """S_t (1, d_r, d_r) by adapted layer.

        Raises:
            InputError: nothing has been appended yet.
        """
        return self._content()[0]

    def _content(self) -> tuple[dict[str, Tensor], int, tuple[Part, ...]]:
        """A consistent snapshot of states, tokens seen and parts."""
        with self._lock:
            return self._filled(), self.tokens_seen, self.parts

    def _filled(self) -> dict[str, Tensor]:
        if not self._states:
            raise InputError("the stream is empty; append a context first")
        return dict(self._states)

    def adapter(self) -> Adapter:
        """The adapter of everything appended so far. Raises: InputError: nothing has been appended yet."""
        states, tokens, _ = self._content()
        return make_adapters(self._model, states, [tokens])[0]

    def compact(self, dtype: torch.dtype | None = None) -> CompactAdapter:
        """The compact form of that adapter, in the given dtype or that of the state; see `CompactAdapter`.

        Raises:
            InputError: nothing has been appended yet, or the generator's norm is `frobenius`.
        """
        states, tokens, _ = self._content()
        return make_compact_adapters(self._model, states, [tokens], dtype)[0]

    def save(self, path: str | Path) -> None:
        """Write the state to one safetensors file; after `load`, the stream continues exactly from here.

        Raises:
            InputError: nothing has been appended yet, or `path` is a folder.
            OSError: it could not be written; an existing file of that name is unchanged.
        """
        states, tokens, parts = self._content()
        tensors = {name: state[0] for name, state in states.items()}
        description = {
            "tokens_seen": tokens,
            "base_fingerprint": self._model.base_fingerprint(),
            "generator_fingerprint": self._model.generator_fingerprint(),
            "parts": [asdict(part) for part in parts],
        }
        write_tensors(Path(path), "state", tensors, description)

    @classmethod
    def load(cls, model: AttachedGenerators, path: str | Path) -> ContextStream:
        """Read what `save` wrote.

        Raises:
            InputError: there is no such file.
            FormatError: it is damaged, or was made with another base model or generator.
        """
        path = Path(path)
        tensors, description = read_tensors(path, "state")
        for what, own in (("base", model.base_fingerprints()), ("generator", (model.generator_fingerprint(),))):
            saved = entry(path, description, f"{what}_fingerprint", str)
            if saved not in own:
                raise FormatError(f"{path} was made with a {what} with fingerprint {saved}, but this one has {own[0]}")
        size = (model.config.state_size, model.config.state_size)
        if set(tensors) != set(model.adapted_names):
            raise FormatError(f"{path} is damaged: it lacks the states of some layers or has others")
        if not all(tensor.shape == size and tensor.is_floating_point() for tensor in tensors.values()):
            raise FormatError(f"{path} is damaged: its states must have the shape {size}")
        stream = cls(model)
        stream._states = {
            name: tensor[None].to(model.generator(name).sketch.device) for name, tensor in tensors.items()
        }
        stream.tokens_seen = count_entry(path, description, "tokens_seen")
        stream.parts = _read_parts(path, description)
        if sum(part.tokens for part in stream.parts) > stream.tokens_seen:
            raise FormatError(f"{path} is damaged: its parts have more tokens than it has seen")
        return stream


def _read_parts(path: Path, description: dict[str, Any]) -> tuple[Part, ...]:
    """The parts that a state file names; early files have none."""
    parts = entry(path, {"parts": [], **description}, "parts", list)
    if not all(isinstance(part, dict) for part in parts):
        raise FormatError(f"{path} is damaged: its entry 'parts' must be a list of objects")
    return tuple(
        Part(
            entry(path, part, "fingerprint", str),
            count_entry(path, part, "tokens"),
            float(entry(path, part, "weight", float)),
        )
        for part in parts
    )
