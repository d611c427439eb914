"""The settings of a server: what it accepts, and who may use it. Needs no web framework."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from gakernels.errors import InputError, check_least
from gakernels.user_text import read_user_text

ANYONE = ""  # the owner of everything if there are no keys
_SHORTEST = 16  # characters


@dataclass(frozen=True)
class Limits:
    """Limits of a server; a request that exceeds one is refused with a message that names it.

    Attributes:
        contexts: contexts on disk, all users together.
        contexts_per_key: contexts of one API key.
        body_bytes: size of a request.
        append_tokens: tokens of one append.
        context_tokens: tokens of a context, all appends together.
        prompts: prompts in one request.
        new_tokens: tokens generated for a prompt.
        rows: prompts decoded together.
        cache_tokens: key-value cache: rows times the tokens that the longest of them may reach.
        waiting: prompts and appends that wait or run at once.

    Raises:
        InputError: a limit is below 1.
    """

    contexts: int = 10_000
    contexts_per_key: int = 1_000
    body_bytes: int = 8 * 2**20
    append_tokens: int = 131_072
    context_tokens: int = 100_000_000
    prompts: int = 16
    new_tokens: int = 4_096
    rows: int = 64
    cache_tokens: int = 262_144
    waiting: int = 1_024

    def __post_init__(self) -> None:
        check_least(1, **vars(self))


class ApiKeys:
    """The accepted keys; without any, everybody is accepted and counts as the same user.

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
        """One key per line; empty lines and lines that begin with `#` are ignored.

        Raises:
            InputError: the file is missing, not text or without a key, or a key is too short.
        """
        lines = [line.strip() for line in read_user_text(path).splitlines()]
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise InputError(f"{path} must have at least one API key, but it has none")
        return cls(keys)

    def owner(self, key: str | None) -> str | None:
        """The user that a key belongs to; None if it is not accepted.

        Every key is compared, each in constant time, so the time reveals nothing about them.
        """
        if not self._hashes:
            return ANYONE
        given = _hash(key or "")
        matches = [known for known in self._hashes if hmac.compare_digest(known, given)]
        return matches[0] if matches and key else None


@dataclass(frozen=True)
class Settings:
    """How a server is set up.

    Attributes:
        folder: for contexts, cached adapters and, with vLLM, PEFT folders.
        base_name: name of the base model in requests; with vLLM, the name that vLLM serves it under.
        limits: bounds on requests, contexts and queues.
        keys: who may use it.
        gpu_mebibytes: of cached adapters on the GPU.
        cpu_mebibytes: of cached adapters in main memory.
        disk_mebibytes: of cached adapters on disk.
        threads: of the CPU operations; None for PyTorch's default.
        chat_template: Jinja template of a conversation; by default the one that the generator was tuned with, or the
            tokenizer's.
        cors_origins: origins (`https://example.org`) whose web pages may use it from a browser; `*` for all.
        patience: seconds in which a request must arrive, see `PatientProtocol`.
        vllm_url: URL of the vLLM server that decodes; None: this process decodes.
        vllm_key: API key of that server.
        vllm_adapters: most adapters registered with it at once.
    """

    folder: Path
    base_name: str
    limits: Limits = field(default_factory=Limits)
    keys: ApiKeys = field(default_factory=ApiKeys)
    gpu_mebibytes: int = 4096
    cpu_mebibytes: int = 1024
    disk_mebibytes: int = 4096
    threads: int | None = None
    chat_template: str | None = None
    cors_origins: tuple[str, ...] = ()
    patience: float = 60.0
    vllm_url: str | None = None
    vllm_key: str | None = field(default=None, repr=False)
    vllm_adapters: int = 64


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
