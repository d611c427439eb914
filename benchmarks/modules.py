"""The cases of the modules: AdapterGenerator and AdaptedLinear, with the backends that their operations can have."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from benchmarks import providers
from benchmarks.cases import Case, Work
from benchmarks.operations import (
    PRESETS,
    ContextState,
    LowRankLinear,
    LowRankPolar,
    Operation,
    Sizes,
    cases_of,
)
from gakernels.nn import AdaptedLinear, AdapterGenerator, LowRankFactors

BACKENDS = ("reference", "auto")


class GeneratorModule(Operation):
    """Hidden states of T chunks in, T adapters out: RMSNorm, projections, states, norm, and both output maps.

    The adapters are compared as products lora_B lora_A; the gradients are those of all parameters and of the input. The
    hidden states lie near r directions, so that the states have a gap in their spectra, as in `LowRankPolar`.
    """

    name, leaves = "AdapterGenerator", (0, 1, 2, 3, 4, 5)
    provider_names = BACKENDS
    looseness = 3.0  # errors of three operations add up

    def __init__(self, sizes: Sizes, layer: tuple[int, int], device: torch.device, dtype: torch.dtype) -> None:
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


def cases(preset: str, device: torch.device, dtype: torch.dtype, names: Sequence[str] | None = None) -> list[Case]:
    """Forward and backward of each module at the sizes of a preset. Raises: ValueError: there is no such preset."""
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, but it is {preset!r}")
    sizes = PRESETS[preset]
    layer = sizes.layers[0]
    return cases_of(
        [GeneratorModule(sizes, layer, device, dtype), LinearModule(sizes, layer, device, dtype)], names, backward=True
    )


def _sum(*parts: Work) -> Work:
    return Work(sum(part.flops for part in parts), sum(part.bytes for part in parts))
