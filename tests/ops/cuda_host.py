"""The kernels of csrc/ built for the host, where fibers stand for the threads of a block (csrc/emulated_thread.h)."""

import fcntl
import functools
import hashlib
import importlib.machinery
import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from gakernels.ops.low_rank_polar import extension
from gakernels.ops.low_rank_polar.eager import Steps

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
FLAGS = (
    "-O2",
    "-ftree-vectorize",
    "-march=native",
    "-std=c++17",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-fPIC",
    "-fvisibility=hidden",
)


@functools.cache
def kernels() -> Any:
    """The extension module of the emulation. Skips where it can't be built, fails where it does not compile."""
    built = _build()
    return _load(built) if isinstance(built, Path) else pytest.fail(built)


@functools.cache
def _build() -> Path | str:
    """The library, compiled once for all test processes, or what the compiler said."""
    pybind11 = pytest.importorskip("pybind11", reason="the Python package pybind11 is not installed")
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    includes = [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    command = [compiler, *FLAGS, "-DGAKERNELS_MODULE=_host", *includes, "-shared"]
    sources = [CSRC / "launch_host.cpp", CSRC / "bindings.cpp"]
    digest = hashlib.sha256(" ".join(command).encode())
    for file in sorted(CSRC.glob("*.*")):
        digest.update(file.read_bytes())
    folder = ROOT / "build" / "host" / digest.hexdigest()[:16]
    library = folder / "_host.so"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.is_file():
            made = folder / "_host.tmp"
            done = subprocess.run([*command, *map(str, sources), "-o", str(made)], capture_output=True, text=True)
            if done.returncode:
                return done.stderr
            made.replace(library)
    return library


def _load(library: Path) -> Any:
    loader = importlib.machinery.ExtensionFileLoader("_host", str(library))
    spec = importlib.util.spec_from_loader("_host", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def forward(
    states: Tensor, sketch: Tensor, power_iterations: int = 1, damping: float = 1e-3, multiprocessors: int = 132
) -> tuple[Tensor, Tensor, Steps]:
    target = extension.Target(kernels(), 0, multiprocessors)
    return extension.forward(target, states, sketch, power_iterations, damping)


def backward(
    grad_u: Tensor,
    grad_v: Tensor,
    states: Tensor,
    sketch: Tensor,
    steps: Steps,
    damping: float,
    multiprocessors: int = 132,
) -> Tensor:
    target = extension.Target(kernels(), 0, multiprocessors)
    return extension.backward(target, grad_u, grad_v, states, sketch, steps, damping)


def norm_and_gradient(
    states: Tensor,
    sketch: Tensor,
    upstream: Tensor,
    power_iterations: int = 1,
    damping: float = 1e-3,
    multiprocessors: int = 132,
) -> tuple[Tensor, Tensor]:
    """norm(S) = u v^T and the gradient of <upstream, norm(S)>, both in float64; NaN upstream where norm(S) is NaN."""
    u, v, steps = forward(states, sketch, power_iterations, damping, multiprocessors)
    grads = (upstream.double() @ v.double()).float(), (upstream.double().mT @ u.double()).float()
    gradient = backward(*grads, states, sketch, steps, damping, multiprocessors)
    return u.double() @ v.double().mT, gradient.double()
