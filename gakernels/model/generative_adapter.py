"""GenerativeAdapter: a frozen causal language model with generators that turn a context into its adapter."""

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gakernels.adapters.adapter import Adapter, stack
from gakernels.adapters.compact import CompactAdapter
from gakernels.adapters.quantized_compact import QuantizedCompactAdapter
from gakernels.errors import FormatError, InputError, first_line
from gakernels.files import entry, read_tensors, replacing_folder, write_tensors, write_text
from gakernels.fingerprint import FingerprintCache, tensor_fingerprint
from gakernels.model.attachment import (
    Site,
    decoder_layers,
    describe,
    find_sites,
    put_in_lean_modules,
    take_out_lean_modules,
    target_modules,
    unwrapped,
)
from gakernels.model.base_fingerprint import model_fingerprint
from gakernels.model.compilation import uncompile_layers
from gakernels.model.config import GeneratorConfig
from gakernels.model.context_pass import ContextPass
from gakernels.model.encoding import check_tokens, encode_text
from gakernels.model.hub import local_folder
from gakernels.model.own_lock import OwnLock
from gakernels.model.positions import check_chunk_size, check_prompt, position_limit
from gakernels.model.stream import ContextStream, encode, is_token
from gakernels.model.windows import only_first_is_plain, pad_left, pad_windows, split_evenly
from gakernels.nn import AdaptedLinear, AdapterGenerator, CompactFactors, LowRankFactors
from gakernels.nn.adapted_quantized_linear import AdaptedQuantizedLinear, adapted
from gakernels.nn.cpu_attention import CpuAttention
from gakernels.nn.factors_in_force import Block, innermost
from gakernels.nn.offloading import execution_device
from gakernels.nn.side_stream import Streams, streams_of
from gakernels.nn.token_loss import token_loss

GENERATOR_FILE = "generator.safetensors"
NEW_TOKENS = 32  # that `generate` writes, unless it is told otherwise
AnyAdapter = Adapter | CompactAdapter | QuantizedCompactAdapter


class _Users(OwnLock):
    """Who uses the weights of a base model, behind a lock for whoever wants to begin to."""

    def __init__(self) -> None:
        super().__init__()
        self.there: set[object] = set()


class _BeforeLayer:
    """The hook in front of a decoder layer; no closure, so that it is copied and pickled with its model."""

    def __init__(self, model: "GenerativeAdapter", sites: list[Site]) -> None:
        self._model, self._sites = model, sites

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._model._form_adapters(self._sites, layer, args[0] if args else kwargs["hidden_states"])


class GenerativeAdapter(nn.Module):
    """Generators attached to a base model.

    The base model is frozen and keeps its parameter names; its adapted linear layers, quantised or not, are exchanged
    for `AdaptedLinear` with the same parameters, and feed-forward parts and norms of the usual kind for `GatedMLP` and
    `FrozenRMSNorm`, which compute the same with less memory (`detach` puts the old ones back). The generators are the
    only trainable parameters.

    Which adapter is in use belongs to a thread or asyncio task, not to the model: several may use one model at the same
    time, each with its own adapter or context pass. Merging alone has the model for itself (docs/base_models.md).

    Args:
        base: any decoder-only transformers model whose decoder layers hold the named linear layers; wrappers around it
            (`torch.compile`, data parallel) are taken off.
        config: what is adapted and how.
        tokenizer: needed only where text goes in or comes out.
        dtype: of the generators' parameters; float32 if not given, whatever the base model has.

    Raises:
        InputError: config names layers that the model does not have or chunks that are longer than it reads, or the
            model already carries generators, is sharded or has an adapter of PEFT in it.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        config: GeneratorConfig,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        base = unwrapped(base)
        check_chunk_size(base.config, config.chunk_size)
        find_sites(base, config.linears, config.layers)  # refuses before anything is changed
        put_in_lean_modules(base)
        self._sites = find_sites(base, config.linears, config.layers)
        self._target_modules = target_modules(base, self.adapted_names)
        self._base_config = describe(base)
        self.base = base.requires_grad_(False).eval()
        self.generators = nn.ModuleDict()
        self._hooks: list[Any] = []
        self._streams: Streams | None = None
        self._originals: dict[str, Tensor] = {}
        self._users, self._tokenizing = _Users(), OwnLock()
        self._base_fingerprint: str | None = None
        self._layers_fingerprint: str | None = None
        self._other_bases: tuple[str, ...] = ()  # fingerprints that stand for this base too
        self._generator_fingerprint = FingerprintCache()
        self._attach(dtype)

    # Attaching

    def _attach(self, dtype: torch.dtype) -> None:
        hidden_size = self.base.config.get_text_config().hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            for number, site in enumerate(self._sites):
                generator = AdapterGenerator(
                    hidden_size,
                    site.linear.in_features,
                    site.linear.out_features,
                    state_size=self.config.state_size,
                    rank=self.config.rank,
                    norm=self.config.norm,
                    damping=self.config.damping,
                    power_iterations=self.config.power_iterations,
                    sketch_seed=self.config.seed * 1000 + number,
                    sketch_side=self.config.sketch_side,
                    static_rank=self.config.static_rank,
                )
                self.generators[_key(site.name)] = generator.to(execution_device(site.linear), dtype)
        layers = decoder_layers(self.base)[1]
        for number in sorted({site.layer for site in self._sites}):
            before = _BeforeLayer(self, [site for site in self._sites if site.layer == number])
            self._hooks.append(layers[number].register_forward_pre_hook(before, with_kwargs=True))
        for site in self._sites:
            site.replace(adapted(site.linear))

    def detach(self) -> PreTrainedModel:
        """Take the generators off: the base model as it was (frozen). This object can't be used afterwards."""
        self.unmerge()
        uncompile_layers(self.base)
        for hook in self._hooks:
            hook.remove()
        for site in self._sites:
            linear = site.linear
            if isinstance(linear, AdaptedLinear):
                site.replace(linear.to_linear())
        take_out_lean_modules(self.base)
        return self.base

    def _form_adapters(self, sites: Sequence[Site], layer: nn.Module, hidden: Tensor) -> None:
        """Form the adapters of one decoder layer from its input, during a context pass."""
        block = innermost()
        if block is None or sites[0].linear not in block.factors:
            return
        if torch.is_grad_enabled() and layer.training and getattr(layer, "gradient_checkpointing", False):
            raise InputError(
                "gradient checkpointing computes a layer again when its adapter is no longer in use; leave the base "
                "model in eval mode (gakernels.cost.memory.set_recomputation saves memory)"
            )
        if not isinstance(block.work, ContextPass):
            return
        for site in sites:
            arguments = (site.name, self.generator(site.name), hidden, self.config.adapter_scale)
            block.factors[site.linear] = (
                block.work.factors(*arguments)
                if self._streams is None
                else block.work.factors_later(*arguments, self._streams)
            )

    def overlap_generators(self, wanted: bool = True) -> None:
        """Form the adapters of a decoder layer on a second stream of the GPU, in the forward and in the backward.

        It runs beside what the layer does before it needs them: with `o_proj` adapted beside its attention. A layer
        whose `q_proj`, `k_proj` or `v_proj` is adapted needs them at once. On other devices only the order of the
        operations changes. Not for parameters whose memory comes and goes during a pass (FSDP).

        Raises:
            InputError: the base model is on several devices.
        """
        devices = {parameter.device for parameter in self.base.parameters()}
        if wanted and len(devices) > 1:
            raise InputError(f"the base model must be on one device to overlap the generators, but is on {devices}")
        self._streams = streams_of(self.device) if wanted else None

    def generator(self, name: str) -> AdapterGenerator:
        """The generator of a linear layer, by its name in the base model."""
        module = self.generators[_key(name)]
        assert isinstance(module, AdapterGenerator)
        return module

    @property
    def adapted_names(self) -> list[str]:
        """Names of the adapted linear layers in the base model."""
        return [site.name for site in self._sites]

    @property
    def device(self) -> torch.device:
        """Where the base model takes its input; of one on several devices, the first."""
        return execution_device(self.base)

    def train(self, mode: bool = True) -> "GenerativeAdapter":
        """Training mode for the generators only: the base model is frozen, so its dropout stays off."""
        super().train(mode)
        self.base.eval()
        return self

    # Passes over windows

    def forward(
        self,
        input_ids: Tensor,
        mask: Tensor,
        chunks: int,
        seen: Sequence[int],
        initial_states: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Encode windows, each with the adapter of the context chunks that it sees.

        Args:
            input_ids: (B, W, M), the first `chunks` windows of each row are its context.
            mask: (B, W, M) bool, False for padding, which must be on the right of each window.
            chunks: T >= 1.
            seen: (W,), how many context chunks the adapter of each window has seen: 0 for none (or only the initial
                states), t for window t of the context, and up to T for windows after it.
            initial_states: S_0 (B, d_r, d_r) by adapted layer.

        Returns:
            The last hidden states (B, W, M, d_h), for `logits`, and the states after the context by adapted layer.

        Raises:
            InputError: a shape does not fit, a window is longer than the base model reads, or an adapter is merged into
                it.
        """
        self._check_pass(input_ids, mask, chunks, seen, initial_states)
        first_is_plain = initial_states is None and chunks > 1 and only_first_is_plain(seen, chunks)
        if torch.is_grad_enabled() and first_is_plain and not self.config.static_rank:
            return self._forward_in_two(input_ids, mask, chunks, seen)
        context = ContextPass(len(input_ids), chunks, tuple(seen), mask[:, :chunks], initial_states)
        return self._encode(context, input_ids)

    def _forward_in_two(
        self, input_ids: Tensor, mask: Tensor, chunks: int, seen: Sequence[int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The first window alone, without a graph or a backward: nothing in it depends on the generators. Then the rest
        as a context that continues its states."""
        batch = len(input_ids)
        alone = ContextPass(batch, 1, (0,), mask[:, :1])  # made here, where gradients are on: its states carry them
        with torch.no_grad():
            first, first_states = self._encode(alone, input_ids[:, :1])
        rest = ContextPass(batch, chunks - 1, tuple(count - 1 for count in seen[1:]), mask[:, 1:chunks], first_states)
        hidden, states = self._encode(rest, input_ids[:, 1:])
        return torch.cat([first, hidden], dim=1), states

    def _encode(self, context: ContextPass, input_ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The last hidden states (B, W, M, d_h) and the states after the context by adapted layer, of one pass."""
        with self._block({}, context), CpuAttention():
            # No attention mask: attention is causal and the padding is on the right, so no token sees it.
            output = self.base.get_decoder()(input_ids=input_ids.flatten(0, 1), use_cache=False)
            for name in self.adapted_names:  # all are formed, so that all states are there
                self._linear(name).current_factors()
        return output.last_hidden_state.unflatten(0, input_ids.shape[:2]), context.states

    def _check_pass(
        self,
        input_ids: Tensor,
        mask: Tensor,
        chunks: int,
        seen: Sequence[int],
        initial_states: Mapping[str, Tensor] | None,
    ) -> None:
        if input_ids.dim() != 3 or mask.shape != input_ids.shape or mask.dtype != torch.bool:
            raise InputError(
                "input_ids must have shape (B, W, M) and mask must be bool of the same shape, but they are "
                f"{tuple(input_ids.shape)} and {mask.dtype} {tuple(mask.shape)}"
            )
        limit = position_limit(self.base.config)
        if limit is not None and input_ids.shape[2] > limit:
            raise InputError(
                f"windows must be at most the {limit} positions of the base model long, but are {input_ids.shape[2]}"
            )
        if not 1 <= chunks <= input_ids.shape[1] or len(seen) != input_ids.shape[1]:
            raise InputError(
                f"chunks must be between 1 and the {input_ids.shape[1]} windows and seen have one entry for each, "
                f"but they are {chunks} and {tuple(seen)}"
            )
        missing = [name for name in self.adapted_names if initial_states is not None and name not in initial_states]
        if missing:
            raise InputError(f"initial_states must have the states of all adapted layers, but {missing[0]} is missing")

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits (..., vocabulary) of last hidden states (..., d_h), as the base model's own head gives."""
        logits: Tensor = self.base.get_output_embeddings()(hidden)
        settings = self.base.config.get_text_config()
        factor = getattr(settings, "logit_scale", 1.0)  # Cohere
        divisor = getattr(settings, "logits_scaling", 1.0)  # Granite
        # Logits are large: a factor of one would cost another copy of them, and one more in the backward.
        logits = logits if factor == 1 else logits * factor
        logits = logits if divisor == 1 else logits / divisor
        cap = getattr(settings, "final_logit_softcapping", None)  # Gemma 2
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def token_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood (N,) of tokens (N,) behind hidden states (N, d_h); see `gakernels.nn.token_loss`."""
        return token_loss(hidden, targets, self.logits, self.base.config.get_text_config().vocab_size)

    # Contexts

    def stream(self) -> ContextStream:
        """A new, empty running context."""
        return ContextStream(self)

    @torch.no_grad()
    def states(
        self,
        contexts: Sequence[Sequence[int]],
        initial_states: Mapping[str, Tensor] | None = None,
        chunks_per_pass: int = 8,
    ) -> dict[str, Tensor]:
        """The states (B, d_r, d_r) by adapted layer after B contexts of token ids, each cut into even chunks.

        Args:
            contexts: token ids of each context.
            initial_states: S_0 (B, d_r, d_r) by adapted layer.
            chunks_per_pass: how many chunks of each context go in one forward pass; longer contexts take more passes,
                so memory does not grow with their length. The result is the same.

        Raises:
            InputError: a context is empty, a token id is not in the vocabulary, or chunks_per_pass is below 1.
        """
        states: dict[str, Tensor] = {}
        for states in self.passes(contexts, initial_states, chunks_per_pass):  # noqa: B007 (the last ones are meant)
            pass
        return states

    @torch.no_grad()
    def passes(
        self,
        contexts: Sequence[Sequence[int]],
        initial_states: Mapping[str, Tensor] | None = None,
        chunks_per_pass: int = 8,
    ) -> Iterator[dict[str, Tensor]]:
        """As `states`, one forward pass at a time: yields the states after each, so that a caller can do other things
        between them."""
        if chunks_per_pass < 1:
            raise InputError(f"chunks_per_pass must be at least 1, but it is {chunks_per_pass}")
        if not contexts:
            raise InputError("contexts must be at least one context, but there is none")
        ids, mask = pad_windows([split_evenly(tokens, self.config.chunk_size) for tokens in contexts], pad=0)
        vocabulary = self.base.get_input_embeddings().num_embeddings
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise InputError(
                f"token ids must be between 0 and {vocabulary - 1}, but {ids.min()}..{ids.max()} are there"
            )
        states = initial_states
        for start in range(0, ids.shape[1], chunks_per_pass):
            part, part_mask = (tensor[:, start : start + chunks_per_pass].to(self.device) for tensor in (ids, mask))
            chunks = part.shape[1]
            states = self(part, part_mask, chunks, range(chunks), states)[1]
            yield dict(states)

    @torch.no_grad()
    def adapters(self, states: Mapping[str, Tensor], tokens_seen: Sequence[int]) -> list[Adapter]:
        """The adapters of B states (B, d_r, d_r) by adapted layer."""
        factors = {name: self.generator(name).factors(states[name]) for name in self.adapted_names}
        fingerprint = self.generator_fingerprint()
        return [
            Adapter(
                # Copies, so that one adapter that is kept does not keep the memory of all.
                lora_a={name: pair[0][row].clone() for name, pair in factors.items()},
                lora_b={name: pair[1][row].clone() for name, pair in factors.items()},
                scale=self.config.adapter_scale,
                base_fingerprint=self.base_fingerprint(),
                generator_fingerprint=fingerprint,
                base_name=self.base.config.name_or_path,
                tokens_seen=tokens,
                target_modules=self._target_modules,
                base_config=self._base_config,
            )
            for row, tokens in enumerate(tokens_seen)
        ]

    @torch.no_grad()
    def compact_adapters(
        self, states: Mapping[str, Tensor], tokens_seen: Sequence[int], dtype: torch.dtype | None = None
    ) -> list[CompactAdapter]:
        """The compact adapters of B states (B, d_r, d_r) by adapted layer; see `CompactAdapter`.

        Args:
            states: as `states` gives them.
            tokens_seen: number of tokens behind each of them.
            dtype: of U and V; that of the states if not given.

        Raises:
            InputError: the generator's norm is `frobenius`, whose factors are not smaller than the state.
        """
        if self.config.norm == "frobenius":
            raise InputError('norm="frobenius" has no compact form: its factors are not smaller than the state itself')
        factors = {name: self.generator(name).norm_factors(states[name]) for name in self.adapted_names}
        left, right = (
            {name: pair[side].to(dtype or pair[side].dtype) for name, pair in factors.items()} for side in (0, 1)
        )
        fingerprint = self.generator_fingerprint()
        return [
            CompactAdapter(
                # Copies, so that one that is kept does not keep the memory of all.
                left={name: factor[row].clone() for name, factor in left.items()},
                right={name: factor[row].clone() for name, factor in right.items()},
                base_fingerprint=self.base_fingerprint(),
                generator_fingerprint=fingerprint,
                tokens_seen=tokens,
            )
            for row, tokens in enumerate(tokens_seen)
        ]

    @torch.no_grad()
    def expand(self, compact: CompactAdapter) -> Adapter:
        """The adapter of a compact one, which this generator made; see `CompactAdapter.expand`."""
        self._check_compact(compact)
        factors = {}
        for name in self.adapted_names:
            generator = self.generator(name)
            left, right = (factor[name].to(generator.sketch.device) for factor in (compact.left, compact.right))
            factors[name] = generator.expand(left, right)
        return Adapter(
            lora_a={name: pair[0] for name, pair in factors.items()},
            lora_b={name: pair[1] for name, pair in factors.items()},
            scale=self.config.adapter_scale,
            base_fingerprint=self.base_fingerprint(),
            generator_fingerprint=compact.generator_fingerprint,
            base_name=self.base.config.name_or_path,
            tokens_seen=compact.tokens_seen,
            target_modules=self._target_modules,
            base_config=self._base_config,
        )

    def _check_compact(self, compact: CompactAdapter) -> None:
        for what, found, own in (
            ("base model", compact.base_fingerprint, self.base_fingerprints()),
            ("generator", compact.generator_fingerprint, (self.generator_fingerprint(),)),
        ):
            if found not in own:
                raise FormatError(
                    f"the compact adapter belongs to a {what} of fingerprint {found}, but this one has {own[0]}"
                )
        size = (self.config.state_size, compact.rank)
        if any(set(side) != set(self.adapted_names) for side in (compact.left, compact.right)) or any(
            factor.shape != size for factor in [*compact.left.values(), *compact.right.values()]
        ):
            raise FormatError("the compact adapter is of other linear layers or another size than this generator")

    @overload
    def adapt(self, contexts: str) -> Adapter: ...  # type: ignore[overload-overlap] # a text is a sequence of texts too

    @overload
    def adapt(self, contexts: Sequence[int] | Tensor) -> Adapter: ...

    @overload
    def adapt(self, contexts: Sequence[str | Sequence[int]]) -> list[Adapter]: ...

    def adapt(self, contexts: str | Sequence[int] | Tensor | Sequence[str | Sequence[int]]) -> Adapter | list[Adapter]:
        """The adapter of a context, or the list of adapters of a list of contexts, encoded together as one batch.

        Args:
            contexts: a context is a text or a sequence of token ids.

        Raises:
            InputError: there is no context, one is empty, or there is no tokenizer for a text.
        """
        one = isinstance(contexts, str) or not isinstance(contexts, Iterable)
        several: list[Any] = [contexts] if one else list(contexts)
        if not one and several and is_token(several[0]):
            one, several = True, [several]
        tokens = [self._encode_context(context, first=True) for context in several]
        adapters = self.adapters(self.states(tokens), [len(row) for row in tokens])
        return adapters[0] if one else adapters

    def _encode_context(self, context: str | Sequence[int], first: bool) -> list[int]:
        with self._tokenizing:
            return encode(self.tokenizer, context, first)

    # Using adapters

    @contextmanager
    def adapted(self, adapters: AnyAdapter | Sequence[AnyAdapter]) -> Iterator[None]:
        """The base model with an adapter, or with one adapter per row of the batch, while the block runs.

        With n adapters the rows of a batch must be a multiple of n: each adapter serves that many consecutive rows.
        The adapters are in use in the current thread or asyncio task alone, and in tasks that it starts in the block; a
        thread that is started in the block has none (`contextvars.copy_context().run` hands them on).

        Args:
            adapters: compact ones, which must be of this generator, are expanded.

        Raises:
            InputError: an adapter is merged into the base model, the adapters differ in scale or rank, or the block
                ends out of its place (see `Block.in_force`).
            FormatError: an adapter was made for another base model or for other layers.
        """
        several = [self._expanded(adapter) for adapter in _as_list(adapters)]
        self._check_adapters(several)
        factors = {}
        for site in self._sites:
            device = execution_device(site.linear)
            lora_a, lora_b = (factor.to(device, self.base.dtype) for factor in stack(several, site.name))
            factors[site.name] = LowRankFactors(lora_a, lora_b, several[0].scale)
        with self.using(factors):
            yield

    @contextmanager
    def using(self, factors: Mapping[str, LowRankFactors | CompactFactors]) -> Iterator[None]:
        """The base model with the given factors, by adapted layer, while the block runs; as `adapted` otherwise."""
        with self._block(factors):
            yield

    @contextmanager
    def _block(
        self, factors: Mapping[str, LowRankFactors | CompactFactors], work: ContextPass | None = None
    ) -> Iterator[None]:
        block = Block({site.linear: factors.get(site.name) for site in self._sites}, work)
        with self._in_use(merged=not factors and work is None), block.in_force():
            yield

    @contextmanager
    def _in_use(self, merged: bool = False) -> Iterator[None]:
        """Hold off `merge` and `unmerge` while the block runs; wait for one that has begun.

        Raises:
            InputError: an adapter is merged into the base model, which the block is not meant for.
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

    def merge(self, adapter: AnyAdapter) -> None:
        """Add an adapter into the weights of the base model; `unmerge` restores them bit by bit from a copy.

        Raises:
            InputError: an adapter is merged already, the model is in use (in a block of `adapted`, a context pass or
                `generate`, of any thread or task), or the weights are quantised or offloaded.
            FormatError: the adapter was made for another base model or for other layers.
        """
        adapter = self._expanded(adapter)
        with self._alone(), torch.no_grad():
            self._check_mergeable(adapter)
            for site in self._sites:
                self._originals[site.name] = site.linear.weight.detach().clone()
                site.linear.weight.copy_(_merged_weight(site.linear, adapter.delta(site.name)))

    def unmerge(self) -> None:
        """Restore the weights from before `merge`; nothing happens if nothing is merged.

        Raises:
            InputError: the model is in use.
        """
        if not self._originals:
            return
        with self._alone(), torch.no_grad():
            for name, original in self._originals.items():
                self._linear(name).weight.copy_(original)
            self._originals.clear()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While the block runs, nobody begins to use the model. Raises: InputError: it is in use."""
        with self._users:
            if self._users.there:
                raise InputError(
                    "the base model is in use, here or in another thread or task; leave the block of adapted() before "
                    "merge() and unmerge()"
                )
            yield

    def _check_mergeable(self, adapter: Adapter) -> None:
        if self._originals:
            raise InputError("an adapter is merged into the base model already; call unmerge() first")
        if any(isinstance(site.linear, AdaptedQuantizedLinear) for site in self._sites):
            raise InputError(
                "an adapter can't be merged into weights that are quantised or offloaded; merge it into the full base "
                "model (nor into layers that compute in a way of their own)"
            )
        self._check_adapters([adapter])

    def save_merged(self, adapter: AnyAdapter, folder: str | Path) -> None:
        """Write a plain model folder, with the tokenizer: the base model with an adapter merged into its weights.

        The base model here stays as it is, also while this runs. Other files in the folder stay.

        Raises:
            InputError: an adapter is merged already, the weights are quantised or offloaded, or there is a file of that
                name.
            FormatError: the adapter was made for another base model or for other layers.
            OSError: it could not be written; what was there is unharmed.
        """
        adapter = self._expanded(adapter)
        self._check_mergeable(adapter)
        with self._in_use(), torch.no_grad(), replacing_folder(Path(folder)) as temporary:
            weights = self.base.state_dict()
            for site in self._sites:
                weights[f"{site.name}.weight"] = _merged_weight(site.linear, adapter.delta(site.name))
            self.base.save_pretrained(temporary, state_dict=weights)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(temporary)

    def _expanded(self, adapter: AnyAdapter) -> Adapter:
        """An adapter in whatever form as the plain one."""
        if isinstance(adapter, QuantizedCompactAdapter):
            adapter = adapter.dequantize()
        if isinstance(adapter, CompactAdapter):
            return self.expand(adapter)
        if not isinstance(adapter, Adapter):
            raise InputError(
                f"adapters must be Adapter objects, as adapt() and Adapter.load(path) give, but one is {adapter!r:.60}"
            )
        return adapter

    @torch.no_grad()
    def generate(self, prompts: str | Sequence[str], **options: Any) -> list[str]:
        """Continue texts with the base model as it is now (see `adapted`), by transformers' `generate`.

        Decoding is greedy, whatever generation settings the base model comes with: of these only the tokens that end a
        text are kept. Anything else is up to the options.

        Args:
            prompts: one text or several; several are padded on the left.
            options: for `generate`, such as `num_beams` or `generation_config`. If they don't say how long, at most 32
                tokens are written, and no more than the base model has positions for.

        Returns:
            The new text of each prompt, without the prompt and special tokens.

        Raises:
            InputError: there is no tokenizer, no prompt or an empty one, the prompts are not a multiple of the adapters
                in use, or a prompt and its continuation go beyond the positions of the base model.
        """
        if self.tokenizer is None:
            raise InputError("tokenizer is needed to turn text into tokens; pass one to GenerativeAdapter")
        if options.get("return_dict_in_generate"):
            raise InputError("return_dict_in_generate: texts are returned; for more, call model.base.generate instead")
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not all(isinstance(text, str) for text in texts):
            raise InputError(f"prompts must be one text or several, but they are {prompts!r:.60}")
        with self._tokenizing:
            rows = [encode_text(self.tokenizer, text) for text in texts]
        if not all(rows) or not rows:
            raise InputError("prompts must be at least one prompt, each of at least one token")
        known = self.base.get_input_embeddings().num_embeddings
        for number, row in enumerate(rows, 1):
            check_tokens(self.tokenizer, row, known, f"prompt {number}")
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        padding = next((token for token in candidates if token is not None and token < known), 0)
        ids, mask = (tensor.to(self.device) for tensor in pad_left(rows, padding))
        settings = {"do_sample": False, **self._length(ids.shape[1], options)} | options
        defaults = GenerationConfig(eos_token_id=list(self.end_tokens()) or None, pad_token_id=padding)
        with self._in_use(merged=True):
            output = _with_defaults(self.base, defaults).generate(input_ids=ids, attention_mask=mask, **settings)
        with self._tokenizing:
            texts = self.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def end_tokens(self) -> tuple[int, ...]:
        """The ids that end a text: those of the base model's generation settings, and the tokenizer's."""
        configured = getattr(self.base.generation_config, "eos_token_id", None)
        several = configured if isinstance(configured, list) else [configured]
        if self.tokenizer is not None:
            several = [*several, self.tokenizer.eos_token_id]
        return tuple(sorted({int(token) for token in several if token is not None}))

    def _length(self, prompt: int, options: Mapping[str, Any]) -> dict[str, int]:
        """How many tokens may be written, where the options don't say it. Raises: InputError: beyond the positions."""
        limit, given = position_limit(self.base.config), dict(options)
        config = given.get("generation_config")
        for name in ("max_new_tokens", "max_length"):
            given.setdefault(name, getattr(config, name, None))
        new_tokens, length = given["max_new_tokens"], given["max_length"]
        if new_tokens is None and length is None:
            room = NEW_TOKENS if limit is None else min(NEW_TOKENS, limit - prompt)
            check_prompt(limit, prompt, max(room, 1))
            return {"max_new_tokens": room}
        if new_tokens is None and length <= prompt:
            raise InputError(f"max_length must be above the {prompt} tokens of the prompt, but it is {length}")
        check_prompt(limit, prompt, length - prompt if new_tokens is None else new_tokens)
        return {}

    def _check_adapters(self, adapters: Sequence[Adapter]) -> None:
        for adapter in adapters:
            if adapter.base_fingerprint not in self.base_fingerprints():
                raise FormatError(
                    f"adapter belongs to a base model with fingerprint {adapter.base_fingerprint} "
                    f"({adapter.base_name or 'no name'}), but this base model has {self.base_fingerprint()}"
                )
            if set(adapter.lora_a) != set(self.adapted_names):
                raise FormatError("adapter adapts other linear layers than this generator")
            for name, lora_a in adapter.lora_a.items():
                linear, lora_b = self._linear(name), adapter.lora_b[name]
                sizes = (linear.out_features, linear.in_features)
                if (lora_b.shape[0], lora_a.shape[1]) != sizes:
                    raise FormatError(f"adapter does not have the sizes of {name}, {sizes}")

    def _linear(self, name: str) -> AdaptedLinear:
        linear = self.base.get_submodule(name)
        assert isinstance(linear, AdaptedLinear)
        return linear

    # Files

    def base_fingerprint(self) -> str:
        """Fingerprint of the base model; computed once."""
        if self._base_fingerprint is None:
            self._base_fingerprint = model_fingerprint(self.base)
        return self._base_fingerprint

    def base_layers_fingerprint(self) -> str:
        """Fingerprint of its decoder layers alone, which is what a generator depends on; computed once."""
        if self._layers_fingerprint is None:
            self._layers_fingerprint = layers_fingerprint(self.base)
        return self._layers_fingerprint

    def base_fingerprints(self) -> tuple[str, ...]:
        """Fingerprints that files for this base model may name: its own first, then those that it was let stand for."""
        return self.base_fingerprint(), *self._other_bases

    def generator_fingerprint(self) -> str:
        """Fingerprint of the generators' present parameters and sketches, and of what turns states into adapters."""
        tensors = [*self.generators.parameters(), *self.generators.buffers()]
        return self._generator_fingerprint.get(tensors, lambda: self._fingerprint_of(self.generator_tensors()))

    def _fingerprint_of(self, tensors: Mapping[str, Tensor]) -> str:
        settings = {name: getattr(self.config, name) for name in ("norm", "damping", "power_iterations")}
        settings["scale"] = self.config.adapter_scale
        if self.config.sketch_side != "input":  # the name came later; fingerprints from before stay
            settings["sketch_side"] = self.config.sketch_side
        return tensor_fingerprint(tensors.items(), json.dumps(settings))

    def generator_tensors(self) -> dict[str, Tensor]:
        """Parameters and sketches of all generators, named by adapted layer.

        Where they are sharded over several processes, all of these make the call together.
        """
        return {
            f"{name}.{key}": tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            for name in self.adapted_names
            for key, tensor in self.generator(name).state_dict().items()
        }

    def save_pretrained(self, folder: str | Path, base_name: str | None = None) -> None:
        """Write the generators to a folder; `from_pretrained` reads it. The base model is not written.

        Args:
            folder: gets `generator.safetensors`, with everything, and `generator.json`, the same description to read.
            base_name: name or path of the base model to write down, if not the one that it was loaded from; a path is
                looked for from the folder first.

        Raises:
            OSError: it could not be written; older files are unharmed.
        """
        tensors = self.generator_tensors()
        description = {
            "config": self.config.to_dict(),
            "base_name": self.base.config.name_or_path if base_name is None else base_name,
            "base_fingerprint": self.base_fingerprint(),
            "base_layers_fingerprint": self.base_layers_fingerprint(),
            "generator_fingerprint": self._fingerprint_of(tensors),
        }
        write_tensors(Path(folder) / GENERATOR_FILE, "generator", tensors, description)
        write_text(Path(folder) / "generator.json", json.dumps(description, indent=2) + "\n")

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
            base: the base model, or its name or path; if not given, the one that the generator names.
            tokenizer: if not given, the base model's, where there is one.
            dtype: of the generators' parameters.
            allow_other_base: take a base model whose decoder layers are not those that the generator was trained for,
                with a warning. One that differs outside of them alone (tokens were added) is taken with one anyway.
            base_options: for `AutoModelForCausalLM.from_pretrained`.

        Raises:
            InputError: a file or model is missing, or `GenerativeAdapter` refuses the base model.
            FormatError: a file is damaged, or the base model is not the one the generator was trained for.
        """
        from gakernels.model.released import is_released, load_released  # which needs this class

        folder = local_folder(folder)
        if is_released(folder):
            return load_released(folder, base, tokenizer, dtype, **base_options)
        path = folder / GENERATOR_FILE
        tensors, description = read_tensors(path, "generator")
        config = _read_config(path, description)
        _check_sketches(path, config, tensors)
        base_name, wanted = (entry(path, description, name, str) for name in ("base_name", "base_fingerprint"))
        if not isinstance(base, nn.Module):
            name = locate(folder, base_name if base is None else str(base))
            base, tokenizer = load_base(name, tokenizer, **base_options)
        base = unwrapped(base)
        own = model_fingerprint(base)
        if own != wanted:
            layers = entry(path, {"base_layers_fingerprint": "", **description}, "base_layers_fingerprint", str)
            same_layers = layers == layers_fingerprint(base)
            _check_other_base(path, base_name, wanted, own, same_layers, allow_other_base)
        model = cls(base, config, tokenizer, dtype)
        # With the same layers it makes the adapters that the base of the generator would.
        model._base_fingerprint = wanted if own == wanted or same_layers else own
        model._other_bases = () if own == wanted else (own if same_layers else wanted,)
        try:
            model.load_generator_tensors(tensors, str(path))
        except FormatError:
            model.detach()
            raise
        return model

    def load_generator_tensors(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Put saved parameters and sketches into the generators.

        Raises:
            FormatError: names or shapes differ; nothing has been changed then.
        """
        own = self.generator_tensors()
        for name in sorted(set(own) | set(tensors)):
            if name not in own or name not in tensors or own[name].shape != tensors[name].shape:
                raise FormatError(
                    f"{source} does not fit this generator: {name} is missing, unknown or of another shape"
                )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])


def load_base(
    name: str, tokenizer: PreTrainedTokenizerBase | None = None, tokenizer_name: str | None = None, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A causal language model and its tokenizer, if it has one, from a folder or the Hugging Face hub.

    Args:
        name: folder or name of the model.
        tokenizer: the tokenizer, if there is one already.
        tokenizer_name: folder or name of the tokenizer, if it is not with the model.
        options: for `AutoModelForCausalLM.from_pretrained`.

    Raises:
        InputError: there is no model of that name, a file of it is damaged, or it is a PEFT adapter.
    """
    try:
        base = AutoModelForCausalLM.from_pretrained(name, **options)
    except torch.OutOfMemoryError:
        raise
    except (
        Exception
    ) as error:  # whatever transformers trips over in a damaged folder, or a pickle with more than tensors
        raise InputError(f"base model {name!r} can't be loaded: {first_line(error)}") from error
    if getattr(base, "_hf_peft_config_loaded", False):
        raise InputError(
            f"base model {name!r} is a PEFT adapter (adapter_config.json) on top of a base model; merge it first and "
            "name the merged folder: AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload()"
        )
    _keep_soft_cap(base, options)
    if tokenizer is not None:
        return base, tokenizer
    name = tokenizer_name or name
    try:
        return base, AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the package tokenizers raises nothing narrower
        if any(Path(name).glob("tokenizer*")):  # it has one, and that is damaged
            raise InputError(f"the tokenizer of {name!r} can't be loaded: {first_line(error)}") from error
        return base, None


def _keep_soft_cap(base: PreTrainedModel, options: Mapping[str, Any]) -> None:
    """Transformers before 5.21 gives Gemma 2 an attention that leaves the soft cap of its logits out."""
    config = base.config.get_text_config()
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    if capped and config._attn_implementation == "sdpa" and options.get("attn_implementation") is None:
        base.set_attn_implementation("eager")


def layers_fingerprint(base: PreTrainedModel) -> str:
    """Fingerprint of the decoder layers alone."""
    return model_fingerprint(base, decoder_layers(base)[0])


def _check_other_base(path: Path, name: str, wanted: str, own: str, same_layers: bool, allowed: bool) -> None:
    """A base model is not the one that a generator was trained for: a warning, or a FormatError."""
    difference = (
        f"base must be the model that {path} was trained for (fingerprint {wanted}, {name or 'no name'}), but its "
        f"fingerprint is {own}"
    )
    if same_layers:
        warnings.warn(
            f"{difference}; its decoder layers are the same, so adapters fit if only tokens were added", stacklevel=3
        )
    elif allowed:
        warnings.warn(f"{difference}; taken all the same, as allow_other_base says", stacklevel=3)
    else:
        raise FormatError(f"{difference}; allow_other_base (--allow-other-base) takes it all the same")


def _as_list(adapters: AnyAdapter | Sequence[AnyAdapter]) -> list[AnyAdapter]:
    if isinstance(adapters, (str, Path)):
        raise InputError(f"adapters must be Adapter objects, but there is a name; load it: Adapter.load({adapters!r})")
    return [adapters] if isinstance(adapters, AnyAdapter) else list(adapters)


def _merged_weight(linear: AdaptedLinear, delta: Tensor) -> Tensor:
    """The weight of a layer with an adapter in it, rounded once."""
    weight = linear.weight.detach()
    return (weight.to(delta.dtype) + delta.to(weight.device)).to(weight.dtype)


def _with_defaults(base: PreTrainedModel, defaults: GenerationConfig) -> Any:
    """A view of a model that has other generation settings: transformers fills up whatever a caller leaves open from
    those of the model, and setting them on the model itself would change them for everybody."""
    view = object.__new__(type(base))
    view.__dict__.update({**vars(base), "generation_config": defaults})
    return view


def _read_config(path: Path, description: Mapping[str, Any]) -> GeneratorConfig:
    config = entry(path, description, "config", dict)
    try:
        return GeneratorConfig.from_dict(config)
    except InputError as error:
        raise FormatError(f"{path} can't be read: {error}") from error


def _check_sketches(path: Path, config: GeneratorConfig, tensors: Mapping[str, Tensor]) -> None:
    """Before generators of the sizes that a file names are made: a damaged one may name sizes beyond any memory."""
    sketches = [tensor for name, tensor in tensors.items() if name.endswith(".sketch")]
    if not sketches or any(sketch.shape != (config.state_size, config.rank) for sketch in sketches):
        raise FormatError(f"{path} is damaged: its tensors do not have the sizes that its settings name")


def locate(folder: Path, name: str) -> str:
    """A relative path counts from the generator's folder, if it exists there."""
    beside = folder / name
    return str(beside) if name and beside.is_dir() else name


def _key(name: str) -> str:
    return name.replace(".", "/")  # a ModuleDict key can't contain dots
