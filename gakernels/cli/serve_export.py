"""`gakernels serve-export`: adapters for a server of another project, with the command that starts it."""

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gakernels.adapters.adapter import Adapter
from gakernels.adapters.peft_export import fit_vllm
from gakernels.cli.common import add_command
from gakernels.errors import InputError
from gakernels.paths import expanded, user_path

ENGINES = ("vllm", "llama.cpp")
_NAME = re.compile(r"[A-Za-z0-9_.-]+")


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "serve-export",
        run,
        "Write adapters in the form that vLLM or llama.cpp's llama-server loads, and print the command that serves "
        "them.",
        "  gakernels serve-export --engine vllm --output lora report.safetensors minutes.safetensors\n"
        "  gakernels serve-export --engine llama.cpp --model base.gguf --output lora report.safetensors",
    )
    parser.add_argument(
        "adapters", type=user_path, nargs="+", metavar="ADAPTER", help="adapter file that `gakernels adapt` wrote"
    )
    parser.add_argument("--engine", choices=ENGINES, default="vllm", help="default: %(default)s")
    parser.add_argument("--output", type=user_path, required=True, help="folder to write")
    parser.add_argument(
        "--model",
        type=expanded,
        help="base model that the server loads, for llama.cpp a GGUF file (default: the one that the adapters name)",
    )


def run(options: argparse.Namespace) -> int:
    """Write the adapters and print the command."""
    if set(str(options.output)) & set(",="):  # vLLM and llama.cpp split their options there
        raise InputError(f"--output must be a path without , and =, but it is {options.output}")
    adapters = _read(options.adapters)
    base = _base(options.model, [*adapters.values()], options.engine)
    options.output.mkdir(parents=True, exist_ok=True)
    write = _for_vllm if options.engine == "vllm" else _for_llama_cpp
    command, request = write(adapters, options.output, base)
    print(f"{len(adapters)} adapter{'s' * (len(adapters) > 1)} written: {options.output}\n")
    print(" \\\n    ".join(shlex.join(part) for part in command))
    print(f"\nA request names its adapter:\n{request}")
    return 0


def _read(paths: Sequence[Path]) -> dict[str, Adapter]:
    """The adapters by the name of their file. Raises: InputError: a name that can't be served, or two base models."""
    adapters: dict[str, Adapter] = {}
    for path in paths:
        if not _NAME.fullmatch(path.stem):
            raise InputError(f"ADAPTER must be a file named with letters, digits, - _ . only, but it is {path.name}")
        if path.stem in adapters:
            raise InputError(f"ADAPTER must be files of different names, but {path.stem} occurs twice")
        adapters[path.stem] = Adapter.load(path)
    if len({adapter.base_fingerprint for adapter in adapters.values()}) > 1:
        raise InputError("ADAPTER must be files for one base model, but they were made for several")
    return adapters


def _base(model: str | None, adapters: Sequence[Adapter], engine: str) -> str:
    base = model or adapters[0].base_name
    if base.endswith(".gguf") == (engine == "llama.cpp"):
        return base
    if engine == "vllm":
        raise InputError(f"--model must name a folder or hub name of the base model for vLLM, but it is {base}")
    raise InputError(
        f"--model must name a GGUF file of the base model for llama.cpp (its convert_hf_to_gguf.py makes one), but it "
        f"is {base}"
    )


Command = list[list[str]]
"""The arguments of a command, in parts that belong together."""


def _for_vllm(adapters: dict[str, Adapter], folder: Path, base: str) -> tuple[Command, str]:
    for name, adapter in adapters.items():
        adapter.save_peft(folder / name, for_vllm=True)
    rank = max(fit_vllm(adapter).rank for adapter in adapters.values())
    modules = [f"{name}={folder / name}" for name in adapters]
    command = [["vllm", "serve", base], ["--enable-lora", "--max-lora-rank", str(rank)], ["--lora-modules", *modules]]
    return command, "\n".join(f'{{"model": "{name}", "prompt": ...}}' for name in adapters)


def _for_llama_cpp(adapters: dict[str, Adapter], folder: Path, base: str) -> tuple[Command, str]:
    command = [["llama-server", "--model", base], ["--lora-init-without-apply"]]
    requests = []
    for number, (name, adapter) in enumerate(adapters.items()):
        path = folder / f"{name}.gguf"
        adapter.save_gguf(path)
        command.append(["--lora", str(path)])
        requests.append(f'{{"lora": [{{"id": {number}, "scale": 1.0}}], "prompt": ...}}  # {name}')
    return command, "\n".join(requests)
