"""Two processes that write to the same place, and a clock that was set back."""

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from forked import own_progress_lock
from invented import make_tokenizer, random_text
from regression import InterruptionError, Problem, drawn_seed, interrupted, make_trainer
from safetensors.torch import load
from writers import Writers, contents, write

from gakernels.data import source_of, token_cache
from gakernels.server.context_store import ContextStore
from gakernels.training.checkpoint import find_checkpoints


def in_a_process(call: Callable[[], object]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        own_progress_lock()
        call()
    except BaseException:
        os._exit(1)
    os._exit(0)


def numbers(name: str, data: bytes) -> object:
    """What a file holds; safetensors writes the entries of a header in any order."""
    if not name.endswith(".safetensors"):
        return data
    return [(key, tensor.numpy().tobytes()) for key, tensor in sorted(load(data).items())]


@pytest.mark.parametrize("kind", ["adapter", "generator", "state", "gguf", "report", "peft"])
def test_a_reader_sees_a_whole_file_of_either_process(tmp_path: Path, kind: str) -> None:
    (tmp_path / "texts").mkdir()
    writers, folder, whole = Writers(tmp_path / "texts"), tmp_path / "both", []
    for new in (False, True):
        write(writers, kind, tmp_path / f"alone{new}", new)
        whole.append({name: numbers(name, data) for name, data in contents(tmp_path / f"alone{new}").items()})
    write(writers, kind, folder, new=False)

    def write_often(new: bool) -> None:
        for _ in range(20):
            write(writers, kind, folder, new)

    pids = [in_a_process(partial(write_often, new)) for new in (False, True)]
    for _ in range(50):
        for name in whole[0]:  # files of one folder change one after the other
            assert numbers(name, (folder / name).read_bytes()) in [files[name] for files in whole], name
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    assert set(contents(folder)) == set(whole[0])


# --- a clock that was set back ------------------------------------------------------------------------------------

LONG_AGO = 1_000_000_000


def test_a_run_goes_on_from_the_newest_checkpoint_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = drawn_seed()
    whole, problem = Problem(seed), Problem(seed)
    make_trainer(whole, tmp_path / "whole").run()
    with pytest.raises(InterruptionError):
        make_trainer(problem, tmp_path / "run", interrupted(problem, 12)).run()
    for age, path in enumerate(find_checkpoints(tmp_path / "run" / "checkpoints")):  # the newest looks the oldest
        for file in [*path.iterdir(), path]:
            os.utime(file, (LONG_AGO - 1000 * age, LONG_AGO - 1000 * age))
    monkeypatch.setattr(time, "time", lambda: LONG_AGO)
    resumed = Problem(seed)
    make_trainer(resumed, tmp_path / "run").run()
    assert resumed.steps_taken[0] == 10
    assert all(a.equal(b) for a, b in zip(whole.values(), resumed.values(), strict=True))


def test_a_token_cache_goes_by_contents_not_by_dates(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(random_text(300))

    def fingerprint(folder: Path | None = tmp_path / "cache") -> str:
        return token_cache(source_of(str(path)), make_tokenizer(), folder, progress=False).corpus.fingerprint

    before, written = fingerprint(), contents(tmp_path / "cache")
    os.utime(path, (LONG_AGO, LONG_AGO))
    assert fingerprint() == before
    assert contents(tmp_path / "cache") == written


def test_contexts_of_a_server_whose_clock_went_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ContextStore(tmp_path, "base", "generator")
    first = store.create("owner")
    monkeypatch.setattr(time, "time", lambda: LONG_AGO)
    second = store.commit(store.create("owner"), {}, 3)
    first = store.commit(first, {}, 5)
    store.close()
    store = ContextStore(tmp_path, "base", "generator")
    assert store.of("owner") == [second, first]
    assert (store.get(first.id, "owner"), store.get(second.id, "owner")) == (first, second)
    store.close()
