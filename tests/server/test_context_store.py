"""Contexts on disk: what is acknowledged stays, and nothing else is touched."""

import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from limits import files_of_at_most
from safetensors.torch import load_file

from gakernels import FormatError, InputError
from gakernels.files import write_tensors
from gakernels.server.context_store import Context, ContextStore, StaleError

NAMES = ("model.layers.0.o_proj", "model.layers.1.o_proj")


def states() -> dict[str, torch.Tensor]:
    return {name: torch.randn(1, 6, 6) for name in NAMES}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


def opened(folder: Path) -> ContextStore:
    return ContextStore(folder, "base", "generator")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "contexts"


def test_everything_is_there_again_bit_by_bit(folder: Path) -> None:
    store, expected = opened(folder), {}
    for number in range(4):
        context = store.create(f"owner {number % 2}", f"label {number}\n“ä”")
        for _ in range(number):
            new = states()
            context = store.commit(context, new, 7)
            expected[context.id] = new
    before = [store.of(f"owner {number}") for number in range(2)]
    store.close()
    store = opened(folder)
    assert [store.of(f"owner {number}") for number in range(2)] == before
    for context in [*before[0], *before[1]]:
        assert same(store.states(context), expected.get(context.id, {}))
        assert context.tokens_seen == 7 * context.revision
    assert sorted(context.revision for owner in before for context in owner) == [0, 1, 2, 3]
    assert store.damaged == []


def test_a_context_is_its_owners_alone(folder: Path) -> None:
    store = opened(folder)
    context = store.create("one")
    assert store.get(context.id, "one") == context
    assert store.get(context.id, "other") is None
    assert store.get(context.id, "") is None
    assert store.of("other") == []


def test_a_commit_to_an_older_revision_is_refused(folder: Path) -> None:
    store = opened(folder)
    empty = store.create("one")
    new = states()
    context = store.commit(empty, new, 3)
    with pytest.raises(StaleError):
        store.commit(empty, states(), 3)
    with pytest.raises(StaleError):
        store.states(empty)
    assert same(store.states(context), new)


def test_what_is_deleted_is_gone(folder: Path) -> None:
    store = opened(folder)
    context = store.commit(store.create("one"), states(), 3)
    other = store.create("one")
    store.delete(context)
    store.delete(context)
    assert store.of("one") == [other]
    with pytest.raises(StaleError):
        store.states(context)
    with pytest.raises(StaleError):
        store.commit(context, states(), 3)
    assert [path.name for path in folder.glob("*.safetensors")] == [f"{other.id}.safetensors"]
    store.close()
    assert opened(folder).of("one") == [other]


def test_a_full_disk_leaves_the_context_as_it_was(folder: Path) -> None:
    store = opened(folder)
    new = states()
    context = store.commit(store.create("one"), new, 3)
    with files_of_at_most(64), pytest.raises(OSError):  # noqa: PT011 (of any kind)
        store.commit(context, states(), 3)
    assert store.get(context.id, "one") == context
    assert same(store.states(context), new)
    assert store.commit(context, states(), 3).revision == 2


def test_the_file_and_the_folder_are_brought_to_the_disk_before_it_counts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(folder)
    context = store.create("one")
    events = []
    fsync, rename = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        events.append(("sync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        fsync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        events.append(("rename", str(self)))
        assert store.get(context.id, "one") == context  # not acknowledged yet
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    store.commit(context, states(), 3)
    temporary = events[0][1]
    assert events == [("sync", temporary), ("rename", temporary), ("sync", str(folder))]
    store.delete(store.of("one")[0])
    assert events[3:] == [("sync", str(folder))]
    assert temporary.endswith(".tmp")


def test_what_a_killed_process_left_half_written_is_removed_and_nothing_else(folder: Path) -> None:
    store = opened(folder)
    context = store.create("one")
    store.close()
    half = folder / f".{context.id}.safetensors.123-abcdef01.tmp"
    kept = [folder / "notes.txt", folder / ".hidden.tmp", folder / "ctx-1.safetensors"]
    for path in (half, *kept):
        path.write_text("something")
    store = opened(folder)
    assert not half.exists()
    assert all(path.read_text() == "something" for path in kept)
    assert store.of("one") == [context]
    assert store.damaged == []


@pytest.mark.parametrize("damage", ["empty", "cut", "header", "swapped", "types"])
def test_a_damaged_context_is_left_alone_and_the_others_work(folder: Path, damage: str) -> None:
    store = opened(folder)
    good, bad = (store.commit(store.create("one"), states(), 3) for _ in range(2))
    store.close()
    path = folder / f"{bad.id}.safetensors"
    data = path.read_bytes()
    changed = {
        "empty": b"",
        "cut": data[: len(data) // 2],
        "header": data[:8] + b"x" + data[9:],
        "swapped": (folder / f"{good.id}.safetensors").read_bytes(),  # another context's file under this name
    }
    if damage == "types":  # a sound file with a description of the wrong types
        write_tensors(path, "context", {}, {**asdict(bad), "revision": "1"})
    else:
        path.write_bytes(changed[damage])
    written = path.read_bytes()
    store = opened(folder)
    assert store.of("one") == [good]
    assert store.damaged == [path.name]
    assert path.read_bytes() == written


def test_flipped_numbers_are_noticed_when_they_are_read(folder: Path) -> None:
    store = opened(folder)
    context = store.commit(store.create("one"), states(), 3)
    path = folder / f"{context.id}.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(FormatError, match="damaged"):
        store.states(context)


def test_states_do_not_depend_on_the_file_once_they_are_read(folder: Path) -> None:
    store, new = opened(folder), states()
    context = store.commit(store.create("one"), new, 3)
    found = store.states(context)
    (folder / f"{context.id}.safetensors").write_bytes(b"")
    assert same(found, new)


def test_states_of_another_generator_are_refused(folder: Path) -> None:
    store = opened(folder)
    store.create("one")
    store.close()
    for wrong in (("other", "generator"), ("base", "other")):
        with pytest.raises(FormatError, match="use another folder"):
            ContextStore(folder, *wrong)
    opened(folder).close()  # and the folder is free again


def test_a_folder_belongs_to_one_process_at_a_time(folder: Path) -> None:
    store = opened(folder)
    with pytest.raises(InputError, match="in use"):
        opened(folder)
    store.close()
    opened(folder).close()


def test_names_can_not_be_guessed_and_files_are_plain_safetensors(folder: Path) -> None:
    store = opened(folder)
    contexts = [store.create("one") for _ in range(20)]
    assert len({context.id for context in contexts}) == 20
    assert all(len(context.id) == 4 + 32 for context in contexts)
    new = states()
    context: Context = store.commit(contexts[0], new, 3)
    found = load_file(folder / f"{context.id}.safetensors")
    assert all(torch.equal(found[name], new[name][0]) for name in NAMES)
