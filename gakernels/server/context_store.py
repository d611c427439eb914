"""ContextStore: contexts on disk. What `create`, `commit` and `delete` did survives a crash once they have returned.

One file per context holds its states and all that is known about it, so replacing this file is the one step that
makes an append count: `write_tensors` writes a file next to it, flushes it, renames it, and flushes the folder to
disk.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from gakernels.errors import FormatError, InputError
from gakernels.files import flush_folder, read_description, read_tensors, write_tensors

logger = logging.getLogger(__name__)
KIND = "context"
SUFFIX = ".safetensors"
IDENTIFIER = r"(?:ctx|txt)-[0-9a-f]{32}"
_FIXED = "txt-"
_FILE = re.compile(rf"{IDENTIFIER}\.safetensors")
_LEFT_OVER = re.compile(rf"\.{IDENTIFIER}\.safetensors\.[0-9a-f-]+\.tmp")


@dataclass(frozen=True)
class Context:
    """The details of a context, apart from its states.

    Attributes:
        id: `ctx-` and 32 hexadecimal digits, drawn at random; the `model` of requests. For a context that requests
            bring with them, `txt-` and digits that follow from owner and texts.
        owner: its owner, see `ApiKeys`.
        label: the owner's name for it.
        created: seconds since 1970.
        revision: number of appends.
        tokens_seen: number of tokens appended.
    """

    id: str
    owner: str
    label: str
    created: int
    revision: int = 0
    tokens_seen: int = 0

    @property
    def fixed(self) -> bool:
        """Whether its id stands for its texts, so that no other text may be appended."""
        return self.id.startswith(_FIXED)


def text_identifier(owner: str, texts: Sequence[str]) -> str:
    """The id of the context of some texts: the same for the same owner and texts, and for no others."""
    return _FIXED + hashlib.sha256(json.dumps([owner, *texts]).encode()).hexdigest()[:32]


class StaleError(RuntimeError):
    """The context has changed or is gone: ask the store for it again."""


_TYPES = {"id": str, "owner": str, "label": str, "created": int, "revision": int, "tokens_seen": int}


class ContextStore:
    """The contexts in a folder, used by one process at a time. Thread-safe.

    Args:
        folder: created if missing.
        base_fingerprint: of the base model that the states belong to.
        generator_fingerprint: of the generator that made them.

    Raises:
        InputError: another process uses the folder.
        FormatError: a context in it was made with another base model or generator.

    Attributes:
        damaged: names of files that can't be read; they are left alone, and their contexts are missing.
    """

    def __init__(self, folder: str | Path, base_fingerprint: str, generator_fingerprint: str) -> None:
        self._folder = Path(folder)
        self._fingerprints = {"base_fingerprint": base_fingerprint, "generator_fingerprint": generator_fingerprint}
        self._folder.mkdir(parents=True, exist_ok=True)
        self._guard = _guarded(self._folder)
        self._lock = threading.Lock()
        self._contexts: dict[str, Context] = {}
        self.damaged: list[str] = []
        try:
            self._find()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the folder for other processes."""
        self._guard.close()

    def create(
        self,
        owner: str,
        label: str = "",
        identifier: str | None = None,
        states: Mapping[str, Tensor] | None = None,
        tokens: int = 0,
    ) -> Context:
        """A new context, empty or with states (1, d_r, d_r) by adapted layer of so many tokens as its first append.

        Its id is drawn at random unless one is given that no context has.
        """
        self._check_folder()
        identifier = identifier or f"ctx-{secrets.token_hex(16)}"
        context = Context(identifier, owner, label, int(time.time()), int(bool(states)), tokens)
        self._write(context, states or {})
        return context

    def get(self, identifier: str, owner: str) -> Context | None:
        """The context with that id, if it exists and is the owner's."""
        with self._lock:
            context = self._contexts.get(identifier)
        return context if context is not None and context.owner == owner else None

    def of(self, owner: str) -> list[Context]:
        """The owner's contexts, the oldest first."""
        with self._lock:
            mine = [context for context in self._contexts.values() if context.owner == owner]
        return sorted(mine, key=lambda context: (context.created, context.id))

    def __len__(self) -> int:
        """How many contexts there are."""
        with self._lock:
            return len(self._contexts)

    def states(self, context: Context) -> dict[str, Tensor]:
        """The states (1, d_r, d_r) by adapted layer, on the CPU; empty for a context without an append.

        The file is authoritative: if somebody has removed or replaced it, the store follows.

        Raises:
            StaleError: the context has another revision by now, or is deleted.
            FormatError: the file is damaged.
        """
        path = self._path(context.id)
        try:
            tensors, description = read_tensors(path, KIND, copied=True)
        except (InputError, OSError):
            if path.exists():
                raise
            self._take_over(context, None)
            raise StaleError(f"context {context.id} has been deleted") from None
        found = _context(path, description)
        if found != context:
            mine = found.owner == context.owner and self._fingerprints.items() <= description.items()
            self._take_over(context, found if mine else None)
            raise StaleError(f"context {context.id} no longer has revision {context.revision}")
        return {name: state[None] for name, state in tensors.items()}

    def commit(self, context: Context, states: Mapping[str, Tensor], tokens: int) -> Context:
        """Replace the states of a context, after so many more tokens.

        Commits to one context, and its deletion, must not run at the same time.

        Raises:
            StaleError: the context has another revision by now, or is deleted.
            OSError: they could not be written; the context is unchanged.
        """
        if self.get(context.id, context.owner) != context:
            raise StaleError(f"context {context.id} has been deleted or no longer has revision {context.revision}")
        self._check_folder()
        new = replace(context, revision=context.revision + 1, tokens_seen=context.tokens_seen + tokens)
        self._write(new, states)
        return new

    def rename(self, context: Context, label: str) -> Context:
        """Give a context another label; its states and revision stay.

        Must not run at the same time as a commit to this context, or its deletion.

        Raises:
            StaleError: the context has another revision by now, or is deleted.
            OSError: it could not be written; the context is unchanged.
        """
        states = self.states(context)
        self._check_folder()
        new = replace(context, label=label)
        self._write(new, states)
        return new

    def delete(self, context: Context) -> None:
        """Remove a context; does nothing if it is already gone. Raises: OSError: it could not be removed."""
        self._path(context.id).unlink(missing_ok=True)
        with self._lock:
            self._contexts.pop(context.id, None)
        with suppress(FileNotFoundError):  # the folder itself has been removed
            flush_folder(self._folder)  # until then, a crash of the machine could bring the deleted file back

    def _write(self, context: Context, states: Mapping[str, Tensor]) -> None:
        tensors = {name: state[0] for name, state in states.items()}
        write_tensors(self._path(context.id), KIND, tensors, {**asdict(context), **self._fingerprints})
        with self._lock:
            self._contexts[context.id] = context

    def _take_over(self, context: Context, found: Context | None) -> None:
        """Follow a change that this store did not make: the context's file was replaced or removed."""
        with self._lock:
            if self._contexts.get(context.id) != context:
                return
            if found is not None:
                self._contexts[context.id] = found
            else:
                del self._contexts[context.id]
                logger.error("context %s: its file has been removed, or is that of another owner or model", context.id)

    def _check_folder(self) -> None:
        """Lock the folder again if somebody has removed it, before anything is written there.

        Raises:
            OSError: another process holds the present folder.
        """
        with self._lock:
            try:
                if os.path.samestat((self._folder / "lock").stat(), os.fstat(self._guard.fileno())):
                    return
            except FileNotFoundError:
                pass
            logger.error("folder %s has been removed or replaced; it is created again if missing", self._folder)
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                guard = _guarded(self._folder)
            except InputError as error:
                raise OSError(str(error)) from error
            self._guard.close()
            self._guard = guard
            self._contexts = {name: one for name, one in self._contexts.items() if self._path(name).exists()}

    def _path(self, identifier: str) -> Path:
        return self._folder / f"{identifier}{SUFFIX}"

    def _find(self) -> None:
        """Read the descriptions of all contexts, and remove the unfinished files of a killed process."""
        for path in sorted(self._folder.iterdir()):
            if _LEFT_OVER.fullmatch(path.name):
                path.unlink()
            elif _FILE.fullmatch(path.name):
                self._find_one(path)

    def _find_one(self, path: Path) -> None:
        try:
            description = read_description(path, KIND)
            context = _context(path, description)
        except (InputError, OSError):
            self.damaged.append(path.name)
            return
        for name, own in self._fingerprints.items():
            if description.get(name) != own:
                raise FormatError(
                    f"{path} belongs to a {name.replace('_', ' ')} {description.get(name)}, but this one has {own}; "
                    "use another folder for each generator"
                )
        self._contexts[context.id] = context


def _guarded(folder: Path) -> IO[str]:
    """An open file that locks other processes out of the folder. Raises: InputError: one uses it."""
    guard = (folder / "lock").open("w")
    try:
        fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        guard.close()
        raise InputError(f"folder {folder} is in use by another process") from error
    return guard


def _context(path: Path, description: Mapping[str, Any]) -> Context:
    values = {name: description.get(name) for name in _TYPES}
    if any(type(values[name]) is not kind for name, kind in _TYPES.items()) or path.name != f"{values['id']}{SUFFIX}":
        raise FormatError(f"{path} is damaged: its header does not describe a context of that name")
    return Context(**values)  # type: ignore[arg-type]
