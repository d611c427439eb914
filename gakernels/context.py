"""ContextStream: the running state of a context that grows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gakernels.adapter import Adapter
from gakernels.errors import FormatError, InputError
from gakernels.files import entry, read_tensors, write_tensors

if TYPE_CHECKING:
    from gakernels.model import GenerativeAdapter


class ContextStream:
    """A context that is read piece by piece; only its state S_t per adapted layer is kept (equation 3).

    Attributes:
        tokens_seen: number of tokens appended so far.
    """

    def __init__(self, model: GenerativeAdapter) -> None:
        self._model = model
        self._states: dict[str, Tensor] = {}
        self.tokens_seen = 0

    def append(self, context: str | Sequence[int], chunks_per_pass: int = 8) -> ContextStream:
        """Read more of the context, each chunk with the adapter of everything before it.

        Args:
            context: text or token ids; cut into even chunks of at most the generator's chunk size. Text gets the
                tokenizer's special tokens (BOS) only at the very start.
            chunks_per_pass: see `GenerativeAdapter.states`.

        Returns:
            The stream itself.

        Raises:
            InputError: the context is empty, or there is no tokenizer for a text.
        """
        tokens = encode(self._model.tokenizer, context, first=self.tokens_seen == 0)
        self._states = self._model.states([tokens], self._states or None, chunks_per_pass)
        self.tokens_seen += len(tokens)
        return self

    def states(self) -> dict[str, Tensor]:
        """S_t (1, d_r, d_r) by adapted layer.

        Raises:
            InputError: nothing has been appended yet.
        """
        if not self._states:
            raise InputError("the stream is empty; append a context first")
        return dict(self._states)

    def adapter(self) -> Adapter:
        """The adapter of everything appended so far. Raises: InputError: nothing has been appended yet."""
        return self._model.adapters(self.states(), [self.tokens_seen])[0]

    def save(self, path: str | Path) -> None:
        """Write the state to one safetensors file; `load` goes on exactly where it stopped.

        Raises:
            InputError: nothing has been appended yet, or there is a folder of that name.
            OSError: it could not be written; an older file of that name is unharmed.
        """
        tensors = {name: state[0] for name, state in self.states().items()}
        description = {
            "tokens_seen": self.tokens_seen,
            "base_fingerprint": self._model.base_fingerprint(),
            "generator_fingerprint": self._model.generator_fingerprint(),
        }
        write_tensors(Path(path), "state", tensors, description)

    @classmethod
    def load(cls, model: GenerativeAdapter, path: str | Path) -> ContextStream:
        """Read what `save` wrote.

        Raises:
            InputError: there is no such file.
            FormatError: it is damaged, or was made with another base model or generator.
        """
        path = Path(path)
        tensors, description = read_tensors(path, "state")
        for what, own in (("base", model.base_fingerprint()), ("generator", model.generator_fingerprint())):
            saved = entry(path, description, f"{what}_fingerprint")
            if saved != own:
                raise FormatError(f"{path} was made with a {what} of fingerprint {saved}, but this one has {own}")
        if set(tensors) != set(model.adapted_names):
            raise FormatError(f"{path} is damaged: it lacks the states of some layers or has others")
        stream = cls(model)
        stream._states = {
            name: tensor[None].to(model.generator(name).sketch.device) for name, tensor in tensors.items()
        }
        stream.tokens_seen = entry(path, description, "tokens_seen")
        return stream


def encode(tokenizer: PreTrainedTokenizerBase | None, context: str | Sequence[int], first: bool) -> list[int]:
    """Token ids of a piece of context; text gets special tokens only where the context starts.

    Raises:
        InputError: the context is empty, or no sequence of token ids, or it is a text and there is no tokenizer.
    """
    if isinstance(context, str):
        if tokenizer is None:
            raise InputError("tokenizer is needed to turn text into tokens; pass one to GenerativeAdapter")
        if not context.strip():
            raise InputError("the context must have at least one token, but it is empty")
        return list(tokenizer(context, add_special_tokens=first)["input_ids"])
    try:
        tokens = [int(token) for token in context]
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"a context must be a text or a sequence of token ids, but it is {context!r:.60}") from error
    if not tokens:
        raise InputError("the context must have at least one token, but it is empty")
    return tokens
