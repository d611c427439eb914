"""Learning-rate schedule."""


def warmup_then_linear_decay(step: int, warmup_steps: int, total_steps: int) -> float:
    """Factor of the learning rate at a step, counted from 0: linear up over the warm-up, then linear down to zero.

    The paper's schedule (appendix B). The first step already learns: its factor is 1 / warmup_steps.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))
