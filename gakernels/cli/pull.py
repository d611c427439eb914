"""`gakernels pull`: a generator or an adapter from the Hugging Face hub."""

import argparse
import shutil
from pathlib import Path
from typing import Any

from gakernels.adapters.adapter import Adapter
from gakernels.cli.common import add_command
from gakernels.cli.push import ADAPTER_FILE
from gakernels.errors import InputError
from gakernels.files import read_tensors
from gakernels.model import GENERATOR_FILE
from gakernels.model.hub import download, is_repository_name
from gakernels.paths import user_path


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "pull",
        run,
        "Download a generator or an adapter that `gakernels push` uploaded, and check it.",
        "  gakernels pull --from owner/name --output my-generator",
    )
    parser.add_argument("--from", required=True, dest="source", metavar="OWNER/NAME", help="repository on the hub")
    parser.add_argument("--output", type=user_path, required=True, help="folder to write")
    parser.add_argument("--revision", help="branch, tag or commit (default: the main branch)")


def run(options: argparse.Namespace) -> int:
    """Download, check, copy."""
    if not is_repository_name(options.source):
        raise InputError(f"--from must be a name on the hub, as owner/name, but it is {options.source}")
    if options.output.exists() and not options.output.is_dir():
        raise InputError(f"--output must be a folder, but {options.output} is not a folder")
    folder = download(options.source, options.revision)
    what, base = _checked(folder, options.source)
    shutil.copytree(folder, options.output, dirs_exist_ok=True)
    print(f"{what} for the base model {base} written: {options.output}")
    return 0


def _checked(folder: Path, source: str) -> tuple[str, str]:
    """What the folder holds, and for which base model. Raises: InputError: neither; FormatError: it is damaged."""
    if (folder / GENERATOR_FILE).is_file():
        return "generator", read_tensors(folder / GENERATOR_FILE, "generator")[1]["base_name"]
    if (folder / ADAPTER_FILE).is_file():
        return "adapter", Adapter.load(folder / ADAPTER_FILE).base_name
    raise InputError(f"--from must be a repository with {GENERATOR_FILE} or {ADAPTER_FILE}, but {source} has neither")
