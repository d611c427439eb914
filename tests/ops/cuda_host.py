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
    "-U_FORTIFY_SOURCE",
    "-D_FORTIFY_SOURCE=2",  # the default of some distributions
)


@functools.cache
def kernels() -> Any:
    """The extension module of the emulation. Skips where it can't be built, fails where it does not compile."""
    return module("_host", CSRC / "launch_host.cpp", CSRC / "bindings.cpp")


def module(name: str, *sources: Path) -> Any:
    """An extension module of sources that may include those of csrc/. Skips and fails as `kernels`."""
    built = _build(name, sources)
    return _load(name, built) if isinstance(built, Path) else pytest.fail(built)


def _build(name: str, sources: tuple[Path, ...]) -> Path | str:
    """The library, compiled once for all test processes, or what the compiler said."""
    pybind11 = pytest.importorskip("pybind11", reason="the Python package pybind11 is not installed")
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    includes = [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    command = [compiler, *FLAGS, f"-DGAKERNELS_MODULE={name}", f"-I{CSRC}", *includes, "-shared"]
    digest = hashlib.sha256(" ".join(command).encode())
    for file in sorted({*CSRC.glob("*.*"), *sources}):
        digest.update(file.read_bytes())
    folder = ROOT / "build" / "host" / digest.hexdigest()[:16]
    library = folder / f"{name}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.is_file():
            made = folder / f"{name}.tmp"
            done = subprocess.run([*command, *map(str, sources), "-o", str(made)], capture_output=True, text=True)
            if done.returncode:
                return done.stderr
            made.replace(library)
    return library


def _load(name: str, library: Path) -> Any:
    loader = importlib.machinery.ExtensionFileLoader(name, str(library))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    loaded = importlib.util.module_from_spec(spec)
    loader.exec_module(loaded)
    return loaded


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
