"""GenerativeAdapter: a frozen causal language model with generators that turn a context into its adapter."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gakernels.adapter import Adapter, stack
from gakernels.attachment import (
    decoder_layers,
    describe,
    find_sites,
    put_in_lean_modules,
    take_out_lean_modules,
    target_modules,
)
from gakernels.compact import CompactAdapter
from gakernels.compilation import uncompile_layers
from gakernels.configuration import GeneratorConfig
from gakernels.context import ContextStream, encode
from gakernels.contextualization import ContextPass
from gakernels.errors import FormatError, InputError
from gakernels.files import entry, read_tensors, replacing, write_tensors, write_text
from gakernels.fingerprint import model_fingerprint, tensor_fingerprint
from gakernels.hub import local_folder
from gakernels.nn import AdaptedLinear, AdapterGenerator, CompactFactors, LowRankFactors
from gakernels.nn.adapted_quantized_linear import AdaptedQuantizedLinear, adapted
from gakernels.nn.cpu_attention import CpuAttention
from gakernels.side_stream import Streams, streams_of
from gakernels.token_loss import token_loss
from gakernels.windows import only_first_is_plain, pad_left, pad_windows, split_evenly

GENERATOR_FILE = "generator.safetensors"


class GenerativeAdapter(nn.Module):
    """Generators attached to a base model.

    The base model is frozen and keeps its parameter names; its adapted linear layers, quantised or not, are exchanged
    for `AdaptedLinear` with the same parameters, and feed-forward parts and norms of the usual kind for `GatedMLP` and
    `FrozenRMSNorm`, which compute the same with less memory (`detach` puts the old ones back). The generators are the
    only trainable parameters.

    Args:
        base: any decoder-only transformers model whose decoder layers hold the named linear layers.
        config: what is adapted and how.
        tokenizer: needed only where text goes in or comes out.
        dtype: of the generators' parameters; float32 if not given, whatever the base model has.

    Raises:
        InputError: config names layers that the model does not have, or the model already carries generators.
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
        find_sites(base, config.linears, config.layers)  # refuses before anything is changed
        put_in_lean_modules(base)
        self._sites = find_sites(base, config.linears, config.layers)
        self._target_modules = target_modules(base, self.adapted_names)
        self._base_config = describe(base)
        self.base = base.requires_grad_(False).eval()
        self.generators = nn.ModuleDict()
        self._hooks: list[Any] = []
        self._pass: ContextPass | None = None
        self._streams: Streams | None = None
        self._originals: dict[str, Tensor] = {}
        self._base_fingerprint: str | None = None
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
                self.generators[_key(site.name)] = generator.to(site.linear.weight.device, dtype)
        layers = decoder_layers(self.base)[1]
        for number in sorted({site.layer for site in self._sites}):
            hook = layers[number].register_forward_pre_hook(self._before_layer(number), with_kwargs=True)
            self._hooks.append(hook)
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

    def _before_layer(self, number: int) -> Any:
        """The hook that forms the adapters of one decoder layer from its input, during a context pass."""
        sites = [site for site in self._sites if site.layer == number]

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._pass is None:
                return
            hidden = args[0] if args else kwargs["hidden_states"]
            for site in sites:
                arguments = (site.name, self.generator(site.name), hidden, self.config.adapter_scale)
                self._linear(site.name).factors = (
                    self._pass.factors(*arguments)
                    if self._streams is None
                    else self._pass.factors_later(*arguments, self._streams)
                )

        return hook

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
        """Where the base model is."""
        return self.base.device

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
            InputError: a shape does not fit, or an adapter is merged into the base.
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
        with self._running(context), CpuAttention():
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
        if self._originals:
            raise InputError("an adapter is merged into the base model; call unmerge() first")
        if input_ids.dim() != 3 or mask.shape != input_ids.shape or mask.dtype != torch.bool:
            raise InputError(
                "input_ids must have shape (B, W, M) and mask must be bool of the same shape, but they are "
                f"{tuple(input_ids.shape)} and {mask.dtype} {tuple(mask.shape)}"
            )
        if not 1 <= chunks <= input_ids.shape[1] or len(seen) != input_ids.shape[1]:
            raise InputError(
                f"chunks must be between 1 and the {input_ids.shape[1]} windows and seen have one entry for each, "
                f"but they are {chunks} and {tuple(seen)}"
            )
        missing = [name for name in self.adapted_names if initial_states is not None and name not in initial_states]
        if missing:
            raise InputError(f"initial_states must have the states of all adapted layers, but {missing[0]} is missing")

    @contextmanager
    def _running(self, context: ContextPass) -> Iterator[None]:
        self._pass = context
        try:
            with self.using({}):
                yield
        finally:
            self._pass = None

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
        """Negative log-likelihood (N,) of tokens (N,) behind hidden states (N, d_h); see `gakernels.token_loss`."""
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
            ("base model", compact.base_fingerprint, self.base_fingerprint()),
            ("generator", compact.generator_fingerprint, self.generator_fingerprint()),
        ):
            if found != own:
                raise FormatError(
                    f"the compact adapter belongs to a {what} of fingerprint {found}, but this one has {own}"
                )
        size = (self.config.state_size, compact.rank)
        if any(set(side) != set(self.adapted_names) for side in (compact.left, compact.right)) or any(
            factor.shape != size for factor in [*compact.left.values(), *compact.right.values()]
        ):
            raise FormatError("the compact adapter is of other linear layers or another size than this generator")

    def adapt(self, contexts: Sequence[str | Sequence[int]]) -> list[Adapter]:
        """The adapters of several contexts, texts or token ids, encoded together as one batch.

        Raises:
            InputError: there is no context, one is empty, or there is no tokenizer for a text.
        """
        if isinstance(contexts, str):
            raise InputError("contexts must be a list of contexts, but it is one text; put it in a list")
        tokens = [encode(self.tokenizer, context, first=True) for context in contexts]
        return self.adapters(self.states(tokens), [len(row) for row in tokens])

    # Using adapters

    @contextmanager
    def adapted(self, adapters: Adapter | Sequence[Adapter]) -> Iterator[None]:
        """The base model with an adapter, or with one adapter per row of the batch, while the block runs.

        With n adapters the rows of a batch must be a multiple of n: each adapter serves that many consecutive rows.

        Raises:
            InputError: an adapter is merged into the base model, or the adapters differ in scale or rank.
            FormatError: an adapter was made for another base model or for other layers.
        """
        if self._originals:
            raise InputError("an adapter is merged into the base model; call unmerge() first")
        several = [adapters] if isinstance(adapters, Adapter) else list(adapters)
        self._check_adapters(several)
        factors = {}
        for name in self.adapted_names:
            device = self._linear(name).weight.device
            lora_a, lora_b = (factor.to(device, self.base.dtype) for factor in stack(several, name))
            factors[name] = LowRankFactors(lora_a, lora_b, several[0].scale)
        with self.using(factors):
            yield

    @contextmanager
    def using(self, factors: Mapping[str, LowRankFactors | CompactFactors]) -> Iterator[None]:
        """The base model with the given factors, by adapted layer, while the block runs; then those from before."""
        before = {name: self._linear(name).factors for name in self.adapted_names}
        try:
            for name in self.adapted_names:
                self._linear(name).factors = factors.get(name)
            yield
        finally:
            for name, previous in before.items():
                self._linear(name).factors = previous

    def merge(self, adapter: Adapter) -> None:
        """Add an adapter into the weights of the base model; `unmerge` restores them bit by bit from a copy.

        Raises:
            InputError: an adapter is merged already, this is inside a block of `adapted`, or the weights are quantised.
            FormatError: the adapter was made for another base model or for other layers.
        """
        if self._originals:
            raise InputError("an adapter is merged into the base model already; call unmerge() first")
        if any(isinstance(self._linear(name), AdaptedQuantizedLinear) for name in self.adapted_names):
            raise InputError("an adapter can't be merged into quantised weights; merge it into the full base model")
        if any(self._linear(name).factors is not None for name in self.adapted_names):
            raise InputError("an adapter is in use; leave the block of adapted() before merge()")
        self._check_adapters([adapter])
        with torch.no_grad():
            for name in self.adapted_names:
                weight = self._linear(name).weight
                self._originals[name] = weight.detach().clone()
                delta = adapter.delta(name)
                weight.copy_(weight.to(delta.dtype) + delta.to(weight.device))

    def unmerge(self) -> None:
        """Restore the weights from before `merge`; nothing happens if nothing is merged."""
        with torch.no_grad():
            for name, original in self._originals.items():
                self._linear(name).weight.copy_(original)
        self._originals.clear()

    def save_merged(self, adapter: Adapter, folder: str | Path) -> None:
        """Write a plain model folder, with the tokenizer: the base model with an adapter merged into its weights.

        The base model here stays as it is. Other files in the folder stay.

        Raises:
            InputError: an adapter is merged already or in use, the weights are quantised, or there is a file of that
                name.
            FormatError: the adapter was made for another base model or for other layers.
            OSError: it could not be written; what was there is unharmed.
        """
        self.merge(adapter)
        try:
            with replacing(Path(folder)) as temporary:
                self.base.save_pretrained(temporary)
                if self.tokenizer is not None:
                    self.tokenizer.save_pretrained(temporary)
        finally:
            self.unmerge()

    @torch.no_grad()
    def generate(self, prompts: str | Sequence[str], **options: Any) -> list[str]:
        """Continue texts with the base model as it is now (see `adapted`), by transformers' `generate`.

        Args:
            prompts: one text or several; several are padded on the left.
            options: for `generate`; greedy decoding of at most 32 new tokens unless they say otherwise.

        Returns:
            The new text of each prompt, without the prompt and special tokens.

        Raises:
            InputError: there is no tokenizer, no prompt or an empty one, or the prompts are not a multiple of the
                adapters in use.
        """
        if self.tokenizer is None:
            raise InputError("tokenizer is needed to turn text into tokens; pass one to GenerativeAdapter")
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        rows = [list(row) for row in self.tokenizer(texts)["input_ids"]] if texts else []
        if not all(rows) or not rows:
            raise InputError("prompts must be at least one prompt, each of at least one token")
        padding = next(
            (token for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if token is not None), 0
        )
        ids, mask = (tensor.to(self.device) for tensor in pad_left(rows, padding))
        settings = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": padding} | options
        output = self.base.generate(input_ids=ids, attention_mask=mask, **settings)
        return [
            text.strip() for text in self.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        ]

    def _check_adapters(self, adapters: Sequence[Adapter]) -> None:
        for adapter in adapters:
            if adapter.base_fingerprint != self.base_fingerprint():
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

    def generator_fingerprint(self) -> str:
        """Fingerprint of the generators' present parameters and sketches, and of what turns states into adapters."""
        return self._fingerprint_of(self.generator_tensors())

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
            "generator_fingerprint": self._fingerprint_of(tensors),
        }
        write_tensors(Path(folder) / GENERATOR_FILE, "generator", tensors, description)
        write_text(Path(folder) / "generator.json", json.dumps(description, indent=2) + "\n")

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        base: PreTrainedModel | str | Path | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: torch.dtype = torch.float32,
        **base_options: Any,
    ) -> "GenerativeAdapter":
        """Load generators and, unless given, their base model and its tokenizer.

        Args:
            folder: what `save_pretrained` wrote, or a generator in the format of the authors' released code (see
                `gakernels.released.load_released`): a folder, or the name of a repository on the Hugging Face hub.
            base: the base model, or its name or path; if not given, the one that the generator names.
            tokenizer: if not given, the base model's, where there is one.
            dtype: of the generators' parameters.
            base_options: for `AutoModelForCausalLM.from_pretrained`.

        Raises:
            InputError: a file or model is missing.
            FormatError: a file is damaged, or the base model is not the one the generator was trained for.
        """
        from gakernels.released import is_released, load_released  # which needs this class

        folder = local_folder(folder)
        if is_released(folder):
            return load_released(folder, base, tokenizer, dtype, **base_options)
        path = folder / GENERATOR_FILE
        tensors, description = read_tensors(path, "generator")
        config = _read_config(path, description)
        _check_sketches(path, config, tensors)
        base_name, wanted = (entry(path, description, name, str) for name in ("base_name", "base_fingerprint"))
        if not isinstance(base, PreTrainedModel):
            name = locate(folder, base_name if base is None else str(base))
            base, tokenizer = load_base(name, tokenizer, **base_options)
        fingerprint = model_fingerprint(base)
        if fingerprint != wanted:
            raise FormatError(
                f"base must be the model that {path} was trained for (fingerprint {wanted}, "
                f"{base_name or 'no name'}), but its fingerprint is {fingerprint}"
            )
        model = cls(base, config, tokenizer, dtype)
        model._base_fingerprint = fingerprint
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
        InputError: there is no model of that name, or a file of it is damaged.
    """
    try:
        base = AutoModelForCausalLM.from_pretrained(name, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"base model {name!r} can't be loaded: {str(error).splitlines()[0]}") from error
    if tokenizer is not None:
        return base, tokenizer
    name = tokenizer_name or name
    try:
        return base, AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        if any(Path(name).glob("tokenizer*")):  # it has one, and that is damaged
            raise InputError(f"the tokenizer of {name!r} can't be loaded: {str(error).splitlines()[0]}") from error
        return base, None


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
