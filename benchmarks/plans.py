"""The plans of the GPU suite: stages in the order of their importance, each with a limit, and the minutes in all."""

import importlib.util
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.rows import ROOT
from benchmarks.stages import DONE, FAILED, SKIPPED, Result, Run, Stage

DEMO = ROOT / "gakernels" / "demo" / "assets" / "generator"
Command = Callable[[Run, float], list[str] | Result]


@dataclass(frozen=True)
class Plan:
    """Stages that fit into so many minutes on one H100 or H200; those at the end may be cut off."""

    what: str
    minutes: float
    stages: tuple[Stage, ...]


def _python(module: str, *words: str) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.{module}", *words]


# Correctness


def _build(_: Run, __: float) -> list[str] | Result:
    if importlib.util.find_spec("gakernels._cuda") is not None:
        return Result(DONE, "the CUDA extension was there")
    if shutil.which("nvcc") is None:
        return Result(FAILED, "nvcc is not there to build the CUDA sources")
    return ["env", "GAKERNELS_CUDA_BUILD=force", sys.executable, "setup.py", "build_ext", "--inplace"]


def _compile(run: Run, _: float) -> list[str] | Result:
    if importlib.util.find_spec("triton") is None:
        return Result(SKIPPED, "Triton is not installed")
    words = ("--presets", "tiny", "--operations", "context_state") if run.rehearsal else ("--presets", *SIZES)
    return ["env", "--unset=TRITON_INTERPRET", *_python("compile_ahead", *words)]


def _tests(run: Run, seconds: float) -> list[str]:
    few = ("tests/benchmarks/test_rows.py", "tests/ops/test_on_a_gpu.py", "--processes", "2", "-m", "")
    return _python("sharded_tests", "--seconds", f"{max(seconds - 10, 1):.0f}", *(few if run.rehearsal else ()))


def _sanitizer(tool: str) -> Stage:
    def command(_: Run, __: float) -> list[str] | Result:
        if shutil.which("compute-sanitizer") is None:
            return Result(SKIPPED, "compute-sanitizer is not installed")
        return ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *_python("one_of_each")]

    return Stage(tool, f"every kernel once under compute-sanitizer's {tool}", 120, command, needs_gpu=True)


# Times

SIZES = ("mistral-7b", "smollm2-135m", "mistral-7b-1-chunk")


def _worker(name: str, what: str, seconds: float, needs_gpu: bool = False) -> Stage:
    """A stage of `benchmarks.worker`."""

    def command(run: Run, _: float) -> list[str]:
        rehearsal = ["--rehearse"] if run.rehearsal else []
        return _python("worker", name, "--out", str(run.folder), "--since", str(run.row_count()), *rehearsal)

    return Stage(name, what, seconds, command, needs_gpu)


def _step(
    name: str,
    preset: str,
    providers: str,
    what: str,
    seconds: float,
    quantization: str | None = None,
    needs_gpu: bool = False,
) -> Stage:
    """Training steps, the providers of a stage in one process, with rows when they are done or the time is over."""

    def command(run: Run, left: float) -> list[str]:
        words = ["--preset", "tiny" if run.rehearsal else preset, "--providers", providers]
        words += ["--quantization", quantization] if quantization else []
        words += ["--steps", "2"] if run.rehearsal else []
        words += ["--device", run.device.type, "--rows", str(run.rows), "--seconds", f"{max(left - 20, 1):.0f}"]
        # What fits must not hang on how the allocator's blocks happen to be cut.
        return ["env", "PYTORCH_ALLOC_CONF=expandable_segments:True", *_python("train_step", *words)]

    return Stage(name, what, seconds, command, needs_gpu)


def _profile(preset: str, seconds: float) -> Stage:
    def command(run: Run, _: float) -> list[str]:
        words = ["--preset", "tiny" if run.rehearsal else preset, "--device", run.device.type]
        return _python("step_profile", *words, "--json", str(run.folder / "profile.json"))

    return Stage(f"profile_{preset}", f"a step of {preset}: kernels, launches, waits", seconds, command)


def _tune(preset: str, seconds: float) -> Stage:
    def command(run: Run, left: float) -> list[str] | Result:
        if importlib.util.find_spec("triton") is None:
            return Result(SKIPPED, "Triton is not installed")
        words = ["--preset", "tiny" if run.rehearsal else preset, "--device", run.device.type]
        words += ["--store", str(run.folder / "tuned.json")]
        words += ["--seconds", "0" if run.rehearsal else f"{max(left - 15, 1):.0f}"]
        return ["env", "--unset=TRITON_INTERPRET", *_python("tune", *words)]

    return Stage(f"tune_{preset}", f"launch settings at the sizes of {preset}", seconds, command)


def _demo(run: Run, _: float) -> list[str] | Result:
    if not DEMO.is_dir():
        return Result(SKIPPED, "the demo model is not part of this installation")
    words = ["demo", "--device", run.device.type, "--json", str(run.folder / "demo.json")]
    return [sys.executable, "-m", "gakernels", *words]


PLANS = {
    "check": Plan(
        "correctness: the kernels' tests",
        2,
        (
            Stage("build", "the CUDA sources", 60, _build, needs_gpu=True),
            Stage("tests", "all that are marked `gpu` or `kernels`, in many processes", 110, _tests),
        ),
    ),
    "operations": Plan(
        "the three operations and the modules, forward and backward, by provider",
        4,
        (
            Stage("compile", "their Triton kernels, in all processes at once", 45, _compile),
            _worker("operations", "kernels and plain PyTorch, several sizes", 130),
            _worker("modules", "the modules", 40),
            _worker("other_operations", "what others would use in their place", 50),
            _worker("many_states", "low_rank_polar for the states of 32 segments or users", 40),
            _worker("compiled", "the operations under torch.compile", 60, needs_gpu=True),
        ),
    ),
    "step": Plan(
        "training steps",
        5,
        (
            _step("step_smollm2-135m", "smollm2-135m", "trainer,dense_lora,frozen_base", "SmolLM2-135M, floors", 90),
            _profile("smollm2-135m", 40),
            _step("step_mistral-7b", "mistral-7b", "trainer", "Mistral-7B by the trainer", 60),
            _step("step_fp8", "mistral-7b", "trainer", "the same on a base in FP8", 60, "fp8"),
            _profile("mistral-7b", 50),
            *(
                _step(f"step_mistral-7b_{name}", "mistral-7b", name, f"Mistral-7B: {name}", 60)
                for name in ("dense_lora", "frozen_base", "reference", "auto")
            ),
            _worker("step_parts", "loss, norm, activation and rotation against those of others", 40),
            *(
                _step(f"step_{name}", "mistral-7b", name, f"Mistral-7B: {name}", 60, needs_gpu="compiled" in name)
                for name in ("overlap", "recompute", "compiled_layers", "overlap_compiled")
            ),
        ),
    ),
    "inference": Plan(
        "contexts of 1K to 128K tokens against the base model's prefill, decoding, many users",
        4,
        (
            _worker("inference", "all but the plain definitions", 150),
            _worker("inference_reference", "the plain definitions", 60),
            _worker("flash_attention", "contexts with flash-attn", 40, needs_gpu=True),
            Stage("demo", "the demo model's experiment", 90, _demo, needs_gpu=True),
        ),
    ),
    "tune": Plan(
        "launch settings of the kernels, into DIR/tuned.json",
        5,
        (
            _tune("mistral-7b", 200),
            _tune("smollm2-135m", 100),
        ),
    ),
    "sanitize": Plan(
        "memory errors, races and barriers of the kernels",
        5,
        tuple(_sanitizer(tool) for tool in ("memcheck", "racecheck", "synccheck")),
    ),
}
