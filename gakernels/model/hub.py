"""Generators and adapters by name: a local folder, or a repository on the Hugging Face hub, to and from there."""

import re
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

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
        raise InputError(f"there is no folder {name}, and the hub did not provide one: {reason}") from error


def download(repository: str, revision: str | None = None) -> Path:
    """The folder, in the hub's cache, of the files of a repository and its card.

    Args:
        repository: `owner/name`.
        revision: a branch, tag or commit; the main branch if not given.

    Raises:
        InputError: the repository does not exist or can't be reached.
    """
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=[*PATTERNS, "README.md"]))
    except (OSError, ValueError) as error:
        raise InputError(f"the hub did not provide {repository}: {first_line(error)}") from error


def upload(folder: Path, repository: str, public: bool) -> str:
    """Upload the files of a folder as one commit, and return the address of the repository.

    Args:
        folder: the files.
        repository: `owner/name`; made if it does not exist.
        public: whether everybody may see a repository that is made. One that exists stays as it is.

    Raises:
        InputError: the hub did not accept it, for instance because nobody is logged in.
    """
    api = HfApi()
    try:
        address = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by gakernels push")
    except (OSError, ValueError) as error:
        raise InputError(f"the hub did not accept {repository}: {first_line(error)}") from error
    return str(address)
