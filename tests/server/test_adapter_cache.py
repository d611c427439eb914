"""The cache of adapters: bounds, order of leaving, the way down and up again, and what damage does."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from limits import files_of_at_most

from gakernels import CompactAdapter, InputError
from gakernels.server.adapter_cache import AdapterCache

NAMES = ("model.layers.0.o_proj", "model.layers.1.o_proj")
SIZE = 2 * len(NAMES) * 8 * 3 * 4  # bytes in memory


class Source:
    """Makes adapters, and counts."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.adapters: dict[str, CompactAdapter] = {}

    def __call__(self, key: str) -> Callable[[], CompactAdapter]:
        def make() -> CompactAdapter:
            self.made.append(key)
            if key not in self.adapters:
                left, right = ({name: torch.randn(8, 3) for name in NAMES} for _ in range(2))
                self.adapters[key] = CompactAdapter(left, right, "base", "generator", len(self.adapters))
            return self.adapters[key]

        return make


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def make_cache(tmp_path: Path) -> Iterator[Callable[..., AdapterCache]]:
    made = []

    def make(**bounds: int) -> AdapterCache:
        made.append(AdapterCache("cpu", folder=tmp_path / "adapters", **bounds))
        return made[-1]

    yield make
    for cache in made:
        cache.close()


def same(found: CompactAdapter, expected: CompactAdapter) -> bool:
    pairs = [(found.left, expected.left), (found.right, expected.right)]
    equal = all(torch.equal(one[name], other[name]) for one, other in pairs for name in NAMES)
    return equal and found._description() == expected._description()


def test_the_least_recently_used_leaves_first(make_cache: Callable, source: Source) -> None:
    cache = make_cache(cpu_bytes=3 * SIZE)
    for key in "abcad":  # d takes the place of b
        assert same(cache.get(key, source(key)), source.adapters[key])
    assert source.made == list("abcd")
    for key in "acd":
        cache.get(key, source(key))
    assert source.made == list("abcd")
    cache.get("b", source("b"))
    assert source.made == list("abcdb")
    tier = cache.tiers["cpu"]
    assert (tier.used_bytes, tier.entries, tier.hits, tier.evictions) == (3 * SIZE, 3, 4, 2)
    assert cache.misses == 5


def test_what_leaves_memory_goes_to_the_disk_and_comes_back_bit_by_bit(
    make_cache: Callable, source: Source, tmp_path: Path
) -> None:
    cache = make_cache(cpu_bytes=SIZE, disk_bytes=100 * SIZE)
    for key in "abcd":
        cache.get(key, source(key))
    files = sorted(path.name for path in (tmp_path / "adapters").iterdir())
    assert files == [f"{key}.compact.safetensors" for key in "abc"]
    for key in "abcd":
        assert same(cache.get(key, source(key)), source.adapters[key])
    assert source.made == list("abcd")
    assert cache.tiers["cpu"].used_bytes == SIZE
    stored = sum(path.stat().st_size for path in (tmp_path / "adapters").iterdir())
    assert cache.tiers["disk"].used_bytes == stored
    assert cache.tiers["disk"].hits == 4


def test_files_are_bounded_too(make_cache: Callable, source: Source, tmp_path: Path) -> None:
    cache = make_cache(cpu_bytes=0, disk_bytes=1)
    cache.get("probe", source("probe"))
    assert not list((tmp_path / "adapters").iterdir())  # one alone is too large
    source.adapters["probe"].save(tmp_path / "probe")
    size = (tmp_path / "probe").stat().st_size
    cache = make_cache(cpu_bytes=0, disk_bytes=2 * size + size // 2)
    for key in "abc":
        cache.get(key, source(key))
    assert cache.tiers["disk"].entries == 2
    assert cache.tiers["disk"].used_bytes == sum(path.stat().st_size for path in (tmp_path / "adapters").iterdir())
    assert cache.tiers["disk"].used_bytes <= 2 * size + size // 2
    made = len(source.made)
    cache.get("c", source("c"))
    cache.get("b", source("b"))
    assert len(source.made) == made
    cache.get("a", source("a"))
    assert len(source.made) == made + 1


def test_a_device_keeps_its_own_within_its_bound(source: Source) -> None:
    cache = AdapterCache("meta", gpu_bytes=2 * SIZE, cpu_bytes=10 * SIZE)  # a device that is not the CPU
    for key in "ab":
        assert cache.get(key, source(key)).left[NAMES[0]].device.type == "meta"
    assert (cache.tiers["gpu"].entries, cache.tiers["cpu"].entries) == (2, 0)
    assert cache.tiers["gpu"].used_bytes == 2 * SIZE
    cache.get("a", source("a"))
    assert cache.tiers["gpu"].hits == 1
    cache.close()


def test_files_of_an_earlier_run_are_used(make_cache: Callable, source: Source, tmp_path: Path) -> None:
    first = make_cache(cpu_bytes=SIZE, disk_bytes=100 * SIZE)
    for key in "abc":
        first.get(key, source(key))
    first.close()
    (tmp_path / "adapters" / "notes.txt").write_text("mine")
    second = make_cache(cpu_bytes=SIZE, disk_bytes=100 * SIZE)
    assert second.tiers["disk"].entries == 2
    assert same(second.get("a", source("a")), source.adapters["a"])
    assert source.made == list("abc")
    third = make_cache(cpu_bytes=SIZE, disk_bytes=1)  # a smaller bound takes its files away, and no others
    assert third.tiers["disk"].used_bytes == 0
    assert [path.name for path in (tmp_path / "adapters").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "pickle"])
def test_a_damaged_file_is_made_again(make_cache: Callable, source: Source, tmp_path: Path, damage: str) -> None:
    cache = make_cache(cpu_bytes=SIZE, disk_bytes=100 * SIZE)
    for key in "ab":
        cache.get(key, source(key))
    path = tmp_path / "adapters" / "a.compact.safetensors"
    data = path.read_bytes()
    path.unlink()
    if damage == "pickle":
        torch.save({"a": torch.ones(1)}, path)
    elif damage != "missing":
        path.write_bytes(data[:-9] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    assert same(cache.get("a", source("a")), source.adapters["a"])
    assert source.made == list("aba")


def test_a_full_disk_costs_the_cache_and_not_the_request(make_cache: Callable, source: Source) -> None:
    cache = make_cache(cpu_bytes=SIZE, disk_bytes=100 * SIZE)
    with files_of_at_most(64):
        for key in "abc":
            assert same(cache.get(key, source(key)), source.adapters[key])
    assert cache.tiers["disk"].entries == 0
    assert cache.tiers["disk"].used_bytes == 0


def test_dropped_adapters_leave_every_tier(make_cache: Callable, source: Source, tmp_path: Path) -> None:
    cache = make_cache(cpu_bytes=SIZE, disk_bytes=100 * SIZE)
    for key in "abab":  # both have a file, b is in memory
        cache.get(key, source(key))
    for key in "ab":
        cache.drop(key)
    cache.drop("never there")
    assert all(tier.used_bytes == tier.entries == 0 for tier in cache.tiers.values())
    assert not list((tmp_path / "adapters").iterdir())
    cache.get("a", source("a"))
    assert source.made == list("aba")


def test_requests_for_one_adapter_share_its_loading_and_return_at_once(make_cache: Callable, source: Source) -> None:
    cache, go = make_cache(cpu_bytes=10 * SIZE), threading.Event()

    def slow() -> CompactAdapter:
        go.wait(10)
        return source("a")()

    requests = [cache.request("a", slow) for _ in range(5)]
    assert not any(request.done() for request in requests)
    go.set()
    assert len({id(request.result(10)) for request in requests}) == 1
    assert source.made == ["a"]
    assert cache.request("a", slow).done()


def test_what_making_raises_reaches_those_who_asked_and_is_not_kept(make_cache: Callable, source: Source) -> None:
    cache = make_cache(cpu_bytes=10 * SIZE)
    with pytest.raises(ZeroDivisionError):
        cache.get("a", lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    assert same(cache.get("a", source("a")), source.adapters["a"])


@pytest.mark.parametrize("key", ["", "a/b", "../a", "a.b", "ä", "a" * 129, "a\n"])
def test_a_key_can_not_be_a_path(make_cache: Callable, source: Source, key: str) -> None:
    with pytest.raises(InputError, match="key must be"):
        make_cache(cpu_bytes=SIZE).get(key, source(key))


def test_wrong_bounds_are_refused() -> None:
    with pytest.raises(InputError, match="cpu_bytes"):
        AdapterCache("cpu", cpu_bytes=-1)
    with pytest.raises(InputError, match="folder"):
        AdapterCache("cpu", disk_bytes=1)
