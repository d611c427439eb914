"""Who computes a training step, and whether its loss and gradients are right.

All providers share one base model. Those of the library share the generators too; the eager baseline gets a copy, and
the floors have parameters of their own.
"""

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.cases import largest_error
from benchmarks.eager_baseline import EagerBaseline, plain_modules
from benchmarks.floors import DenseLora, FrozenBase
from benchmarks.parts import part
from benchmarks.presets import Preset, check_preset, make_batch, make_model
from benchmarks.step_variants import VARIANTS, variant
from benchmarks.trainer_step import TrainerStep
from gakernels import GenerativeAdapter
from gakernels.model.window_losses import Loss as WindowLoss
from gakernels.model.window_losses import WindowBatch, to_device, token_losses
from gakernels.nn import adapter_generator
from gakernels.ops import low_rank_polar
from gakernels.ops.dispatch import ENVIRONMENT_VARIABLE

LIBRARY = {  # and its backend
    **{"auto": "", "trainer": "", "eager": "eager", "compiled": "eager", "triton": "triton", "cuda": "cuda"},
    **dict.fromkeys(VARIANTS, ""),
}
PROVIDERS = ("reference", *LIBRARY, "dense_lora", "frozen_base")
FLOORS = ("dense_lora", "frozen_base")
TOLERANCE = 1e-6

Loss = Callable[[WindowBatch], Tensor]


@dataclass(frozen=True)
class Trainee:
    """One provider on one model: its parameters, its loss, and what must be in force while it runs, backward included.

    Attributes:
        parameters: what it trains, by name.
        loss: mean cross-entropy over the next tokens of the windows of a batch.
        context: made anew for each step.
        trainer: takes the whole step, where the library's own trainer is what is measured.
    """

    parameters: Mapping[str, nn.Parameter]
    loss: Loss
    context: Callable[[], ExitStack]
    trainer: TrainerStep | None = None


def make_trainee(name: str, model: GenerativeAdapter, preset: Preset, guard: bool = True) -> Trainee:
    """The provider by that name on a model.

    Args:
        name: one of PROVIDERS.
        model: which carries the base of all providers.
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

    def losses(batch: WindowBatch) -> Mapping[str, WindowLoss]:
        hidden = model(batch.input_ids, batch.mask, batch.chunks, batch.seen)[0]
        with part("loss"):
            return token_losses(model, hidden, batch.input_ids, batch.targets)

    parameters = dict(model.generators.named_parameters())
    trainer = TrainerStep(parameters, losses, model.base.dtype) if name == "trainer" else None
    return Trainee(parameters, lambda batch: losses(batch)["next_token"].mean, context, trainer)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend of the operations while the block runs; nothing is forced by an empty name."""
    with patch.dict(os.environ):
        os.environ.pop(ENVIRONMENT_VARIABLE, None)
        if name:
            os.environ[ENVIRONMENT_VARIABLE] = name
        yield


@contextmanager
def parts_marked(model: GenerativeAdapter) -> Iterator[None]:
    """The library's parts of a step are named regions for a `PartClock` while the block runs.

    `adapted_linear` has the base product of the adapted layer in it, for all providers; `loss` has the output head.
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
    """Largest relative distance of a provider's loss and gradients to its oracle, on a tiny float64 model.

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
    """The loss and gradients of a floor by another way: W + scale A1 B2 as the weights of the base."""
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
    """RMSNorms in the dtype of their input while the block runs: those of transformers round float64 to float32."""
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
