"""`gakernels calibrate`: check and time the kernels on this machine's GPU, and store the findings."""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gakernels.cli.call_options import add_call_options, planned_calls, recipe_of_calls
from gakernels.cli.common import add_command
from gakernels.errors import InputError
from gakernels.files import write_text
from gakernels.ops import dispatch, gpus
from gakernels.ops.measured import calibration
from gakernels.paths import CACHE_VARIABLE
from gakernels.training import calibrating
from gakernels.training.planned_calls import Call

TINY = {"batch": 2, "tokens": 20, "hidden": 32, "state": 32, "rank": 16, "in": 32, "out": 48}


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "calibrate",
        run,
        "Check and time the kernels on this machine's GPU; the correct and fastest ones become the default here.",
        "  gakernels calibrate --model mistral-7b",
    )
    add_call_options(parser)
    parser.add_argument("--seconds", type=float, default=60.0, help="time limit in seconds (default: %(default)g)")
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: only rehearse, at tiny sizes (with TRITON_INTERPRET=1 in Triton's interpreter), and store nothing",
    )


def run(options: argparse.Namespace) -> int:
    """Calibrate and print the findings. Returns 0; a wrong kernel is turned off, which is not an error."""
    if not options.seconds > 0:
        raise InputError(f"--seconds must be above 0, but it is {options.seconds:g}")
    rehearsal = options.device == "cpu"
    if not rehearsal and not torch.cuda.is_available():
        raise InputError("an NVIDIA GPU is needed, but this torch finds none (--device cpu only rehearses)")
    stages = planned_calls(recipe_of_calls(options))
    calls = [call for stage in stages.values() for call in stage]
    gpu = None if rehearsal else gpus.gpu_of("cuda", None)
    path = None if gpu is None else _place(gpu)
    target: calibrating.Device = calibrating.CpuDevice() if rehearsal else calibrating.GpuDevice()
    findings = calibrating.calibrate(_tiny(calls) if rehearsal else calls, target, options.seconds, print)
    _tell(findings)
    if gpu is None or path is None:
        print("rehearsed on the CPU: nothing is stored")
        return 0
    write_text(path, json.dumps(findings.record(gpu), indent=1) + "\n")
    dispatch.forget()
    print(f"stored in {path}")
    return 0


def _place(gpu: gpus.Gpu) -> Path:
    """The path of the record; checks that it can be written before the calibration rather than after it.

    Raises:
        InputError: it can't be written.
    """
    path = calibration.path_of(gpu)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(
            f"the record of this GPU can't be written to {path.parent}: {error.strerror or error}; set "
            f"{CACHE_VARIABLE} to use another cache folder"
        ) from error
    return path


def _tiny(calls: list[Call]) -> list[Call]:
    """The same calls at sizes that the interpreter can handle, in float32: it has no bfloat16."""
    sizes = [tuple((name, min(size, TINY.get(name, size))) for name, size in call.sizes) for call in calls]
    return [replace(call, dtype=torch.float32, sizes=small) for call, small in zip(calls, sizes, strict=True)]


def _tell(findings: calibrating.Findings) -> None:
    print()
    for name, fault in findings.checks.items():
        print(f"{name:28} {'right' if not fault else f'WRONG, and off on this GPU: {fault}'}")
    for name in findings.unchecked:
        print(f"{name:28} not checked: out of time; run again with more --seconds")
    if not findings.checks and not findings.unchecked:
        print("no kernel can run here (`gakernels info` says why)")
    missed = f"; there was no time for {findings.unmeasured} more" if findings.unmeasured else ""
    print(f"{len(findings.rows)} calls measured{missed}")
