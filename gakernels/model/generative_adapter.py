"""GenerativeAdapter: a frozen causal language model with generators that turn a context into an adapter."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from gakernels.adapters.adapter import Adapter, stack
from gakernels.adapters.compact import CompactAdapter
from gakernels.errors import FormatError, InputError
from gakernels.files import replacing_folder
from gakernels.model import text_generation
from gakernels.model.adapter_making import AnyAdapter, expand, expanded, make_adapters, make_compact_adapters
from gakernels.model.attached_generators import AttachedGenerators
from gakernels.model.encoding import is_token
from gakernels.model.hub import local_folder
from gakernels.model.pretrained import put_in, read_generator, save_generator
from gakernels.model.released import is_released, read_released
from gakernels.model.stream import ContextStream
from gakernels.nn import LowRankFactors
from gakernels.nn.offloading import execution_device


class GenerativeAdapter(AttachedGenerators):
    """Generators attached to a base model.

    The base model is frozen and keeps its parameter names. Its adapted linear layers, quantised or not, are replaced by
    `AdaptedLinear` with the same parameters, and feed-forward parts and norms of the usual kind by `GatedMLP` and
    `FrozenRMSNorm`, which compute the same with less memory (`detach` restores the originals). The generators are the
    only trainable parameters.

    The adapter in use belongs to a thread or asyncio task, not to the model: several may use one model at the same
    time, each with its own adapter or context pass. Only merging needs the model to itself (docs/base_models.md).

    Args:
        base: any decoder-only transformers model whose decoder layers hold the named linear layers; wrappers around it
            (`torch.compile`, data parallel) are removed.
        config: which layers are adapted, and how.
        tokenizer: needed only for text input or output.
        dtype: dtype of the generators' parameters, independent of the base model's.

    Raises:
        InputError: config names layers that the model does not have or chunks that are too long for it, or the model
            already carries generators, is sharded or contains a PEFT adapter.
    """

    # Contexts

    def stream(self) -> ContextStream:
        """A new, empty running context."""
        return ContextStream(self)

    @overload
    def adapt(self, contexts: str) -> Adapter: ...  # type: ignore[overload-overlap] # a text is a sequence of texts too

    @overload
    def adapt(self, contexts: Sequence[int] | Tensor) -> Adapter: ...

    @overload
    def adapt(self, contexts: Sequence[str | Sequence[int]]) -> list[Adapter]: ...

    def adapt(self, contexts: str | Sequence[int] | Tensor | Sequence[str | Sequence[int]]) -> Adapter | list[Adapter]:
        """The adapter of a context, or the list of adapters of a list of contexts, encoded together as one batch.

        Args:
            contexts: one or several contexts, each a text or a sequence of token ids.

        Raises:
            InputError: there are no contexts, one is empty, or there is no tokenizer for a text.
        """
        one = isinstance(contexts, str) or not isinstance(contexts, Iterable)
        several: list[Any] = [contexts] if one else list(contexts)
        if not one and several and is_token(several[0]):
            one, several = True, [several]
        tokens = [self.encode_context(context, first=True) for context in several]
        adapters = self.adapters(self.states(tokens), [len(row) for row in tokens])
        return adapters[0] if one else adapters

    def adapters(self, states: Mapping[str, Tensor], tokens_seen: Sequence[int]) -> list[Adapter]:
        """The adapters of B states (B, d_r, d_r) by adapted layer."""
        return make_adapters(self, states, tokens_seen)

    def compact_adapters(
        self, states: Mapping[str, Tensor], tokens_seen: Sequence[int], dtype: torch.dtype | None = None
    ) -> list[CompactAdapter]:
        """The compact adapters of B states (B, d_r, d_r) by adapted layer; see `CompactAdapter`.

        Args:
            states: as `states` returns them.
            tokens_seen: number of tokens that each state has seen.
            dtype: dtype of U and V; that of the states if not given.

        Raises:
            InputError: the generator's norm is `frobenius`, whose factors are not smaller than the state.
        """
        return make_compact_adapters(self, states, tokens_seen, dtype)

    def expand(self, compact: CompactAdapter) -> Adapter:
        """Expand a compact adapter: lora_A = V^T B2 and lora_B = A1 U, in the dtype of the generators.

        Raises:
            FormatError: it was made by another generator or for another base model.
        """
        return expand(self, compact)

    # Using adapters

    @contextmanager
    def adapted(self, adapters: AnyAdapter | Sequence[AnyAdapter]) -> Iterator[None]:
        """Use an adapter, or one adapter per row of the batch, while the block runs.

        With n adapters the number of rows in a batch must be a multiple of n, and each adapter serves an equal share of
        consecutive rows. The adapters are in use only in the current thread or asyncio task, and in tasks that it
        starts in the block; a thread started in the block has none (`contextvars.copy_context().run` passes them on).

        Args:
            adapters: one or several; compact ones must be of this generator and are expanded.

        Raises:
            InputError: an adapter is merged into the base model, the adapters differ in scale or rank, or the block
                ends out of order (see `Block.in_force`).
            FormatError: an adapter was made for another base model or for other layers.
        """
        several = [expanded(self, adapter) for adapter in _as_list(adapters)]
        factors = {}
        for name, linear in self.linears().items():
            device = execution_device(linear)
            lora_a, lora_b = (factor.to(device, self.base.dtype) for factor in stack(several, name))
            factors[name] = LowRankFactors(lora_a, lora_b, several[0].scale)
        with self.using(factors):
            yield

    def merge(self, adapter: AnyAdapter) -> None:
        """Add an adapter to the weights of the base model; `unmerge` restores them bit by bit from a copy.

        Raises:
            InputError: an adapter is merged already, the model is in use (in a block of `adapted`, a context pass or
                `generate`, in any thread or task), or the weights are quantised or offloaded.
            FormatError: the adapter was made for another base model or for other layers.
        """
        adapter = expanded(self, adapter)
        self.weights.merge(self.linears(), {name: adapter.delta(name) for name in self.adapted_names})

    def unmerge(self) -> None:
        """Restore the weights from before `merge`; does nothing if nothing is merged.

        Raises:
            InputError: the model is in use.
        """
        self.weights.unmerge(self.linears())

    def save_merged(self, adapter: AnyAdapter, folder: str | Path) -> None:
        """Write a plain model folder, with the tokenizer: the base model with an adapter merged into its weights.

        The base model in memory does not change, not even temporarily. Other files in the folder stay.

        Raises:
            InputError: an adapter is merged already, the weights are quantised or offloaded, or `folder` is a file.
            FormatError: the adapter was made for another base model or for other layers.
            OSError: it could not be written; existing files are unchanged.
        """
        adapter, linears = expanded(self, adapter), self.linears()
        self.weights.check_mergeable(linears)
        with self.weights.in_use(), torch.no_grad(), replacing_folder(Path(folder)) as temporary:
            weights = self.base.state_dict()
            for name, linear in linears.items():
                weights[f"{name}.weight"] = linear.merged_weight(adapter.delta(name))
            self.base.save_pretrained(temporary, state_dict=weights)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(temporary)

    def generate(self, prompts: str | Sequence[str], **options: Any) -> list[str]:
        """Continue texts with the base model in its current state (see `adapted`), using transformers' `generate`.

        Decoding is greedy: of the base model's own generation settings, only the end-of-text tokens are used. Anything
        else is up to the options.

        Args:
            prompts: one text or several; several are padded on the left.
            options: for `generate`, such as `num_beams` or `generation_config`. If they set no length, at most 32
                tokens are generated, and no more than the base model has positions for.

        Returns:
            The new text of each prompt, without the prompt and special tokens.

        Raises:
            InputError: there is no tokenizer, there are no prompts or one is empty, the number of prompts is not a
                multiple of the number of adapters in use, or a prompt and its continuation exceed the positions of the
                base model.
        """
        return text_generation.continue_texts(self, prompts, options)

    def end_tokens(self) -> tuple[int, ...]:
        """The ids that end a text: those of the base model's generation settings, and the tokenizer's."""
        return text_generation.end_tokens(self)

    # Files

    def save_pretrained(self, folder: str | Path, base_name: str | None = None) -> None:
        """Write the generators to a folder; `from_pretrained` reads it. The base model is not written.

        Args:
            folder: receives `generator.safetensors`, which holds everything, and `generator.json`, a readable copy of
                its description.
            base_name: name or path of the base model to record, if not the one that it was loaded from; a relative path
                is looked up from the folder first.

        Raises:
            OSError: it could not be written; existing files are unchanged.
        """
        save_generator(self, Path(folder), base_name)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        base: nn.Module | str | Path | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: torch.dtype = torch.float32,
        allow_other_base: bool = False,
        **base_options: Any,
    ) -> "GenerativeAdapter":
        """Load generators and, unless given, their base model and its tokenizer.

        Args:
            folder: what `save_pretrained` wrote, or a generator in the format of the authors' released code (see
                `gakernels.model.released`): a folder, or the name of a repository on the Hugging Face hub.
            base: the base model, or its name or path; by default the one that the generator names.
            tokenizer: by default the base model's, if it has one.
            dtype: dtype of the generators' parameters.
            allow_other_base: accept a base model whose decoder layers are not those that the generator was trained for,
                with a warning. One that differs only outside of them (tokens were added) is accepted in any case, also
                with a warning.
            base_options: for `AutoModelForCausalLM.from_pretrained`.

        Raises:
            InputError: a file or model is missing, or `GenerativeAdapter` rejects the base model.
            FormatError: a file is damaged, or the base model is not the one the generator was trained for.
        """
        folder = local_folder(folder)
        if is_released(folder):
            found = read_released(folder, base, tokenizer, **base_options)
        else:
            found = read_generator(folder, base, tokenizer, allow_other_base, base_options)
        try:
            model = cls(found.base, found.config, found.tokenizer, dtype)
        except InputError as error:
            if found.has_sketches:
                raise
            raise FormatError(f"{found.source} does not fit the base model: {error}") from error
        put_in(model, found)
        return model


def _as_list(adapters: AnyAdapter | Sequence[AnyAdapter]) -> list[AnyAdapter]:
    if isinstance(adapters, (str, Path)):
        raise InputError(f"adapters must be Adapter objects, but there is a name; load it: Adapter.load({adapters!r})")
    return [adapters] if isinstance(adapters, AnyAdapter) else list(adapters)
