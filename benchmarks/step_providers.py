"""Providers of a training step, and the check of their losses and gradients.

All providers share one base model. Those of the library share the generators too; the eager baseline has a copy, and
the floors have their own parameters.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo.config as dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.cases import largest_error
from benchmarks.eager_baseline import EagerBaseline, plain_modules
from benchmarks.measure import part, paused
from benchmarks.presets import Preset, check_preset, make_batch, make_model
from benchmarks.providers import backend
from gakernels import GenerativeAdapter
from gakernels.cost.memory import Recomputation, set_recomputation
from gakernels.model.attachment import decoder_layers
from gakernels.model.compilation import compile_layers
from gakernels.model.window_losses import Loss, WindowBatch, to_device, token_losses
from gakernels.nn import adapter_generator
from gakernels.nn.token_loss import token_loss
from gakernels.ops import low_rank_polar
from gakernels.training.objective import WindowObjective
from gakernels.training.trainer import Trainer, TrainerConfig

LEARNING_RATE = 1e-6  # the parameters hardly move, so every step is like the first
CLIP = 1.0
OVERLAP = ("overlap", "overlap_compiled")
COMPILED_LAYERS = ("compiled_layers", "overlap_compiled")
VARIANTS = ("overlap", "compiled_layers", "overlap_compiled", "recompute")
LIBRARY = {  # and its backend
    **{"auto": "auto", "trainer": "auto", "eager": "eager", "compiled": "eager", "triton": "triton", "cuda": "cuda"},
    **dict.fromkeys(VARIANTS, "auto"),
}
PROVIDERS = ("reference", *LIBRARY, "dense_lora", "frozen_base")
FLOORS = ("dense_lora", "frozen_base")
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Trainee:
    """One provider on one model: its parameters, its loss, and the context that it runs in, backward included.

    Attributes:
        parameters: what it trains, by name.
        loss: mean cross-entropy over the next tokens of the windows of a batch.
        context: made afresh for each step.
        trainer: takes the whole step, if the library's own trainer is measured.
    """

    parameters: Mapping[str, nn.Parameter]
    loss: Callable[[WindowBatch], Tensor]
    context: Callable[[], ExitStack]
    trainer: "TrainerStep | None" = None


def make_trainee(name: str, model: GenerativeAdapter, preset: Preset, guard: bool = True) -> Trainee:
    """The provider by that name on a model.

    Args:
        name: one of PROVIDERS.
        model: has the base of all providers.
        preset: what the model was made from.
        guard: see `EagerBaseline`.
    """
    base, names, scale = model.base, model.adapted_names, model.config.adapter_scale
    if name in LIBRARY:
        return _library_trainee(name, model)
    if name == "reference":
        generators = {name: copy.deepcopy(model.generator(name)) for name in names}
        baseline = EagerBaseline(base, generators, scale, preset.checkpointing, guard)
        parameters = {key.removeprefix("generators."): value for key, value in baseline.named_parameters()}

        def plain() -> ExitStack:
            stack = ExitStack()
            stack.enter_context(plain_modules(base))
            return stack

        return Trainee(parameters, lambda batch: baseline(batch.input_ids, batch.mask, batch.seen), plain)
    if name == "dense_lora":
        dtype = torch.promote_types(preset.dtype, torch.float32)
        lora = DenseLora(base, names, preset.state_size, scale, model.config.seed, dtype)
        return Trainee(dict(lora.named_parameters()), lambda batch: lora(batch.input_ids, batch.mask), ExitStack)
    frozen = FrozenBase(base, names[0])
    return Trainee({}, lambda batch: frozen(batch.input_ids, batch.mask), ExitStack)


def _library_trainee(name: str, model: GenerativeAdapter) -> Trainee:
    switched = variant(name, model)

    def context() -> ExitStack:
        stack = ExitStack()
        stack.enter_context(backend(LIBRARY[name]))
        stack.enter_context(switched())
        return stack

    def losses(batch: WindowBatch) -> Mapping[str, Loss]:
        hidden = model(batch.input_ids, batch.mask, batch.chunks, batch.seen)[0]
        with part("loss"):
            return token_losses(model, hidden, batch.input_ids, batch.targets)

    parameters = dict(model.generators.named_parameters())
    trainer = TrainerStep(parameters, losses, model.base.dtype) if name == "trainer" else None
    return Trainee(parameters, lambda batch: losses(batch)["next_token"].mean, context, trainer)


@contextmanager
def parts_marked(model: GenerativeAdapter) -> Iterator[None]:
    """Make the library's parts of a step named regions for a `PartClock` while the block runs.

    `adapted_linear` includes the base product of the adapted layer, for all providers; `loss` includes the output head.
    """
    with ExitStack() as stack:
        for name in model.adapted_names:
            generator, linear = model.generator(name), model.base.get_submodule(name)
            for module, method, region in (
                (generator, "states", "generator"),
                (generator, "factors", "generator"),
                (linear, "forward", "adapted_linear"),
            ):
                stack.enter_context(patch.object(module, method, _marked(region, getattr(module, method))))
        stack.enter_context(patch.object(adapter_generator, "low_rank_polar", _marked("polar", low_rank_polar)))
        head = model.base.get_output_embeddings()
        stack.enter_context(patch.object(head, "forward", _marked("loss", head.forward)))
        yield


def _marked(region: str, function: Callable[..., object]) -> Callable[..., object]:
    def run(*args: object, **kwargs: object) -> object:
        with part(region):
            return function(*args, **kwargs)

    return run


# Correctness


def provider_error(name: str, preset: Preset, device: torch.device, seed: int) -> float:
    """Largest relative distance of a provider's loss and gradients from its oracle, on a tiny float64 model.

    The oracle is the plain definition of the operations (`reference.py`); for the eager baseline with the sketch on its
    side, without damping and guard; for the floors the same weights merged into the base.

    Raises:
        BackendError: the provider does not exist in this installation.
    """
    small = replace(check_preset(preset), checkpointing=preset.checkpointing)
    model, batch = make_model(small, device, seed), to_device(make_batch(small, seed), device)
    if name == "reference":
        for adapted in model.adapted_names:
            model.generator(adapted).sketch_side, model.generator(adapted).damping = "output", 0.0
    with exact_norms(model.base):
        trainee = make_trainee(name, model, small, guard=False)
        values = loss_and_gradients(trainee, batch)
        if name in FLOORS:
            targets = _merged_oracle(trainee, model, batch)
        else:
            oracle = _library_trainee("auto", model)
            targets = loss_and_gradients(replace(oracle, context=lambda: _within(backend("reference"))), batch)
    if values.keys() != targets.keys():
        raise ValueError(f"{name} has gradients of other parameters than its oracle")
    return largest_error(values.values(), (targets[key] for key in values))


def loss_and_gradients(trainee: Trainee, batch: WindowBatch) -> dict[str, Tensor]:
    """The loss, under the name `loss`, and the gradients of all parameters by name."""
    with trainee.context():
        if trainee.trainer:
            loss, gradients = trainee.trainer.gradients(batch)
        else:
            loss = trainee.loss(batch)
            loss.backward()
            gradients = [parameter.grad for parameter in trainee.parameters.values()]
    values = {"loss": loss.detach()}
    for (name, parameter), gradient in zip(trainee.parameters.items(), gradients, strict=True):
        values[name] = torch.zeros_like(parameter) if gradient is None else gradient
        parameter.grad = None
    return values


def _merged_oracle(trainee: Trainee, model: GenerativeAdapter, batch: WindowBatch) -> dict[str, Tensor]:
    """The loss and gradients of a floor, computed another way: W + scale A1 B2 as the weights of the base."""
    weights = {}
    for number, name in enumerate(model.adapted_names if trainee.parameters else ()):
        delta = trainee.parameters[f"output_maps.{number}"] @ trainee.parameters[f"input_maps.{number}"]
        weights[f"{name}.weight"] = model.base.get_submodule(name).weight + model.config.adapter_scale * delta
    ids = batch.input_ids.flatten(0, 1)
    logits = torch.func.functional_call(model.base, weights, (), {"input_ids": ids, "use_cache": False}).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    gradients = torch.autograd.grad(loss, list(trainee.parameters.values())) if trainee.parameters else ()
    return {"loss": loss.detach(), **dict(zip(trainee.parameters, gradients, strict=True))}


@contextmanager
def exact_norms(base: PreTrainedModel) -> Iterator[None]:
    """Run RMSNorms in the dtype of their input while the block runs: transformers rounds float64 to float32 in them."""
    with ExitStack() as stack:
        for module in base.modules():
            if type(module).__name__.endswith("RMSNorm"):
                stack.enter_context(patch.object(module, "forward", _exact_norm(module)))
        yield


def _exact_norm(module: Any) -> Callable[[Tensor], Tensor]:
    return lambda hidden: F.rms_norm(hidden, module.weight.shape, module.weight, module.variance_epsilon)


def _within(context: AbstractContextManager[None]) -> ExitStack:
    stack = ExitStack()
    stack.enter_context(context)
    return stack


# Floors: the same model with less work; no way of generating adapters can be faster


class DenseLora(nn.Module):
    """The floor `dense_lora`: y = W x + scale A1 (B2 x) of width d_r, with no state and no norm.

    Args:
        base: a frozen transformers causal language model.
        names: of the adapted linear layers.
        width: d_r.
        scale: factor of the adapter.
        seed: of the random start values.
        dtype: of the parameters.
    """

    def __init__(
        self, base: PreTrainedModel, names: Sequence[str], width: int, scale: float, seed: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self._base, self.names, self.scale = [base], list(names), scale
        random = torch.Generator(base.device).manual_seed(seed)
        self.input_maps, self.output_maps = nn.ParameterList(), nn.ParameterList()
        for name in names:
            linear = base.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            outputs, inputs = linear.weight.shape
            for maps, shape in ((self.input_maps, (width, inputs)), (self.output_maps, (outputs, width))):
                start = torch.empty(shape, device=base.device, dtype=dtype)
                maps.append(nn.Parameter(start.normal_(std=0.02, generator=random)))

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Mean cross-entropy over the next tokens of the windows (B, W, M)."""
        with self.attached():
            return frozen_loss(self._base[0], input_ids.flatten(0, 1), mask.flatten(0, 1))

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The base model with this adapter while the block runs."""
        hooks = []
        try:
            for name, input_map, output_map in zip(self.names, self.input_maps, self.output_maps, strict=True):
                hook = self._hook(input_map, output_map)
                hooks.append(self._base[0].get_submodule(name).register_forward_hook(hook))
            yield
        finally:
            for handle in hooks:
                handle.remove()

    def _hook(self, input_map: Tensor, output_map: Tensor) -> Callable[..., Tensor]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            with part("adapted_linear"):
                return output + self.scale * F.linear(F.linear(inputs[0], input_map), output_map)

        return add


class FrozenBase(nn.Module):
    """The floor `frozen_base`: no adapter at all.

    To have a backward, the output of the first layer that the others adapt requires a gradient: the backward
    goes through everything after it, as it must with any adapter there.
    """

    def __init__(self, base: PreTrainedModel, first: str) -> None:
        super().__init__()
        self._base, self.first = [base], first

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Mean cross-entropy over the next tokens of the windows (B, W, M)."""
        first = self._base[0].get_submodule(self.first)
        handle = first.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
        try:
            return frozen_loss(self._base[0], input_ids.flatten(0, 1), mask.flatten(0, 1))
        finally:
            handle.remove()


def frozen_loss(base: PreTrainedModel, ids: Tensor, valid: Tensor) -> Tensor:
    """Mean cross-entropy over the next tokens of windows (windows, M), as the library's training computes it."""
    hidden = base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    with part("loss"):
        head, predicted = base.get_output_embeddings(), F.pad(valid[:, 1:], (0, 1)).flatten()
        losses = token_loss(hidden.flatten(0, 1), F.pad(ids[:, 1:], (0, 1)).flatten(), head, base.config.vocab_size)
        return (losses * predicted).sum() / predicted.sum()


# The library's own trainer, and variants of the library's step


class TrainerStep:
    """Takes steps on the batches that it is given.

    Args:
        parameters: what is trained, by name.
        take: computes the losses of a batch; there is one.
        dtype: of the base model; bfloat16 runs under autocast.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        take: Callable[[WindowBatch], Mapping[str, Loss]],
        dtype: torch.dtype,
    ) -> None:
        self._batches: list[WindowBatch] = []
        precision = "bfloat16" if dtype == torch.bfloat16 else "float32"
        config = TrainerConfig(1, LEARNING_RATE, 0, "constant", clip=CLIP, precision=precision)
        self._trainer = Trainer(config, parameters, WindowObjective(lambda _: self._batches, take), progress=False)
        self._taken = 0

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The trainer's optimizer."""
        return self._trainer.optimizer

    def __call__(self, batch: WindowBatch) -> Tensor:
        """Take one step; returns the loss."""
        self._batches = [batch]
        result = self._trainer.step(self._taken)
        self._taken += 1
        return (result.totals / result.tokens)[0]

    def gradients(self, batch: WindowBatch) -> tuple[Tensor, list[Tensor | None]]:
        """The loss and the gradients of a step, before clipping; the parameters do not change."""
        parameters = list(self._trainer.parameters.values())
        before = [parameter.detach().clone() for parameter in parameters]
        self._batches = [batch]
        result = self._trainer.step(0)
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
        clipped = (CLIP / (result.norm + 1e-6)).clamp(max=1.0)
        found = [None if parameter.grad is None else parameter.grad / clipped for parameter in parameters]
        return (result.totals / result.tokens)[0], found


def variant(name: str, model: GenerativeAdapter) -> Callable[[], ExitStack]:
    """The context in which a provider's step runs, made afresh for each step.

    `compiled` compiles the whole decoder, `compiled_layers` each layer separately; `overlap` forms the adapters on
    a second stream; `recompute` recomputes gate and up of all layers in the backward. Other names change nothing.
    """
    decoder: Any = model.base.get_decoder()
    replaced: list[tuple[Any, Any]] = []
    if name == "compiled":
        replaced.append((decoder, torch.compile(decoder.forward)))
    elif name in COMPILED_LAYERS:
        layers = decoder_layers(model.base)[1]
        compile_layers(model.base)
        replaced += [(layer, vars(layer).pop("forward")) for layer in layers]
    if replaced or name in OVERLAP:  # a clock would be compiled in, and follows a single stream
        inner = replaced.pop()[1] if name == "compiled" else decoder.forward
        replaced.append((decoder, _without_clock(inner)))

    def context() -> ExitStack:
        stack = ExitStack()
        # One process compiles the layers of several models: the checked ones and the timed ones.
        stack.enter_context(dynamo.patch(recompile_limit=64))
        for module, forward in replaced:
            stack.enter_context(patch.object(module, "forward", forward))
        if name in OVERLAP:
            model.overlap_generators()
            stack.callback(model.overlap_generators, False)
        if name == "recompute":
            layers = tuple(range(len(decoder_layers(model.base)[1])))
            set_recomputation(model, Recomputation(gated=layers))
            stack.callback(set_recomputation, model, Recomputation())
        return stack

    return context


def _without_clock(forward: Callable[..., object]) -> Callable[..., object]:
    def run(*args: object, **kwargs: object) -> object:
        with paused():
            return forward(*args, **kwargs)

    return run
