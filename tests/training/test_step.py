"""One optimizer step: its gradient is that of the global batch, in whatever pieces it comes."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from regression import Problem, drawn_seed
from tiny import make_model, random_ids
from torch import Tensor

from gakernels import GenerativeAdapter, InputError
from gakernels.distributed import Parallel
from gakernels.model.window_losses import Loss, WindowBatch, pretraining_windows, window_losses
from gakernels.training.objective import StepFunction, WindowObjective, as_objective
from gakernels.training.step import TrainingStep, parameter_groups
from gakernels.training.trainer_config import TrainerConfig

CHUNKS, LENGTH = 3, 5


def make_windows(rows: int) -> WindowBatch:
    """Windows of which every row has another number of targets."""
    random = torch.Generator().manual_seed(drawn_seed())
    batch = pretraining_windows(random_ids(rows, CHUNKS * LENGTH), CHUNKS, random)
    counted = torch.rand(batch.input_ids.shape) < torch.rand(rows, 1, 1)
    return replace(batch, targets={name: target & counted for name, target in batch.targets.items()})


def row_of(batch: WindowBatch, row: int) -> WindowBatch:
    part = slice(row, row + 1)
    targets = {name: target[part] for name, target in batch.targets.items()}
    return WindowBatch(batch.input_ids[part], batch.mask[part], batch.chunks, batch.seen, targets)


def make_step(model: GenerativeAdapter, windows: list[WindowBatch], **settings: Any) -> TrainingStep:
    config = TrainerConfig(**{"steps": 9, "learning_rate": 1e-3, "clip": math.inf, **settings})
    objective = WindowObjective(lambda _: windows, lambda batch: window_losses(model, batch))
    return TrainingStep(config, dict(model.generators.named_parameters()), objective, Parallel())


def gradients_of(model: GenerativeAdapter) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.generators.parameters() if parameter.grad is not None]


def double_model() -> GenerativeAdapter:
    return make_model(base_dtype=torch.float64, dtype=torch.float64, chunk_size=LENGTH)


@pytest.mark.parametrize("weights", [(), (("reconstruction", 0.3),), (("completion", 0.0),)])
def test_the_gradient_is_that_of_the_mean_over_all_micro_batches(weights: tuple[tuple[str, float], ...]) -> None:
    model, batch = double_model(), make_windows(4)
    losses = window_losses(model, batch)
    factors = {"reconstruction": 1.0, "completion": 1.0, **dict(weights)}
    total = sum(factors[name] * loss.total / max(1, int(loss.tokens)) for name, loss in losses.items())
    total.backward()
    expected = gradients_of(model)
    result = make_step(model, [row_of(batch, row) for row in range(4)], loss_weights=weights)(0)
    for found, wanted in zip(gradients_of(model), expected, strict=True):
        assert (found - wanted).abs().max() <= 1e-10 * wanted.abs().max()
    assert result.totals.tolist() == pytest.approx([loss.total.item() for loss in losses.values()])
    assert result.tokens.tolist() == [loss.tokens.item() for loss in losses.values()]
    norm = torch.cat([gradient.flatten() for gradient in expected]).norm()
    assert result.norm.item() == pytest.approx(norm.item())
    assert result.bad == 0


def test_targets_are_counted_as_the_losses_count_them() -> None:
    batch = make_windows(3)
    batch.targets["completion"][..., 0] = True  # never predicted
    model = make_model(chunk_size=LENGTH)
    counts = WindowObjective(lambda _: [batch], lambda b: window_losses(model, b)).target_counts(batch)
    losses = window_losses(model, batch)
    assert {name: int(count) for name, count in counts.items()} == {n: int(loss.tokens) for n, loss in losses.items()}


def test_a_loss_without_targets_adds_nothing() -> None:
    model, batch, settings = double_model(), make_windows(2), {"learning_rate": 1e-15, "weight_decay": 0.0}
    alone = replace(batch, targets={**batch.targets, "completion": torch.zeros_like(batch.mask)})
    result = make_step(model, [alone], **settings)(0)
    assert result.bad == 0
    assert result.totals[1] == 0
    found = gradients_of(model)
    make_step(model, [alone], loss_weights=(("completion", 0.0),), **settings)(0)
    # Between the two steps every parameter moved by 1e-17.
    assert all((a - b).abs().max() <= 1e-8 * b.abs().max() for a, b in zip(found, gradients_of(model), strict=True))


def test_learning_rates_go_by_the_name_of_a_parameter() -> None:
    problem = Problem(drawn_seed())
    config = TrainerConfig(
        steps=4, learning_rate=0.01, warmup_steps=0, learning_rate_factors=(("second*", 0.5), ("*", 0.0))
    )
    before = problem.values()
    TrainingStep(config, problem.parameters, problem.objective, Parallel())(0)
    moved = [(now - then).abs().max().item() for now, then in zip(problem.values(), before, strict=True)]
    # The first step of AdamW moves every parameter by its rate, and weight decay by less than a hundredth of that.
    assert moved == pytest.approx([0.0, 0.005, 0.0], rel=0.1)


def test_groups_keep_the_first_pattern_that_fits_and_the_decay_of_matrices() -> None:
    parameters = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in {"a.w": (2, 2), "a.b": (2,)}.items()}
    config = TrainerConfig(steps=1, weight_decay=0.3, learning_rate_factors=(("a.*", 2.0), ("a.b", 3.0)))
    groups = parameter_groups(parameters, config)
    assert [(group["weight_decay"], group["factor"]) for group in groups] == [(0.3, 2.0), (0.0, 2.0)]
    with pytest.raises(InputError, match=r"learning_rate_factors: 'b\.\*' fits none of the parameters, as a\.b"):
        parameter_groups(parameters, replace(config, learning_rate_factors=(("b.*", 2.0),)))


def test_bfloat16_is_close_to_float32_and_leaves_parameters_as_they_are() -> None:
    model, batch = make_model(chunk_size=LENGTH), make_windows(4)
    exact = make_step(model, [batch], learning_rate=1e-9)(0)
    rough = make_step(model, [batch], learning_rate=1e-9, precision="bfloat16")(0)
    assert not rough.totals.equal(exact.totals)
    # bfloat16 has 8 bits; the losses are sums over hundreds of tokens.
    assert rough.totals.tolist() == pytest.approx(exact.totals.tolist(), rel=0.05)
    assert all(parameter.dtype == torch.float32 for parameter in model.generators.parameters())


def test_the_same_step_twice_gives_the_same_bits() -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(7)
        model = make_model(chunk_size=LENGTH)
        step = make_step(model, [make_windows(2), make_windows(2)])
        results.append([*[step(number).totals for number in range(3)], *[p.detach() for p in step._parameters]])
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


def test_a_function_of_the_step_is_an_objective() -> None:
    problem = Problem(drawn_seed())
    objective = as_objective(problem.objective)
    assert isinstance(objective, StepFunction)
    (batch,) = objective.batches(3)
    assert objective.losses(batch) is batch
    assert objective.target_counts(batch) == {name: loss.tokens for name, loss in batch.items()}
    assert as_objective(objective) is objective


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_weights": (("regression", 0.0), ("penalty", 0.0))}, "loss_weights must leave a loss to train on"),
        ({"loss_weights": (("other", 1.0),)}, "loss_weights must name losses out of regression, penalty, but names o"),
    ],
)
def test_weights_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    problem = Problem(drawn_seed())
    step = TrainingStep(TrainerConfig(steps=1, **settings), problem.parameters, problem.objective, Parallel())
    with pytest.raises(InputError, match=message):
        step(0)


def test_nothing_to_train_on_is_refused() -> None:
    problem = Problem(drawn_seed())
    with pytest.raises(InputError, match="parameters must be at least one, but there is none"):
        TrainingStep(TrainerConfig(steps=1), {}, problem.objective, Parallel())
    step = make_step(make_model(chunk_size=LENGTH), [])
    with pytest.raises(InputError, match="objective must give at least one micro-batch for each step, but step 4 has"):
        step(4)


def test_a_loss_left_out_may_be_anything() -> None:
    problem = Problem(drawn_seed())

    def objective(step: int) -> dict[str, Loss]:
        return {**problem.objective(step), "broken": Loss(torch.tensor(math.nan), torch.tensor(3))}

    config = TrainerConfig(steps=1, loss_weights=(("broken", 0.0),))
    assert TrainingStep(config, problem.parameters, objective, Parallel())(0).bad == 0
