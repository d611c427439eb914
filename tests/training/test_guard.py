"""Steps that would do harm are skipped and reported; all others are as if there were no guard."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from regression import Problem, drawn_seed, log_of, make_trainer
from torch import Tensor

from gakernels.model.window_losses import Loss
from gakernels.training.checkpoint import find_checkpoints
from gakernels.training.step import LEAST, RECENT, StepGuard


def spoiled(problem: Problem, bad: set[int], what: str) -> Any:
    """The problem's objective, spoiled in some steps, counted from 1."""

    def objective(step: int) -> dict[str, Loss]:
        losses = problem.objective(step)
        if step + 1 in bad:
            losses["penalty"] = Loss(spoil(losses["penalty"].total, what), losses["penalty"].tokens)
        return losses

    return objective


def spoil(total: Tensor, what: str) -> Tensor:
    if what == "loss":
        return total * torch.nan
    if what == "spike":
        return total * 1e6
    zero = (total - total.detach()).abs()  # a finite loss with an infinite gradient
    return total.detach() + torch.where(zero == 0, zero, zero.sqrt()) + (zero + 1e-45).sqrt() * 1e-10


def by_hand(problem: Problem, skipped: set[int]) -> None:
    """The same run with the bad steps left out; the schedule goes on."""
    parameters = list(problem.parameters.values())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, fused=True)
    for step in range(40):
        if step + 1 in skipped:
            continue
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * min((step + 1) / 4, (40 - step) / 36)
        optimizer.zero_grad()
        sum(loss.mean for loss in problem.objective(step).values()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("loss", "the loss 'penalty' is not finite"),
        ("gradient", "the gradient is not finite"),
        ("spike", "the loss is far above those before it"),
    ],
)
def test_bad_steps_are_skipped_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, reason: str
) -> None:
    problem = Problem(drawn_seed())
    first = int(torch.randint(LEAST + 2, 38, ()))
    bad = {first, first + 2}
    make_trainer(problem, tmp_path, spoiled(problem, bad, what), steps=40, spike_factor=1e3).run()
    plain = Problem(problem.seed)
    by_hand(plain, bad)
    assert all(a.equal(b) for a, b in zip(problem.values(), plain.values(), strict=True))
    log = log_of(tmp_path)
    assert {step for line in log for step in line.get("skipped", [])} == bad
    assert all(math.isfinite(line["loss"]["penalty"]) and line["loss"]["penalty"] < 1e4 for line in log)
    errors = capsys.readouterr().err
    assert all(f"step {step} was skipped: {reason}" in errors for step in bad)


def test_without_bad_steps_it_changes_no_bit(tmp_path: Path) -> None:
    problem = Problem(drawn_seed())
    plain = Problem(problem.seed)
    make_trainer(problem, tmp_path, steps=40, spike_factor=1e3).run()
    by_hand(plain, set())
    assert all(a.equal(b) for a, b in zip(problem.values(), plain.values(), strict=True))
    assert not any("skipped" in line for line in log_of(tmp_path))


def test_a_line_whose_steps_were_all_skipped_has_no_loss(tmp_path: Path) -> None:
    problem = Problem(drawn_seed())
    make_trainer(problem, tmp_path, spoiled(problem, {7, 8, 9}, "loss")).run()
    line = log_of(tmp_path)[2]
    assert line["step"] == 9
    assert line["loss"] == {}
    assert line["gradient_norm"] is None
    assert line["skipped"] == [7, 8, 9]


def test_no_checkpoint_is_written_after_a_bad_step(tmp_path: Path) -> None:
    problem = Problem(drawn_seed())
    make_trainer(problem, tmp_path, spoiled(problem, {10, 11}, "loss"), keep_checkpoints=9).run()
    names = [path.name for path in find_checkpoints(tmp_path / "checkpoints")]
    assert names == ["step-00000005", "step-00000012", "step-00000015", "step-00000020"]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_too_many_in_a_row_end_the_run_and_leave_the_last_good_checkpoint(tmp_path: Path, what: str) -> None:
    problem = Problem(drawn_seed())
    reason = "the loss 'penalty' is not finite" if what == "loss" else "the gradient is not finite"
    objective = spoiled(problem, {3, 4, *range(8, 20)}, what)
    message = f"training stopped: 3 steps in a row were skipped, and in step 10 {reason}; a lower learning rate"
    with pytest.raises(FloatingPointError, match=message):
        make_trainer(problem, tmp_path, objective, most_skipped=3).run()
    assert [path.name for path in find_checkpoints(tmp_path / "checkpoints")] == ["step-00000005"]
    good = Problem(problem.seed)
    make_trainer(good, tmp_path, most_skipped=3).run()  # resumes from the last good state
    assert good.steps_taken[0] == 5
    assert all(value.isfinite().all() for value in good.values())


def test_a_run_that_ends_with_bad_steps_has_failed(tmp_path: Path) -> None:
    problem = Problem(drawn_seed())
    with pytest.raises(FloatingPointError, match="training stopped: 2 steps in a row were skipped"):
        make_trainer(problem, tmp_path, spoiled(problem, {19, 20}, "loss")).run()
    assert find_checkpoints(tmp_path / "checkpoints")[-1].name == "step-00000015"
    problem = Problem(problem.seed)
    make_trainer(problem, tmp_path / "one", spoiled(problem, {20}, "loss")).run()  # chance, not divergence
    assert find_checkpoints(tmp_path / "one" / "checkpoints")[-1].name == "step-00000020"


def test_the_limit_is_a_multiple_of_the_median_of_recent_good_losses() -> None:
    factor = 1.1 + 0.4 * float(torch.rand(()))  # the largest loss is 1.75 times the median of all
    guard, good, found = StepGuard(torch.device("cpu"), factor), torch.empty(0), []
    for loss in torch.rand(300) * 3 + 0.5:
        spike = len(good) >= LEAST and bool(loss > factor * good[-RECENT:].median())
        found.append(spike)
        assert guard.judge(loss, torch.tensor(1.0)) == spike
        good = good if spike else torch.cat([good, loss[None]])
    assert 0 < sum(found) < 250


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_that_is_not_finite_counts_as_good(value: float) -> None:
    guard, one = StepGuard(torch.device("cpu")), torch.tensor(1.0)
    assert guard.judge(torch.tensor(value), one) == 1
    assert guard.judge(one, torch.tensor(value)) == 1
    assert guard.judge(one, one) == 0
