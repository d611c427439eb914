"""ApiKeys: who sends a request. A user is known by the hash of the key; keys themselves are not kept."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from gakernels.errors import InputError
from gakernels.user_text import read_user_text

ANYONE = ""  # the owner of everything where there are no keys
_SHORTEST = 16  # characters


class ApiKeys:
    """The keys that are let in; without any, everybody is, and all are the same user.

    Args:
        keys: at least 16 characters each, with no space in them.

    Raises:
        InputError: a key is too short or has a space. The message does not show the key.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        chosen = list(keys)
        for number, key in enumerate(chosen, start=1):
            if len(key) < _SHORTEST or key.split() != [key]:
                raise InputError(f"key {number} must be at least {_SHORTEST} characters without spaces")
        self._hashes = [_hash(key) for key in chosen]

    @classmethod
    def read(cls, path: Path) -> ApiKeys:
        """One key a line; empty lines and lines that begin with `#` don't count.

        Raises:
            InputError: the file is missing or no text, or has no key, or one of them is too short.
        """
        lines = [line.strip() for line in read_user_text(path).splitlines()]
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise InputError(f"{path} must have at least one API key, but it has none")
        return cls(keys)

    def owner(self, key: str | None) -> str | None:
        """The user that a key belongs to, or None: it is not let in.

        Every key is compared, each in constant time, so the time tells nothing about them.
        """
        if not self._hashes:
            return ANYONE
        given = _hash(key or "")
        matches = [known for known in self._hashes if hmac.compare_digest(known, given)]
        return matches[0] if matches and key else None


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
