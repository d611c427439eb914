"""Every kernel once, at sizes with tails, forward and backward: what the stages of compute-sanitizer watch.

compute-sanitizer --tool racecheck python -m benchmarks.one_of_each
"""

import argparse
import sys

import torch

from benchmarks.operations import Operation, Sizes, operations_of, seeded, with_leaves
from benchmarks.providers import with_backend
from gakernels import ops
from gakernels.ops import dispatch

SIZES = Sizes(chunks=2, tokens=70, hidden=136, state=256, rank=32, layers=((136, 200),))
KERNELS = ("triton", "cuda")


def run(operation: Operation, backend: str) -> str | None:
    """One forward and backward; returns why the backend can't, or None when it is done."""
    arguments, leaves = with_leaves(operation, operation.draw(seeded(operation.device, 0)))
    obstacle = dispatch.why_not(operation.name, backend, *arguments)
    if obstacle is not None:
        return obstacle
    returned = with_backend(backend, getattr(ops, operation.name))(*arguments)
    outputs, gradients = operation.upstream(returned, torch.ones_like(operation.defined(returned)))
    torch.autograd.grad(outputs, leaves, gradients)
    if operation.device.type == "cuda":
        torch.cuda.synchronize(operation.device)
    return None


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 where no kernel at all could run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.one_of_each", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options = parser.parse_args(arguments)
    done = 0
    for dtype in (torch.bfloat16, torch.float32):
        for operation in operations_of(SIZES, torch.device(options.device), dtype):
            for backend in KERNELS:
                obstacle = run(operation, backend)
                done += obstacle is None
                print(f"{operation.name} {operation.dtype} {backend}: {obstacle or 'done'}", flush=True)
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
