"""SIGTERM and SIGINT: the step under way is finished, and the run can be resumed."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from regression import Problem, drawn_seed, log_of, make_trainer

from gakernels.training.checkpoint import find_checkpoints
from gakernels.training.trainer import TrainingStopped, stop_requests


def signalled(problem: Problem, at: int, number: int, times: int = 1) -> Any:
    """The problem's objective; in the middle of a step a signal comes."""

    def objective(step: int) -> Any:
        for _ in range(times if step + 1 == at else 0):
            os.kill(os.getpid(), number)
        return problem.objective(step)

    return objective


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_run_leaves_with_a_checkpoint_and_goes_on_as_if_nothing_had_been(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals, code: int
) -> None:
    seed = drawn_seed()
    whole, problem, resumed = Problem(seed), Problem(seed), Problem(seed)
    make_trainer(whole, tmp_path / "whole").run()
    before = signal.getsignal(number)
    with pytest.raises(TrainingStopped) as stopped:
        make_trainer(problem, tmp_path / "parts", signalled(problem, 8, number)).run()
    assert stopped.value.code == code
    assert signal.getsignal(number) == before
    message = f"stopped by {number.name} after step 8; the same command resumes from {tmp_path}/parts/checkpoints"
    assert message in str(stopped.value)
    assert message in capsys.readouterr().err
    assert problem.steps_taken == list(range(8))
    assert find_checkpoints(tmp_path / "parts" / "checkpoints")[-1].name == "step-00000008"
    assert [line["step"] for line in log_of(tmp_path / "parts")] == [3, 6]
    make_trainer(resumed, tmp_path / "parts").run()
    assert resumed.steps_taken[0] == 8
    assert all(a.equal(b) for a, b in zip(whole.values(), resumed.values(), strict=True))
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")


def test_a_second_interrupt_does_what_it_always_did(tmp_path: Path) -> None:
    problem = Problem(drawn_seed())
    with pytest.raises(KeyboardInterrupt):
        make_trainer(problem, tmp_path, signalled(problem, 8, signal.SIGINT, times=2)).run()
    assert find_checkpoints(tmp_path / "checkpoints")[-1].name == "step-00000005"


def test_a_signal_in_the_last_step_is_too_late_to_stop_it(tmp_path: Path) -> None:
    problem = Problem(drawn_seed())
    make_trainer(problem, tmp_path, signalled(problem, 20, signal.SIGTERM)).run()
    assert log_of(tmp_path)[-1]["step"] == 20


def test_without_a_folder_there_is_nothing_to_go_on_from() -> None:
    problem = Problem(drawn_seed())
    with pytest.raises(TrainingStopped, match=r"stopped by SIGTERM after step 2$"):
        make_trainer(problem, None, signalled(problem, 2, signal.SIGTERM)).run()


def test_another_thread_than_the_main_one_can_train_too(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    seen: list[Any] = []

    def train() -> None:
        with stop_requests() as request:
            seen.append(signal.getsignal(signal.SIGTERM))
        make_trainer(Problem(1), tmp_path).run()
        seen.append(request.number)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [handler, 0]
    assert log_of(tmp_path)[-1]["step"] == 20
