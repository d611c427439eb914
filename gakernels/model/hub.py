"""Generators by name: a folder here, or a repository on the Hugging Face hub."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download

from gakernels.errors import InputError, first_line

# Data only. Pickles (*.bin, *.pt) and code are never fetched.
PATTERNS = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")


def is_repository_name(name: str | Path) -> bool:
    """Whether a name can be a repository on the hub, `owner/name`, and is no folder here."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)) is not None and not Path(name).exists()


def local_folder(name: str | Path) -> Path:
    """The folder of that name, fetched into the hub's cache if there is none here and the name is `owner/name`.

    Raises:
        InputError: there is no such folder, and no such repository or no way to it.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if not is_repository_name(name):
        raise InputError(f"there is no folder {name}")
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(PATTERNS)))
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise InputError(f"there is no folder {name}, and the hub did not give one: {reason}") from error
