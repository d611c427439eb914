"""The training loop equals a plain one."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from regression import Problem, drawn_seed, make_trainer
from torch import Tensor

from gakernels import InputError
from gakernels.training.step import learning_rate_factor
from gakernels.training.trainer import TrainerConfig


def adamw_by_hand(problem: Problem, steps: int, rate: float, warmup: int, decay: float, clip: float) -> None:
    """AdamW with betas 0.9 and 0.95, in float64 outside of the parameters; matrices decay, vectors don't."""
    parameters = list(problem.parameters.values())
    means = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in parameters]
    squares = [mean.clone() for mean in means]
    for step in range(steps):
        losses = problem.objective(step)
        total = losses["regression"].total / losses["regression"].tokens + 0.3 * losses["penalty"].total / 14
        gradients = [gradient.double() for gradient in torch.autograd.grad(total, parameters)]
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        now = rate * learning_rate_factor("linear", step, warmup, steps)
        for parameter, gradient, mean, square in zip(parameters, gradients, means, squares, strict=True):
            clipped = gradient * min(1.0, clip / norm)
            mean.mul_(0.9).add_(clipped, alpha=0.1)
            square.mul_(0.95).add_(clipped.square(), alpha=0.05)
            direction = mean / (1 - 0.9 ** (step + 1)) / ((square / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
            shrunk = parameter.detach() * (1 - now * decay * (parameter.dim() > 1))
            parameter.data = (shrunk - now * direction).float()


@pytest.mark.parametrize("clip", [0.1, 1e6])
def test_it_equals_adamw_written_by_hand(clip: float) -> None:
    seed = drawn_seed()
    ours, plain = Problem(seed), Problem(seed)
    make_trainer(
        ours, betas=(0.9, 0.95), weight_decay=0.5, clip=clip, loss_weights=(("penalty", 0.3),), log_every=100
    ).run()
    adamw_by_hand(plain, steps=20, rate=0.05, warmup=4, decay=0.5, clip=clip)
    start = Problem(seed).values()
    for a, b, before in zip(ours.values(), plain.values(), start, strict=True):
        # 20 steps of at most 0.05 in float32, where a gradient near zero may turn a direction by its rounding noise.
        assert (a - b).abs().max() < 1e-3
        assert (a - before).abs().max() > 0.05


def test_steps_are_taken_in_order() -> None:
    problem = Problem(drawn_seed())
    make_trainer(problem, steps=7).run()
    assert problem.steps_taken == list(range(7))


def test_the_log_has_the_means_since_the_line_before(tmp_path: Path) -> None:
    problem = Problem(drawn_seed())
    totals: list[dict[str, tuple[Tensor, Tensor]]] = []

    def objective(step: int) -> Any:
        losses = problem.objective(step)
        totals.append({name: (loss.total.detach(), loss.tokens) for name, loss in losses.items()})
        return losses

    lines = make_trainer(problem, tmp_path, objective, steps=8, log_every=3, checkpoint_every=100).run()
    assert [line["step"] for line in lines] == [3, 6, 8]
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == lines
    start = 0
    for line in lines:
        for name in ("regression", "penalty"):
            parts = [step[name] for step in totals[start : line["step"]]]
            mean = sum(float(total) for total, _ in parts) / sum(int(tokens) for _, tokens in parts)
            assert line["loss"][name] == pytest.approx(mean, rel=1e-5)
            assert line["perplexity"][name] == pytest.approx(math.exp(mean), rel=1e-4)
        start = line["step"]
        assert line["learning_rate"] == 0.05 * learning_rate_factor("linear", start - 1, 4, 8)


def test_the_logged_gradient_norm_is_the_one_before_clipping(tmp_path: Path) -> None:
    problem = Problem(drawn_seed())
    losses = problem.objective(0)
    total = losses["regression"].mean + losses["penalty"].mean
    gradients = torch.autograd.grad(total, list(problem.parameters.values()))
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
    lines = make_trainer(problem, steps=1, clip=1e-3).run()
    assert lines[0]["gradient_norm"] == pytest.approx(norm, rel=1e-5)


def test_a_loss_of_weight_zero_is_logged_and_left_out() -> None:
    seed = drawn_seed()
    without, with_zero = Problem(seed), Problem(seed)

    def regression_alone(step: int) -> Any:
        return {"regression": without.objective(step)["regression"]}

    make_trainer(without, objective=regression_alone).run()
    lines = make_trainer(with_zero, loss_weights=(("penalty", 0.0),)).run()
    assert all(a.equal(b) for a, b in zip(without.values(), with_zero.values(), strict=True))
    assert all(line["loss"]["penalty"] > 0 for line in lines)


def test_a_weight_for_an_unknown_loss_is_refused() -> None:
    trainer = make_trainer(Problem(drawn_seed()), loss_weights=(("penality", 0.5),))
    with pytest.raises(
        InputError, match="loss_weights must name losses out of regression, penalty, but names penality"
    ):
        trainer.run()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, but it is 0"),
        ({"log_every": 0}, "log_every must be at least 1, but it is 0"),
        ({"checkpoint_every": -1}, "checkpoint_every must be at least 1, but it is -1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0 and at most 1, but it is 0"),
        ({"learning_rate": math.nan}, "learning_rate must be above 0 and at most 1, but it is nan"),
        ({"learning_rate": 1e9}, "learning_rate must be above 0 and at most 1, but it is 1000000000"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, but it is -1"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and at least 0, but it is -0.1"),
        ({"clip": 0.0}, "clip must be above 0"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must be at least 0 and below 1, but it is 1"),
        ({"schedule": "steps"}, "schedule must be one of linear, cosine, constant, but it is 'steps'"),
        ({"precision": "float16"}, "precision must be one of float32, bfloat16, but it is 'float16'"),
        ({"spike_factor": 1.0}, "spike_factor must be above 1"),
        ({"spike_factor": math.nan}, "spike_factor must be above 1"),
        ({"most_skipped": 0}, "most_skipped must be at least 1, but it is 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1, but it is 0"),
        ({"evaluate_every": 0}, "evaluate_every must be at least 1, but it is 0"),
        ({"seed": -1}, r"seed must be between 0 and 4294967295, but it is -1"),
        ({"peak_tflops": 0.0}, "peak_tflops must be finite and above 0, but it is 0"),
        ({"reports": ("paper",)}, r"reports\[0\] must be one of tensorboard, wandb, but it is 'paper'"),
        (
            {"learning_rate_factors": (("*", -1.0),)},
            r"learning_rate_factors\.\* must be finite and at least 0, but it is -1",
        ),
        ({"loss_weights": (("copy", -0.5),)}, r"loss_weights\.copy must be finite and at least 0, but it is -0.5"),
        ({"loss_weights": (("copy", math.nan),)}, r"loss_weights\.copy must be finite and at least 0, but it is nan"),
    ],
)
def test_a_setting_out_of_range_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainerConfig(**{"steps": 1, **settings})
