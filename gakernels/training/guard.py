"""Steps that would do harm are not taken: not finite, or a loss far above those before it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

RECENT, LEAST = 64, 16  # losses that the median is taken of, and how many there must be


class StepGuard:
    """Decides about each step on the device, where AdamW reads the decision: nothing waits for it.

    A step is bad if its loss or gradient norm is not finite, or if the loss is above `spike_factor` times the median of
    the last 64 losses of good steps, once there are 16.
    """

    def __init__(self, device: torch.device, spike_factor: float = math.inf) -> None:
        self._factor = spike_factor
        self._recent = torch.full((RECENT,), math.nan, device=device)
        self._good = torch.zeros((), dtype=torch.int64, device=device)

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """1.0 for a bad step and 0.0 for a good one (a tensor), of its loss and gradient norm."""
        loss = loss.to(self._recent.dtype)
        spike = (loss > self._factor * self._recent.nanmedian()) & (self._good >= LEAST)
        bad = spike | ~(loss.isfinite() & norm.isfinite())
        place = (self._good % RECENT)[None]
        self._recent.index_copy_(0, place, torch.where(bad, self._recent[place], loss))
        self._good += ~bad
        return bad.float()

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps; a resumed run writes into these."""
        return {"recent": self._recent, "good": self._good}


@dataclass
class SkippedSteps:
    """Decisions of the guard on the host: on a GPU those of all steps but the newest, so that nothing waits for it."""

    in_a_row: int = 0
    _pending: list[tuple[int, Tensor, "torch.cuda.Event | None"]] = field(default_factory=list)

    def add(self, step: int, bad: Tensor) -> None:
        """The decision about a step is on its way."""
        if bad.device.type != "cuda":
            self._pending.append((step, bad, None))
            return
        host = torch.empty((), pin_memory=True)
        host.copy_(bad, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((step, host, event))

    def read(self, all_of_them: bool = False) -> list[int]:
        """The bad steps among those decided since the last call."""
        late = 1 if self._pending and self._pending[-1][2] is not None and not all_of_them else 0
        ready, self._pending = self._pending[: len(self._pending) - late], self._pending[len(self._pending) - late :]
        skipped = []
        for step, bad, event in ready:
            if event is not None:
                event.synchronize()
            self.in_a_row = self.in_a_row + 1 if bad.item() else 0
            if self.in_a_row:
                skipped.append(step)
        return skipped


def culprit(losses: Mapping[str, float], norm: float) -> str:
    """What was wrong with a bad step, in words."""
    names = [f"loss {name!r}" for name, value in losses.items() if not math.isfinite(value)]
    if names:
        return f"the {names[0]} is not finite"
    return "the loss is far above those before it" if math.isfinite(norm) else "the gradient is not finite"
