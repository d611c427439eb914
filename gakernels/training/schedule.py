"""Learning-rate schedules: a linear warm-up, and what follows it."""

import math

from gakernels.errors import InputError

SCHEDULES = ("linear", "cosine", "constant")


def learning_rate_factor(schedule: str, step: int, warmup_steps: int, total_steps: int) -> float:
    """Factor of the learning rate at a step, counted from 0.

    The first step already learns: its factor is 1 / warmup_steps. After the warm-up the factor falls to zero along a
    straight line (`linear`, the paper's schedule, appendix B) or half a cosine (`cosine`), or stays (`constant`).

    Raises:
        InputError: there is no schedule of that name.
    """
    if schedule not in SCHEDULES:
        raise InputError(f"schedule must be one of {', '.join(SCHEDULES)}, but it is {schedule!r}")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    left = max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))
    if schedule == "linear":
        return left
    return (1 - math.cos(math.pi * left)) / 2 if schedule == "cosine" else 1.0


def steps_of_epochs(epochs: float, examples: int, batch_size: int) -> int:
    """The steps in which so many examples are seen so many times; the last step may begin another time.

    Raises:
        InputError: a value is not above 0.
    """
    for name, value in (("epochs", epochs), ("examples", examples), ("batch_size", batch_size)):
        if not 0 < value < math.inf:
            raise InputError(f"{name} must be above 0, but it is {value}")
    return math.ceil(epochs * examples / batch_size)
