"""Finding generators by name: a local folder, or a repository on the Hugging Face hub."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download

from gakernels.errors import InputError, first_line

# Data only: pickles (*.bin, *.pt) and code are never downloaded.
PATTERNS = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")


def is_repository_name(name: str | Path) -> bool:
    """Whether a name may be a repository on the hub, `owner/name`, and is not a local folder."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)) is not None and not Path(name).exists()


def local_folder(name: str | Path) -> Path:
    """The folder of that name; if there is none and the name is `owner/name`, it is downloaded to the hub's cache.

    Raises:
        InputError: there is no such folder, and the repository does not exist or can't be reached.
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
