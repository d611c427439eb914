"""`gakernels push`: a generator or an adapter to the Hugging Face hub."""

import argparse
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from gakernels.adapters.adapter import Adapter
from gakernels.cli.common import add_command
from gakernels.errors import InputError
from gakernels.files import read_tensors, write_tensors, write_text
from gakernels.model import GENERATOR_FILE
from gakernels.model.hub import is_repository_name, upload
from gakernels.model.model_card import adapter_card, generator_card
from gakernels.paths import user_path

ADAPTER_FILE, CARD = "adapter.safetensors", "README.md"


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "push",
        run,
        "Upload a generator, or an adapter (also as a PEFT folder), to the Hugging Face hub, with a model card made "
        "from the run. A new repository is private unless --public is given.",
        "  gakernels push --generator my-generator --to owner/name --base HuggingFaceTB/SmolLM2-135M-Instruct\n"
        "  gakernels push --adapter report.safetensors --to owner/report",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--generator", type=user_path, help="folder of a generator; a README.md in it is its card")
    what.add_argument("--adapter", type=user_path, help="adapter file that `gakernels adapt` wrote")
    parser.add_argument("--to", required=True, metavar="OWNER/NAME", help="repository on the hub")
    parser.add_argument(
        "--base", metavar="OWNER/NAME", help="the base model's name on the hub, if the file names a local folder"
    )
    parser.add_argument("--public", action="store_true", help="make a new repository public")


def run(options: argparse.Namespace) -> int:
    """Write the files to a temporary folder and upload it."""
    _check_name("--to", options.to)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write = _write_generator if options.adapter is None else _write_adapter
        write(options, folder)
        files = sorted(path.name for path in folder.iterdir())
        address = upload(folder, options.to, options.public)
    print(f"{', '.join(files)} uploaded:")
    print(address)
    return 0


def _write_generator(options: argparse.Namespace, folder: Path) -> None:
    source: Path = options.generator
    tensors, description = read_tensors(source / GENERATOR_FILE, "generator")
    description["base_name"] = _base_name(options, description["base_name"], source)
    write_tensors(folder / GENERATOR_FILE, "generator", tensors, description)
    write_text(folder / "generator.json", json.dumps(description, indent=2) + "\n")
    if (source / CARD).is_file():
        shutil.copyfile(source / CARD, folder / CARD)
        return
    numbers = sum(tensor.numel() for key, tensor in tensors.items() if not key.endswith(".sketch"))
    write_text(folder / CARD, generator_card(options.to, description, numbers, source))


def _write_adapter(options: argparse.Namespace, folder: Path) -> None:
    adapter = Adapter.load(options.adapter)
    adapter = replace(adapter, base_name=_base_name(options, adapter.base_name, options.adapter.parent))
    adapter.save(folder / ADAPTER_FILE)
    adapter.save_peft(folder)
    write_text(folder / CARD, adapter_card(options.to, adapter))


def _base_name(options: argparse.Namespace, name: str, folder: Path) -> str:
    """The base model's name, which must lead others to it too."""
    if options.base is not None:
        _check_name("--base", options.base)
        return str(options.base)
    if not is_repository_name(name) or (folder / name).exists():
        raise InputError(f"--base must name the base model on the hub, but is not given, and the file names {name!r}")
    return name


def _check_name(option: str, name: str) -> None:
    if not is_repository_name(name):
        raise InputError(f"{option} must be a name on the hub, as owner/name, but it is {name}")
