"""The calls of the operations that a model makes, and their backends: found by running the library without data.

The base model has its true widths and one decoder layer, all tensors are PyTorch fakes, and every call of
`dispatch.choose` is recorded. So there is no list of shapes that could disagree with the code.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

from gakernels.cost.shapes import ModelShape
from gakernels.errors import InputError
from gakernels.model import GenerativeAdapter
from gakernels.model.attachment import decoder_layers
from gakernels.model.config import GeneratorConfig
from gakernels.model.window_losses import WindowBatch, pretraining_windows
from gakernels.nn import CompactFactors, GatedMLP, LowRankFactors
from gakernels.ops import dispatch

PASS = 8  # chunks of a context that go through the model at once, the library's default


@dataclass(frozen=True)
class Call:
    """One kind of call of an operation, and the backend that would run it.

    Attributes:
        operation: its name.
        dtype: of its first argument.
        sizes: the sizes that its speed depends on, by name.
        training: whether a backward follows.
        choice: the backend, and the reason.
    """

    operation: str
    dtype: torch.dtype
    sizes: tuple[tuple[str, int], ...]
    training: bool
    choice: dispatch.Choice


class PlannedCalls:
    """The calls of one model with generators.

    Args:
        base: configuration of the base model; its decoder layers are assumed to be alike, and only one is created.
        generator: what is adapted, and the generators' sizes.
        dtype: of the base model's weights.
        autocast: dtype in which a training step computes; None to use the dtypes as they are.

    Raises:
        InputError: transformers can't create the model, or it has no such linear layers.
    """

    def __init__(
        self,
        base: PreTrainedConfig,
        generator: GeneratorConfig,
        dtype: torch.dtype = torch.bfloat16,
        autocast: torch.dtype | None = torch.bfloat16,
    ) -> None:
        self._autocast_dtype = autocast
        self.chunk_size = generator.chunk_size
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(_one_layer(base), dtype=dtype)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"base must be the configuration of a causal language model, but: {reason}") from error
        _put_in_gated_parts(model)
        self._model = GenerativeAdapter(model, replace(generator, layers=None))
        # Outside the mode real tensors stay real, so that the library can take its decisions on the host.
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self._mode:
            self._model.to_empty(device="cpu")

    def training(self, segments: int, chunks: int, slices: int = 1) -> list[Call]:
        """A pretraining step: segments of this many chunks, each with its reconstruction windows."""
        tokens = torch.zeros(segments, chunks * self.chunk_size, dtype=torch.int64)
        batch = pretraining_windows(tokens, chunks, torch.Generator().manual_seed(0), slices=slices)
        return self._recorded(lambda: self._encode(batch), self._autocast())

    def contextualizing(self, chunks: int) -> list[Call]:
        """A context becomes an adapter, without gradients; of identical passes only two are run."""
        different = chunks if chunks <= 2 * PASS else 2 * PASS + chunks % PASS
        ids = [[0] * (different * self.chunk_size)]

        def run() -> None:
            states = self._model.states(ids, chunks_per_pass=PASS)
            for name in self._model.adapted_names:
                self._model.generator(name).factors(states[name])

        return self._recorded(torch.no_grad()(run))

    def decoding(self, users: int) -> list[Call]:
        """One step for users with one adapter each."""
        return self._recorded(torch.no_grad()(lambda: self._decode(users)))

    def _encode(self, batch: WindowBatch) -> dict[str, Tensor]:
        return self._model(batch.input_ids, batch.mask, batch.chunks, batch.seen)[1]

    def _decode(self, users: int) -> None:
        factors: dict[str, LowRankFactors | CompactFactors] = {}
        with self._mode:
            ids = torch.zeros(users, 1, dtype=torch.int64)
            for name in self._model.adapted_names:
                generator, size = self._model.generator(name), self._model.config.state_size
                lora_a, lora_b = generator.factors(torch.zeros(users, size, size))
                dtype = self._model.base.dtype
                factors[name] = LowRankFactors(lora_a.to(dtype), lora_b.to(dtype), self._model.config.adapter_scale)
            with self._model.using(factors):
                self._model.decoder(input_ids=ids, use_cache=True)

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = self._autocast_dtype
        return nullcontext() if dtype is None else torch.autocast("cpu", dtype)

    def _recorded(self, run: Callable[[], object], precision: AbstractContextManager[Any] | None = None) -> list[Call]:
        """The kinds of calls that a function makes, in order of first occurrence."""
        with _recording() as calls, precision or nullcontext():
            run()
        return list(dict.fromkeys(calls))


@contextmanager
def _recording() -> Iterator[list[Call]]:
    calls: list[Call] = []

    def note(operation: str, arguments: tuple[Any, ...], choice: dispatch.Choice) -> None:
        sizes = dispatch.module(operation, "eager").sizes(*arguments)
        plain = tuple((name, int(size)) for name, size in sizes.items())
        calls.append(Call(operation, arguments[0].dtype, plain, dispatch.needs_backward(arguments), choice))

    before = dispatch.exchange_listener(note)
    try:
        yield calls
    finally:
        dispatch.exchange_listener(before)


def _one_layer(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same model with a single decoder layer."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    text.num_hidden_layers = 1
    if getattr(text, "layer_types", None):
        text.layer_types = list(text.layer_types[:1])
    return small


def _put_in_gated_parts(model: PreTrainedModel) -> None:
    """Those that an attachment puts in where weights have values: tested with small linear layers instead."""
    for layer in decoder_layers(model)[1]:
        for name, part in layer.named_children():
            small = copy.copy(part)
            small._modules = {
                own: nn.Linear(8, 8, module.bias is not None) if isinstance(module, nn.Linear) else module
                for own, module in part.named_children()
            }
            if GatedMLP.can_stand_for(small):
                setattr(layer, name, GatedMLP(part))


def llama_config(shape: ModelShape) -> LlamaConfig:
    """A configuration of a Llama-like model of some shape."""
    ffn = next(linear.outputs for linear in shape.linears if linear.name == "mlp.up_proj")
    return LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
    )
