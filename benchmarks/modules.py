"""The cases of the modules, with the possible backends of their operations, and of the other parts of a step."""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from benchmarks import providers
from benchmarks.cases import BenchmarkCase, UnavailableError, Work
from benchmarks.operations import (
    PRESETS,
    ContextState,
    GatedProduct,
    LowRankLinear,
    LowRankPolar,
    Operation,
    OperationSizes,
    cases_of,
    sizes_of,
)
from gakernels.nn import AdaptedLinear, AdapterGenerator, FrozenRMSNorm, LowRankFactors
from gakernels.nn.token_loss import token_loss
from gakernels.ops import gated_product

BACKENDS = ("reference", "auto")


class GeneratorModule(Operation):
    """From the hidden states of T chunks to T adapters: RMSNorm, projections, states, norm, and both output maps.

    The adapters are compared as products lora_B lora_A; the gradients are those of all parameters and of the input. The
    hidden states are close to r directions, so that the states have a gap in their spectra, as in `LowRankPolar`.
    """

    name, leaves = "AdapterGenerator", (0, 1, 2, 3, 4, 5)
    provider_names = BACKENDS
    looseness = 3.0  # errors of three operations add up

    def __init__(self, sizes: OperationSizes, layer: tuple[int, int], device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device, dtype)
        self.sizes, (self.inputs, self.outputs) = sizes, layer
        t, i, o = sizes.chunks, self.inputs, self.outputs
        self.shape = f"T={t} M={sizes.tokens} d_h={sizes.hidden} d_in={i} d_out={o} d_r={sizes.state} r={sizes.rank}"
        state = ContextState(sizes, device, dtype)
        polar = LowRankPolar(sizes, device, torch.promote_types(dtype, torch.float32))
        maps = 2.0 * t * sizes.state * sizes.rank * (i + o)
        moved = dtype.itemsize * float((t * sizes.rank + sizes.state) * (i + o))
        self.forward_work = _sum(state.forward_work, polar.forward_work, Work(maps, moved))
        self.backward_work = _sum(state.backward_work, polar.backward_work, Work(2 * maps, 2 * moved))

    @functools.cached_property
    def module(self) -> AdapterGenerator:
        sizes = self.sizes
        module = AdapterGenerator(sizes.hidden, self.inputs, self.outputs, state_size=sizes.state, rank=sizes.rank)
        return module.to(self.device, self.dtype).requires_grad_(False)

    def implementation(self, name: str) -> providers.Implementation:
        return providers.with_backend(name, self._call)

    def _call(self, hidden: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        names = [name for name, _ in self.module.named_parameters()]
        values = dict(zip(names, parameters, strict=True)) | {"sketch": self.module.sketch.to(hidden.dtype)}
        lora_a, lora_b, _ = torch.func.functional_call(self.module, values, (hidden,))
        return lora_a, lora_b

    def draw(self, generator: Generator) -> tuple[Any, ...]:
        s = self.sizes
        shares = self.random(generator, 1, s.chunks, s.tokens, s.rank, dtype=torch.float32)
        noise = self.random(generator, 1, s.chunks, s.tokens, s.hidden, std=0.02, dtype=torch.float32)
        directions = torch.linalg.qr(self.random(generator, s.hidden, s.rank, dtype=torch.float32)).Q.mT
        hidden = ((s.hidden / s.rank) ** 0.5 * shares @ directions + noise).to(self.dtype)
        parameters = []
        for name, parameter in self.module.named_parameters():
            if name == "norm_weight":
                parameters.append(1 + self.random(generator, *parameter.shape, std=0.1))
            else:
                parameters.append(self.random(generator, *parameter.shape, std=(3 * parameter.shape[-1]) ** -0.5))
        return hidden, *parameters

    def oracle(self, *arguments: Any) -> Tensor:
        return self.defined(self.implementation("reference")(*arguments))

    def defined(self, returned: Any) -> Tensor:
        lora_a, lora_b = returned
        return lora_b @ lora_a

    def upstream(self, returned: Any, gradient: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        lora_a, lora_b = returned
        return (lora_a, lora_b), ((lora_b.mT @ gradient).detach(), (gradient @ lora_a.mT).detach())


class LinearModule(LowRankLinear):
    """A frozen layer with an adapter per window, and the plain layer as the floor."""

    name = "AdaptedLinear"
    provider_names = (*BACKENDS, "linear")

    def implementation(self, name: str) -> providers.Implementation:
        if name == "linear":
            return lambda x, weight, *_: F.linear(x, weight)
        return providers.with_backend(name, self._call)

    def is_floor(self, name: str) -> bool:
        return name == "linear"

    def _call(
        self, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, index: Tensor, bias: None
    ) -> Tensor:
        linear = nn.Linear(self.inputs, self.outputs, bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        module = AdaptedLinear.from_linear(linear)
        module.factors = LowRankFactors(lora_a, lora_b, scale, index)
        return module(x)


def cases(
    preset: str, device: torch.device, dtype: torch.dtype, names: Sequence[str] | None = None
) -> list[BenchmarkCase]:
    """Forward and backward of each module at the sizes of a preset. Raises: ValueError: there is no such preset."""
    sizes = sizes_of(PRESETS, preset)
    layer = sizes.layers[0]
    return cases_of(
        [GeneratorModule(sizes, layer, device, dtype), LinearModule(sizes, layer, device, dtype)], names, backward=True
    )


def _sum(*parts: Work) -> Work:
    return Work(sum(part.flops for part in parts), sum(part.bytes for part in parts))


# The parts of a training step outside our operations, compared with PyTorch, transformers and Liger: the loss
# after a frozen head, and what is between the matrix products of a frozen layer: norm, activation, rotation.


EPS = 1e-5


@dataclass(frozen=True)
class LayerSizes:
    """Windows of M tokens in a layer of these widths."""

    windows: int
    tokens: int
    hidden: int
    feed_forward: int
    heads: int
    key_heads: int
    head_dim: int
    vocabulary: int


LAYER_PRESETS = {
    "tiny": LayerSizes(2, 8, 32, 48, 4, 2, 8, 64),
    "cpu": LayerSizes(4, 128, 512, 1408, 8, 4, 64, 2048),
    "mistral-7b": LayerSizes(15, 1024, 4096, 14336, 32, 8, 128, 32000),
}


class LayerPart(Operation):
    """A part of a layer, and its providers."""

    def __init__(self, sizes: LayerSizes, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device, dtype)
        self.sizes, self.count = sizes, sizes.windows * sizes.tokens

    def moves(self, forward: int, backward: int) -> None:
        """Set the number of values that the forward and the backward read and write."""
        self.forward_work, self.backward_work = (Work(0.0, n * self.dtype.itemsize) for n in (forward, backward))

    def is_floor(self, name: str) -> bool:
        return False


class TokenLoss(LayerPart):
    """The gradient of the mean loss after a frozen head, together with the loss: where one ends and the other begins
    differs. Ours takes blocks, PyTorch's chunks, Liger's is fused."""

    name, leaves = "token_loss", (0,)
    provider_names = ("auto", "plain", "torch_chunked", "liger")

    def __init__(self, sizes: LayerSizes, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(sizes, device, dtype)
        self.count = min(self.count, 4096)  # the oracle's float64 logits must fit as well
        self.shape = f"N={self.count} d_h={sizes.hidden} V={sizes.vocabulary}"
        numbers = (2 * self.count + sizes.vocabulary) * sizes.hidden
        self.forward_work = Work(4.0 * self.count * sizes.hidden * sizes.vocabulary, numbers * dtype.itemsize)

    def implementation(self, name: str) -> providers.Implementation:
        losses: dict[str, Callable[[], providers.Implementation]] = {
            "auto": lambda: _our_loss,
            "plain": lambda: _plain_loss,
            "torch_chunked": _torch_chunked,
            "liger": lambda: _liger("LigerFusedLinearCrossEntropyLoss", _liger_loss),
        }
        loss = losses[name]()

        def gradient(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
            with torch.enable_grad():
                leaf = hidden.detach().requires_grad_()
                return torch.autograd.grad(loss(leaf, head, targets), leaf)[0]

        return gradient

    def draw(self, generator: Generator) -> tuple[Any, ...]:
        hidden = self.random(generator, self.count, self.sizes.hidden)
        head = self.random(generator, self.sizes.vocabulary, self.sizes.hidden, std=self.sizes.hidden**-0.5)
        size = (self.count,)
        return hidden, head, torch.randint(self.sizes.vocabulary, size, generator=generator, device=self.device)

    def oracle(self, *arguments: Any) -> Tensor:
        return torch.autograd.grad(_plain_loss(*arguments), arguments[0], create_graph=True)[0]


class Norm(LayerPart):
    """RMSNorm with a frozen weight."""

    name, leaves = "rms_norm", (0,)
    provider_names = ("auto", "transformers", "compiled", "liger")

    def __init__(self, sizes: LayerSizes, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(sizes, device, dtype)
        self.shape = f"N={self.count} d_h={sizes.hidden}"
        self.moves(2 * self.count * sizes.hidden, 3 * self.count * sizes.hidden)

    def implementation(self, name: str) -> providers.Implementation:
        if name == "liger":
            return _liger(
                "LigerRMSNorm", lambda kind: lambda x, weight: _with_weight(kind(len(weight), EPS), weight)(x)
            )
        if name == "auto":
            return lambda x, weight: FrozenRMSNorm(_norm(weight))(x)
        return _compiled(name, lambda x, weight: _norm(weight)(x))

    def draw(self, generator: Generator) -> tuple[Any, ...]:
        x = self.random(generator, self.count, self.sizes.hidden)
        return x, 1 + self.random(generator, self.sizes.hidden, std=0.1)

    def oracle(self, *arguments: Any) -> Tensor:
        x, weight = arguments
        return F.rms_norm(x, weight.shape, weight, EPS)


class Activation(GatedProduct):
    """silu(gate) * up, against what others have."""

    provider_names = ("auto", "transformers", "compiled", "liger")

    def __init__(self, sizes: LayerSizes, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(sizes.windows * sizes.tokens, sizes.feed_forward, device, dtype)

    def implementation(self, name: str) -> providers.Implementation:
        if name == "liger":
            # Its backward overwrites the tensors it saved, and one of them is a leaf here.
            return _liger("LigerSiLUMulFunction", lambda kind: lambda g, u: kind.apply(g.clone(), u.clone()), "ops")
        return gated_product if name == "auto" else _compiled(name, self.oracle)


class Rotation(LayerPart):
    """Rotary embedding of queries and keys; both are compared, concatenated."""

    name, leaves = "rotation", (0, 1)
    provider_names = ("transformers", "compiled", "liger")

    def __init__(self, sizes: LayerSizes, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(sizes, device, dtype)
        heads = sizes.heads + sizes.key_heads
        self.shape = f"N={self.count} heads={sizes.heads}+{sizes.key_heads} size={sizes.head_dim}"
        self.moves(2 * self.count * heads * sizes.head_dim, 2 * self.count * heads * sizes.head_dim)

    def implementation(self, name: str) -> providers.Implementation:
        if name == "liger":
            rotate = _liger("liger_rotary_pos_emb", lambda kind: kind)
            return lambda q, k, cos, sin: torch.cat(rotate(q, k, cos, sin), 1)
        return _compiled(name, self.oracle)

    def draw(self, generator: Generator) -> tuple[Any, ...]:
        s = self.sizes
        q, k = (self.random(generator, s.windows, n, s.tokens, s.head_dim) for n in (s.heads, s.key_heads))
        speeds = 10000 ** -(torch.arange(s.head_dim // 2, device=self.device) / (s.head_dim // 2))
        angles = torch.arange(s.tokens, device=self.device)[:, None] * speeds
        angles = torch.cat([angles, angles], -1)[None]
        return q, k, angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def oracle(self, *arguments: Any) -> Tensor:
        return torch.cat(apply_rotary_pos_emb(*arguments), 1)


def part_cases(
    preset: str, device: torch.device, dtype: torch.dtype, names: Sequence[str] | None = None
) -> list[BenchmarkCase]:
    """Forward and backward of each part at the sizes of a preset. Raises: ValueError: there is no such preset."""
    sizes = sizes_of(LAYER_PRESETS, preset)
    loss, *parts = (kind(sizes, device, dtype) for kind in (TokenLoss, Norm, Activation, Rotation))
    return [*cases_of([loss], names, backward=False), *cases_of(parts, names)]


def _norm(weight: Tensor) -> Any:
    return _with_weight(LlamaRMSNorm(len(weight), EPS), weight)


def _with_weight(module: Any, weight: Tensor) -> Any:
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


def _compiled(name: str, function: providers.Implementation) -> providers.Implementation:
    return torch.compile(function, dynamic=False) if name == "compiled" else function


def _our_loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return token_loss(hidden, targets, lambda block: F.linear(block, head), len(head)).mean()


def _plain_loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, head)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)


def _torch_chunked() -> providers.Implementation:
    options = getattr(nn, "LinearCrossEntropyOptions", None)
    if options is None:
        raise UnavailableError(f"torch {torch.__version__} has no chunked linear_cross_entropy")
    loss: Callable[..., Tensor] = F.linear_cross_entropy
    return lambda hidden, head, targets: loss(hidden, head, targets, options=options())


def _liger_loss(kind: Any) -> providers.Implementation:
    return lambda hidden, head, targets: kind()(head, hidden, targets)


def _liger(
    name: str, make: Callable[[Any], providers.Implementation], place: str = "transformers"
) -> providers.Implementation:
    """Apply `make` to one of Liger's kernels."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise UnavailableError("liger-kernel is not installed")
    return make(getattr(importlib.import_module(f"liger_kernel.{place}"), name))
