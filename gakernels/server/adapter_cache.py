"""AdapterCache: compact adapters on the GPU, in main memory and on disk, each limited, least recently used evicted."""

from __future__ import annotations

import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from gakernels.adapters.compact import CompactAdapter
from gakernels.errors import FormatError, InputError, check_least

logger = logging.getLogger(__name__)
_KEY = re.compile(r"[A-Za-z0-9_-]{1,128}")
_SUFFIX = ".compact.safetensors"


@dataclass
class Tier:
    """One kind of memory.

    Attributes:
        limit_bytes: its limit; 0 turns it off.
        used_bytes: total size of its adapters.
        hits: how often an adapter was found here.
        evictions: how often one was evicted for another.
    """

    limit_bytes: int
    used_bytes: int = 0
    entries: int = 0
    hits: int = 0
    evictions: int = 0


class AdapterCache:
    """Adapters by name, each held in one of three tiers.

    An adapter that is used moves to the GPU (if there is one), which pushes the least recently used one down to main
    memory, from there to disk, and from there out. An adapter is always found or made: an evicted one is made again
    from its source. This object's own thread does all the work, so `request` returns at once.

    Args:
        device: where adapters are used.
        gpu_bytes: limit of the memory on the device; ignored if the device is the CPU.
        cpu_bytes: limit of main memory.
        disk_bytes: limit of the total size of the files.
        folder: for the files. Files of an earlier run are used; files with other names are left alone.

    Raises:
        InputError: a limit is negative, or the disk is used but no folder is given.
    """

    def __init__(
        self,
        device: torch.device | str,
        gpu_bytes: int = 0,
        cpu_bytes: int = 0,
        disk_bytes: int = 0,
        folder: str | Path | None = None,
    ) -> None:
        check_least(0, gpu_bytes=gpu_bytes, cpu_bytes=cpu_bytes, disk_bytes=disk_bytes)
        if disk_bytes and folder is None:
            raise InputError("folder must be given if disk_bytes is above 0")
        self.device = torch.device(device)
        on_device = 0 if self.device.type == "cpu" else gpu_bytes
        self.tiers = {"gpu": Tier(on_device), "cpu": Tier(cpu_bytes), "disk": Tier(disk_bytes)}
        self.misses = 0
        self._memory: dict[str, OrderedDict[str, CompactAdapter]] = {"gpu": OrderedDict(), "cpu": OrderedDict()}
        self._files: OrderedDict[str, int] = OrderedDict()
        self._folder = None if folder is None else Path(folder)
        self._lock = threading.Lock()  # for the book-keeping; no file is read or written while it is held
        self._loading: dict[str, Future[CompactAdapter]] = {}
        self._thread = ThreadPoolExecutor(1, "gakernels-adapters")
        if self._folder is not None:
            self._find_files(self._folder)

    def request(self, key: str, make: Callable[[], CompactAdapter]) -> Future[CompactAdapter]:
        """Start bringing an adapter to the device; the future has it when it is there.

        Args:
            key: names the adapter and its version: letters, digits, `_` and `-`, at most 128. The meaning of a key must
                never change.
            make: makes the adapter if no tier has it; called in this cache's thread.

        Raises:
            InputError: the key has other characters or is too long.
        """
        if not _KEY.fullmatch(key):
            raise InputError(f"key must be 1 to 128 letters, digits, '_' or '-', but it is {key!r:.80}")
        with self._lock:
            if key in self._loading:
                return self._loading[key]
            ready = self._hit(key)
            if ready is not None:
                done: Future[CompactAdapter] = Future()
                done.set_result(ready)
                return done
            future = self._thread.submit(self._load, key, make)
            self._loading[key] = future
        future.add_done_callback(lambda _: self._loaded(key))
        return future

    def get(self, key: str, make: Callable[[], CompactAdapter]) -> CompactAdapter:
        """The adapter, as soon as it is on the device. Raises what `make` raises."""
        return self.request(key, make).result()

    def drop(self, key: str) -> None:
        """Forget an adapter in every tier; it is no longer in use, or its maker knows a newer one."""
        with self._lock:
            pending = self._loading.get(key)
        if pending is not None:
            pending.exception()  # let it arrive first
        with self._lock:
            for name, held in self._memory.items():
                adapter = held.pop(key, None)
                if adapter is not None:
                    self._count(name, -adapter.nbytes, -1)
            size = self._files.pop(key, None)
            if size is not None:
                self._count("disk", -size, -1)
        if size is not None:
            self._unlink(key)

    def close(self) -> None:
        """Wait for what is being loaded, then end the thread. The files stay for the next run."""
        self._thread.shutdown()

    # Finding

    @property
    def _top(self) -> str:
        """The tier from which adapters are used."""
        return "cpu" if self.device.type == "cpu" else "gpu"

    def _hit(self, key: str) -> CompactAdapter | None:
        """The adapter, if it is already on the device. Call with the lock held."""
        held = self._memory[self._top]
        if key not in held:
            return None
        held.move_to_end(key)
        self.tiers[self._top].hits += 1
        return held[key]

    def _load(self, key: str, make: Callable[[], CompactAdapter]) -> CompactAdapter:
        adapter = self._lower(key)
        if adapter is None:
            adapter = make()
            self.misses += 1
        adapter = adapter.to(self.device)
        self._put(self._top, key, adapter)
        return adapter

    def _loaded(self, key: str) -> None:
        with self._lock:
            self._loading.pop(key, None)

    def _lower(self, key: str) -> CompactAdapter | None:
        """Take the adapter from the tiers below; its file stays, because it can't change."""
        if self._top == "gpu":
            with self._lock:
                adapter = self._memory["cpu"].pop(key, None)
                if adapter is not None:
                    self._count("cpu", -adapter.nbytes, -1)
                    self.tiers["cpu"].hits += 1
                    return adapter
        return self._read(key)

    def _read(self, key: str) -> CompactAdapter | None:
        with self._lock:
            if key not in self._files:
                return None
            self._files.move_to_end(key)
        try:
            adapter = CompactAdapter.load(self._path(key))
        except (InputError, FormatError, OSError):  # this is a cache: what can't be read is made again
            self._remove_file(key)
            return None
        self.tiers["disk"].hits += 1
        return adapter

    # Keeping

    def _put(self, tier: str, key: str, adapter: CompactAdapter) -> None:
        """Put an adapter into a tier, and push down what no longer fits."""
        if tier == "disk":
            self._write(key, adapter)
            return
        below = "cpu" if tier == "gpu" else "disk"
        pushed = []
        with self._lock:
            held = self._memory[tier]
            held[key] = adapter
            self._count(tier, adapter.nbytes, 1)
            while self.tiers[tier].used_bytes > self.tiers[tier].limit_bytes:
                oldest, leaving = held.popitem(last=False)
                self._count(tier, -leaving.nbytes, -1)
                self.tiers[tier].evictions += 1
                pushed.append((oldest, leaving))
        for name, leaving in pushed:
            self._put(below, name, leaving.to("cpu"))

    def _write(self, key: str, adapter: CompactAdapter) -> None:
        limit = self.tiers["disk"].limit_bytes
        if adapter.nbytes > limit or key in self._files:
            return
        try:
            adapter.save(self._path(key))
            size = self._path(key).stat().st_size
        except OSError as error:  # this is a cache: what can't be kept is made again
            logger.warning("an adapter could not be cached: %s", error)
            return
        with self._lock:
            self._files[key] = size
            self._count("disk", size, 1)
            leaving = self._oldest_files(limit)
        for name in leaving:
            self._unlink(name)

    def _oldest_files(self, limit: int) -> list[str]:
        """Forget files until the rest is within the limit. Call with the lock held."""
        leaving = []
        while self.tiers["disk"].used_bytes > limit:
            name, size = self._files.popitem(last=False)
            self._count("disk", -size, -1)
            self.tiers["disk"].evictions += 1
            leaving.append(name)
        return leaving

    def _remove_file(self, key: str) -> None:
        with self._lock:
            self._count("disk", -self._files.pop(key), -1)
        self._unlink(key)

    def _count(self, tier: str, size: int, entries: int) -> None:
        self.tiers[tier].used_bytes += size
        self.tiers[tier].entries += entries

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{key}{_SUFFIX}"

    def _unlink(self, key: str) -> None:
        try:
            self._path(key).unlink(missing_ok=True)
        except OSError as error:  # it is no longer listed here; the next run will find it
            logger.warning("a cached adapter could not be removed: %s", error)

    def _find_files(self, folder: Path) -> None:
        """Adopt the files of an earlier run, the oldest first."""
        if not self.tiers["disk"].limit_bytes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        found = [(path, path.stat()) for path in folder.glob(f"*{_SUFFIX}") if not path.name.startswith(".")]
        for path, status in sorted(found, key=lambda pair: pair[1].st_mtime):
            self._files[path.name.removesuffix(_SUFFIX)] = status.st_size
            self._count("disk", status.st_size, 1)
        for name in self._oldest_files(self.tiers["disk"].limit_bytes):
            self._unlink(name)
