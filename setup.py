"""Build the CUDA extension `gakernels._cuda` with nvcc and ninja; without nvcc, install the package without it.

GAKERNELS_CUDA_BUILD: `auto` (default: built if nvcc is found), `force` (an error without nvcc) or `skip`.
GAKERNELS_CUDA_ARCHS: architectures to compile for, separated by commas (default: 90a, for an H100 or H200).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
SOURCES = ("csrc/launch.cu", "csrc/bindings.cpp")
HEADERS = tuple(sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.*h")))
ARCHITECTURES = os.environ.get("GAKERNELS_CUDA_ARCHS", "90a")

RULES = """
ninja_required_version = 1.5
rule compile
  command = $nvcc $flags $includes -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $nvcc -shared -cudart static $in -o $out
"""


class NinjaBuild(build_ext):
    """Compiles the extension; objects that are up to date in `build/cuda` are not rebuilt."""

    def build_extension(self, extension: Extension) -> None:
        output = Path(self.get_ext_fullpath(extension.name)).resolve()
        folder = ROOT / "build" / "cuda"
        for made in (output.parent, folder):
            made.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(_ninja_file(output), encoding="utf-8")
        subprocess.run([_ninja(), "-C", str(folder)], check=True)


def _ninja_file(output: Path) -> str:
    import sysconfig

    import pybind11

    includes = (pybind11.get_include(), sysconfig.get_paths()["include"])
    codes = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in ARCHITECTURES.split(",")]
    flags = [
        *("-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra", "-Xptxas", "-warn-spills"),
        *codes,
        f"-DGAKERNELS_ARCHITECTURES='\"{ARCHITECTURES}\"'",
        "-DGAKERNELS_MODULE=_cuda",
    ]
    objects = {source: Path(source).stem + ".o" for source in SOURCES}
    lines = [f"nvcc = {_escape(str(_nvcc()))}", f"flags = {' '.join(flags)}", RULES]
    for source, built in objects.items():
        lines.append(f"build {built}: compile {_escape(str(ROOT / source))}")
        if source.endswith(".cpp"):  # the kernels do not depend on Python, so other versions can reuse their objects
            lines.append("  includes = " + " ".join(f"-isystem {_escape(include)}" for include in includes))
    lines += [f"build {_escape(str(output))}: link {' '.join(objects.values())}", ""]
    return "\n".join(lines)


def _escape(path: str) -> str:
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _nvcc() -> Path | None:
    """nvcc of the toolkit that CUDA_HOME or CUDA_PATH names if one is set, else from PATH or the usual place."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if not named and (found := shutil.which("nvcc")):
        return Path(found)
    nvcc = Path(named or "/usr/local/cuda") / "bin" / "nvcc"
    return nvcc if nvcc.is_file() else None


def _ninja() -> str:
    found = shutil.which("ninja")
    if found:
        return found
    import ninja

    return str(Path(ninja.BIN_DIR) / "ninja")


def _obstacle() -> str | None:
    """Why the extension can't be built here, or None if it can."""
    if _nvcc() is None:
        return "nvcc was not found (CUDA_HOME or CUDA_PATH if set, else PATH, /usr/local/cuda)"
    for package in ("pybind11", "ninja"):
        try:
            __import__(package)
        except ImportError:
            if package != "ninja" or shutil.which("ninja") is None:
                return f"the Python package {package} is not installed"
    return None


def _extensions() -> list[Extension]:
    mode = os.environ.get("GAKERNELS_CUDA_BUILD", "auto")
    if mode not in ("auto", "force", "skip"):
        raise SystemExit(f"GAKERNELS_CUDA_BUILD must be auto, force or skip, but it is {mode!r}")
    obstacle = "GAKERNELS_CUDA_BUILD=skip" if mode == "skip" else _obstacle()
    if obstacle is None:
        return [Extension("gakernels._cuda", sources=list(SOURCES), depends=list(HEADERS))]
    if mode == "force":
        raise SystemExit(f"GAKERNELS_CUDA_BUILD=force, but the CUDA extension can't be built: {obstacle}")
    print(f"gakernels: the CUDA extension is not built: {obstacle}", file=sys.stderr)
    return []


setup(ext_modules=_extensions(), cmdclass={"build_ext": NinjaBuild})
