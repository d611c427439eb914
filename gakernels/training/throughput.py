"""How fast a run goes: tokens a second, and the share of what the device could compute."""

import resource
import sys
from dataclasses import dataclass

import torch

# Dense bfloat16 with float32 sums, from the makers' data sheets; a part of the name that PyTorch gives, longer first.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "H200": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.2,
}


@dataclass(frozen=True)
class StepCost:
    """What an optimizer step works on, all processes together; on average where steps differ. 0: not known.

    Attributes:
        tokens: segment tokens (for instruction tuning those of contexts and conversations).
        flops: floating-point operations, forward and backward.
    """

    tokens: float = 0.0
    flops: float = 0.0

    def rates(self, seconds: float, devices: int, peak_tflops: float | None) -> dict[str, float]:
        """`tokens_per_second` and `mfu`, where they are known, of a step that took so long on so many devices."""
        rates = {"tokens_per_second": self.tokens / seconds} if self.tokens else {}
        if self.flops and peak_tflops:
            rates["mfu"] = self.flops / seconds / (peak_tflops * 1e12 * devices)
        return rates


def peak_tflops(device: torch.device) -> float | None:
    """The peak of a GPU in TFLOP/s from its name; None for others."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def peak_bytes(device: torch.device) -> int:
    """Most memory that this process had at once: tensors on a GPU, all of it on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
