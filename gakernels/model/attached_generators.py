"""Generators attached to a base model: passes over windows, and context states."""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gakernels.errors import FormatError, InputError, check_least
from gakernels.fingerprint import FingerprintCache, tensor_fingerprint
from gakernels.model.attachment import (
    Site,
    check_kind,
    decoder_layers,
    decoder_name,
    describe,
    find_sites,
    put_in_lean_modules,
    take_out_lean_modules,
    target_modules,
    unwrapped,
)
from gakernels.model.base_model import layers_fingerprint, model_fingerprint
from gakernels.model.compilation import uncompile_layers
from gakernels.model.config import GeneratorConfig
from gakernels.model.context_pass import ContextPass
from gakernels.model.encoding import encode_context
from gakernels.model.own_lock import OwnLock
from gakernels.model.packing import rows_packed
from gakernels.model.positions import check_chunk_size, position_limit
from gakernels.model.shared_weights import SharedWeights
from gakernels.model.windows import only_first_is_plain, pad_windows, split_evenly
from gakernels.nn import AdaptedLinear, AdapterGenerator, CompactFactors, LowRankFactors
from gakernels.nn.adapted_opaque_linear import adapted, linear_sizes
from gakernels.nn.cpu_attention import CpuAttention
from gakernels.nn.factors_in_force import Block, innermost
from gakernels.nn.offloading import execution_device
from gakernels.nn.side_stream import Streams, streams_of
from gakernels.nn.token_loss import token_loss


class _BeforeLayer:
    """The pre-forward hook of a decoder layer; not a closure, so that it can be copied and pickled with its model."""

    def __init__(self, model: "AttachedGenerators", sites: list[Site]) -> None:
        self._model, self._sites = model, sites

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._model._form_adapters(self._sites, layer, args[0] if args else kwargs["hidden_states"])


class AttachedGenerators(nn.Module):
    """A frozen base model with generators, see `GenerativeAdapter`.

    Attributes:
        weights: tracks who uses the weights of the base model, and what is merged into them.
        tokenizing: lock held while the tokenizer is in use, because threads can't share it.
        chat_template: the Jinja template of the conversations that the generators were tuned on; None if they were not.
    """

    chat_template: str | None = None

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
        check_kind(base)
        check_chunk_size(base.config, config.chunk_size)
        find_sites(base, config.linears, config.layers)  # raises before anything is changed
        put_in_lean_modules(base)
        self._sites = find_sites(base, config.linears, config.layers)
        self.target_modules = target_modules(base, self.adapted_names)
        self.base_config = describe(base)
        self.base = base.requires_grad_(False).eval()
        self._decoder_name = decoder_name(base)
        self.generators = nn.ModuleDict()
        self._hooks: list[Any] = []
        self._streams: Streams | None = None
        self.weights, self.tokenizing = SharedWeights(), OwnLock()
        self._base_fingerprint: str | None = None
        self._layers_fingerprint: str | None = None
        self._other_bases: tuple[str, ...] = ()  # other fingerprints accepted for this base
        self._generator_fingerprint = FingerprintCache()
        self._attach(dtype)

    # Attaching

    def _attach(self, dtype: torch.dtype) -> None:
        hidden_size = self.base.config.get_text_config().hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            for number, site in enumerate(self._sites):
                sizes = linear_sizes(site.linear)
                assert sizes is not None
                generator = AdapterGenerator(
                    hidden_size,
                    *sizes,
                    state_size=self.config.state_size,
                    rank=self.config.rank,
                    norm=self.config.norm,
                    damping=self.config.damping,
                    power_iterations=self.config.power_iterations,
                    sketch_seed=self.config.seed * 1000 + number,
                    sketch_side=self.config.sketch_side,
                    static_rank=self.config.static_rank,
                    token_weights=self.config.token_weights,
                    delta_rule=self.config.delta_rule,
                )
                self.generators[_key(site.name)] = generator.to(execution_device(site.linear), dtype)
        layers = decoder_layers(self.base)[1]
        for number in sorted({site.layer for site in self._sites}):
            before = _BeforeLayer(self, [site for site in self._sites if site.layer == number])
            self._hooks.append(layers[number].register_forward_pre_hook(before, with_kwargs=True))
        for site in self._sites:
            site.replace(adapted(site.linear))

    def use_chat_template(self, template: str) -> None:
        """Write conversations with this Jinja template, and store it with the generators.

        The model gets a tokenizer of its own for that; the given one keeps its template.
        """
        self.chat_template = template
        if self.tokenizer is not None:
            self.tokenizer = copy.copy(self.tokenizer)
            self.tokenizer.chat_template = template

    def detach(self) -> PreTrainedModel:
        """Remove the generators and return the original (frozen) base model. This object can't be used afterwards."""
        self.weights.unmerge(self.linears())
        uncompile_layers(self.base)
        for layer in decoder_layers(self.base)[1]:
            layer.__dict__.pop("forward", None)  # of a layer that is recomputed as a whole
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
        if hidden.dim() != 3 or hidden.shape[-1] != self.base.config.get_text_config().hidden_size:
            raise InputError(
                "base must have layers that read hidden states (rows, tokens, hidden_size), but "
                f"{type(layer).__name__} reads {tuple(hidden.shape)}"
            )
        for site in sites:
            arguments = (site.name, self.generator(site.name), hidden, self.config.adapter_scale)
            block.factors[site.linear] = (
                block.work.factors(*arguments)
                if self._streams is None
                else block.work.factors_later(*arguments, self._streams)
            )

    def overlap_generators(self, wanted: bool = True) -> None:
        """Form the adapters of a decoder layer on a second stream of the GPU, in the forward and in the backward.

        It overlaps with what the layer computes before it needs them: with its attention if `o_proj` is adapted. A
        layer whose `q_proj`, `k_proj` or `v_proj` is adapted needs them at once. On other devices only the order of
        the operations changes. Not for parameters that are freed and gathered during a pass (FSDP).

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
    def decoder(self) -> Any:
        """The text decoder of the base model, which has no head."""
        return self.base.get_submodule(self._decoder_name)

    @property
    def adapted_names(self) -> list[str]:
        """Names of the adapted linear layers in the base model."""
        return [site.name for site in self._sites]

    @property
    def device(self) -> torch.device:
        """The device of the base model's input; the first one if the model is spread over several."""
        return execution_device(self.base)

    def train(self, mode: bool = True) -> "AttachedGenerators":
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
            input_ids: (B, W, M); the first `chunks` windows of each row are its context.
            mask: (B, W, M) bool, False for padding, which must be on the right of each window.
            chunks: T >= 1.
            seen: (W,), number of context chunks that the adapter of each window has seen: 0 for none (or only the
                initial states), t for window t of the context, and up to T for windows after it.
            initial_states: S_0 (B, d_r, d_r) by adapted layer.

        Returns:
            The last hidden states (B, W, M, d_h), for `logits`, and the states after the context by adapted layer.

        Raises:
            InputError: a shape does not fit, a window is longer than the base model reads, or an adapter is merged into
                it.
        """
        hidden, context = self._pass(input_ids, mask, chunks, seen, initial_states)
        return hidden, context.states

    def read(
        self, input_ids: Tensor, mask: Tensor, chunks: int, seen: Sequence[int], owner: Tensor
    ) -> tuple[Tensor, dict[str, LowRankFactors]]:
        """As `forward`, but returns the adapters of the whole contexts, for further windows about them.

        Args:
            input_ids: as in `forward`.
            mask: as in `forward`.
            chunks: as in `forward`.
            seen: as in `forward`.
            owner: (N,), for each further window the row of its context.
        """
        hidden, context = self._pass(input_ids, mask, chunks, seen, None)
        scale = self.config.adapter_scale
        return hidden, {
            name: context.last_factors(name, self.generator(name), scale, owner) for name in self.adapted_names
        }

    def _pass(
        self,
        input_ids: Tensor,
        mask: Tensor,
        chunks: int,
        seen: Sequence[int],
        initial_states: Mapping[str, Tensor] | None,
    ) -> tuple[Tensor, ContextPass]:
        self._check_pass(input_ids, mask, chunks, seen, initial_states)
        first_is_plain = initial_states is None and chunks > 1 and only_first_is_plain(seen, chunks)
        if torch.is_grad_enabled() and first_is_plain and not self.config.static_rank:
            return self._pass_in_two(input_ids, mask, chunks, seen)
        context = ContextPass(len(input_ids), chunks, tuple(seen), mask[:, :chunks], initial_states)
        return self._encode(context, input_ids), context

    def _pass_in_two(
        self, input_ids: Tensor, mask: Tensor, chunks: int, seen: Sequence[int]
    ) -> tuple[Tensor, ContextPass]:
        """Run the first window alone, without an autograd graph, since nothing in it depends on the generators, then
        the rest as a context that continues its states."""
        batch = len(input_ids)
        alone = ContextPass(batch, 1, (0,), mask[:, :1])  # made while gradients are enabled: its states carry them
        with torch.no_grad():
            first = self._encode(alone, input_ids[:, :1])
        counts = tuple(count - 1 for count in seen[1:])
        rest = ContextPass(batch, chunks - 1, counts, mask[:, 1:chunks], alone.states)
        return torch.cat([first, self._encode(rest, input_ids[:, 1:])], dim=1), rest

    def _encode(self, context: ContextPass, input_ids: Tensor) -> Tensor:
        """Run one pass: the last hidden states (B, W, M, d_h); states and adapters go into `context`."""
        with self._block({}, context), CpuAttention(), rows_packed(False):
            # No attention mask: attention is causal and the padding is on the right, so no token sees it.
            output = self.decoder(input_ids=input_ids.flatten(0, 1), use_cache=False)
            for name in self.adapted_names:  # wait for all adapters, so that all states exist
                factors = self._linear(name).current_factors()
                if isinstance(factors, LowRankFactors):
                    context.formed[name] = factors
        hidden: Tensor = output.last_hidden_state
        return hidden.unflatten(0, input_ids.shape[:2])

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
        """Logits (..., vocabulary) of last hidden states (..., d_h), as the base model's own head computes them."""
        logits: Tensor = self.base.get_output_embeddings()(hidden)
        settings = self.base.config.get_text_config()
        factor = getattr(settings, "logit_scale", 1.0)  # Cohere
        divisor = getattr(settings, "logits_scaling", 1.0)  # Granite
        # Logits are large: multiplying by one would cost another copy, and one more in the backward.
        logits = logits if factor == 1 else logits * factor
        logits = logits if divisor == 1 else logits / divisor
        cap = getattr(settings, "final_logit_softcapping", None)  # Gemma 2
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def token_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood (N,) of tokens (N,) given hidden states (N, d_h); see `gakernels.nn.token_loss`."""
        return token_loss(hidden, targets, self.logits, self.base.config.get_text_config().vocab_size)

    # Context states

    @torch.no_grad()
    def states(
        self,
        contexts: Sequence[Sequence[int]],
        initial_states: Mapping[str, Tensor] | None = None,
        chunks_per_pass: int = 8,
    ) -> dict[str, Tensor]:
        """The states (B, d_r, d_r) by adapted layer after reading B contexts, each cut into even chunks.

        Args:
            contexts: token ids of each context.
            initial_states: S_0 (B, d_r, d_r) by adapted layer.
            chunks_per_pass: chunks of each context per forward pass. Longer contexts take more passes, so memory does
                not grow with their length. The result is the same.

        Raises:
            InputError: a context is empty, a token id is not in the vocabulary, or chunks_per_pass is below 1.
        """
        states: dict[str, Tensor] = {}
        for states in self.passes(contexts, initial_states, chunks_per_pass):  # noqa: B007 (only the last are needed)
            pass
        return states

    @torch.no_grad()
    def passes(
        self,
        contexts: Sequence[Sequence[int]],
        initial_states: Mapping[str, Tensor] | None = None,
        chunks_per_pass: int = 8,
    ) -> Iterator[dict[str, Tensor]]:
        """Like `states`, one forward pass at a time: yields the states after each pass, so that a caller can do other
        work in between."""
        check_least(1, chunks_per_pass=chunks_per_pass)
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

    def encode_context(self, context: str | Sequence[int], first: bool) -> list[int]:
        """Token ids of a piece of context; see `encoding.encode_context`."""
        with self.tokenizing:
            return encode_context(self.tokenizer, context, first)

    # Adapters in use

    @contextmanager
    def using(self, factors: Mapping[str, LowRankFactors | CompactFactors]) -> Iterator[None]:
        """Use the given factors, by adapted layer, while the block runs; otherwise like `adapted`."""
        with self._block(factors):
            yield

    @contextmanager
    def _block(
        self, factors: Mapping[str, LowRankFactors | CompactFactors], work: ContextPass | None = None
    ) -> Iterator[None]:
        block = Block({site.linear: factors.get(site.name) for site in self._sites}, work)
        with self.weights.in_use(merged=not factors and work is None), block.in_force():
            yield

    def _linear(self, name: str) -> AdaptedLinear:
        linear = self.base.get_submodule(name)
        assert isinstance(linear, AdaptedLinear)
        return linear

    def linears(self) -> dict[str, AdaptedLinear]:
        """The adapted linear layers, by name in the base model."""
        return {name: self._linear(name) for name in self.adapted_names}

    # Identity

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
        """The fingerprints that files for this base model may name: its own first, then others that it accepts."""
        return self.base_fingerprint(), *self._other_bases

    def set_base_fingerprints(self, fingerprints: tuple[str, ...]) -> None:
        """Set the accepted fingerprints: the first one goes into new files. If empty, the model keeps its own."""
        if fingerprints:
            self._base_fingerprint, self._other_bases = fingerprints[0], fingerprints[1:]

    def generator_fingerprint(self) -> str:
        """Fingerprint of the generators' current parameters and sketches, and of what turns states into adapters."""
        tensors = [*self.generators.parameters(), *self.generators.buffers()]
        return self._generator_fingerprint.get(tensors, lambda: self.fingerprint_of(self.generator_tensors()))

    def fingerprint_of(self, tensors: Mapping[str, Tensor]) -> str:
        """The fingerprint of generators with these tensors and this model's settings."""
        settings = {name: getattr(self.config, name) for name in ("norm", "damping", "power_iterations")}
        settings["scale"] = self.config.adapter_scale
        if self.config.sketch_side != "input":  # the setting was added later; older fingerprints stay valid
            settings["sketch_side"] = self.config.sketch_side
        return tensor_fingerprint(tensors.items(), json.dumps(settings))

    def generator_tensors(self) -> dict[str, Tensor]:
        """Parameters and sketches of all generators, named by adapted layer.

        If they are sharded over several processes, all of these must make this call.
        """
        return {
            f"{name}.{key}": tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            for name in self.adapted_names
            for key, tensor in self.generator(name).state_dict().items()
        }

    def load_generator_tensors(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Load saved parameters and sketches into the generators.

        Raises:
            FormatError: names or shapes differ; then nothing has been changed.
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


def _key(name: str) -> str:
    return name.replace(".", "/")  # a ModuleDict key can't contain dots
