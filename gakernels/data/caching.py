"""The token cache of a source and a tokenizer: made once, used by every run and process."""

import fcntl
import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from gakernels.data.bad_records import BadRecords
from gakernels.data.cache import DESCRIPTION, TokenCache
from gakernels.data.cache_writing import unwritable, write_cache
from gakernels.data.sources import Source
from gakernels.data.tokenizing import tokenizer_description
from gakernels.errors import InputError
from gakernels.paths import cache_folder

_LOCK = ".lock"
logger = logging.getLogger(__name__)


def token_cache(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path | None = None,
    strict: bool = False,
    progress: bool = True,
) -> TokenCache:
    """The tokens of a source: from an earlier call if source and tokenizer are the same, else made now.

    Several processes may call it at once: one writes; the others wait and use the result. An interruption
    leaves no broken cache and does not touch an older one.

    Args:
        source: the documents.
        tokenizer: of the base model.
        folder: the folder of the cache. None means the `automatic_folder`, where a cache is written
            again if the source has changed or the cache is damaged.
        strict: a record that can't be used is an error; else such records are counted and reported in a warning.
        progress: show a bar.

    Raises:
        InputError: the source can't be read or holds no text; the cache in `folder` has another source or tokenizer;
            with `strict`, a bad record.
        FormatError: the cache in `folder` is damaged.
        OSError: it can't be written.
    """
    place = automatic_folder(source, tokenizer) if folder is None else folder
    cache = _usable(place, source, tokenizer, folder is not None)
    if cache is None:
        with _alone(place):
            cache = _usable(place, source, tokenizer, folder is not None)  # another process may have made it
            if cache is None:
                write_cache(place, source, tokenizer, BadRecords(strict), progress)
                cache = TokenCache.open(place)
    bad = cache.bad_records
    if bad.faults and strict:
        raise InputError(f"data: {source.name} has records that can't be used: {bad}")
    if bad.total:
        logger.warning("data: left out of %s: %s", source.name, bad)
    return cache


def automatic_folder(source: Source, tokenizer: PreTrainedTokenizerBase) -> Path:
    """The folder for a source and a tokenizer in `$XDG_CACHE_HOME/gakernels/tokens` or `~/.cache/gakernels/tokens`."""
    key = f"{source.identity} {tokenizer_description(tokenizer)['fingerprint']}"
    return cache_folder("tokens") / hashlib.sha256(key.encode()).hexdigest()[:32]


def _usable(folder: Path, source: Source, tokenizer: PreTrainedTokenizerBase, named: bool) -> TokenCache | None:
    """The existing cache. None if there is none or, unless the user named the folder, if it can't be used."""
    try:
        if not (folder / DESCRIPTION).is_file():
            return None
        cache = TokenCache.open(folder)
        cache.check_tokenizer(tokenizer)
        cache.check_source(source)
        cache.check_numbers()
    except InputError:
        if named:
            raise
        return None
    except PermissionError as error:  # can't even be listed
        raise unwritable(folder, error) from error
    return cache


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time. The lock of a killed process goes with it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _LOCK).open("w")
    except OSError as error:
        raise unwritable(folder, error) from error
    with file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("data: waiting for another process that writes the token cache %s", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
