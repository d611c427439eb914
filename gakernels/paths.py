"""Paths that users give, and the cache folder for files that are kept between runs."""

import os
from pathlib import Path

from gakernels.errors import InputError

CACHE_VARIABLE = "XDG_CACHE_HOME"


def expanded(name: str) -> str:
    """Expand `~` in a path; other names stay as they are. Shells do not expand it in `--output=~/x`."""
    return os.path.expanduser(name)  # noqa: PTH111 (Path's own raises where there is no such user)


def user_path(name: str) -> Path:
    """A path that a user gave, with `~` expanded."""
    return Path(expanded(name))


def cache_folder(kind: str) -> Path:
    """`$XDG_CACHE_HOME/gakernels/<kind>`, by default in `~/.cache`.

    Raises:
        InputError: the user has no home folder.
    """
    given = os.environ.get(CACHE_VARIABLE)
    try:
        home = Path(given) if given else Path.home() / ".cache"
    except RuntimeError as error:
        raise InputError(f"there is no home folder for the cache of {kind}; {CACHE_VARIABLE} must name one") from error
    return home / "gakernels" / kind
