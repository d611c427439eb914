"""The file format under generators, adapters and states: damage, other kinds, newer versions, disks that are full."""

import json
import resource
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import make_model, make_trained, plain_copy, random_context

from gakernels import Adapter, ContextStream, FormatError, GenerativeAdapter, InputError
from gakernels.files import FORMAT_VERSION, read_tensors, replacing, write_tensors, write_text

KINDS = ("generator", "adapter", "state")


class Files:
    """A folder with one file of each kind and what loads them."""

    def __init__(self, folder: Path) -> None:
        self.model = make_model()
        self.paths = {kind: folder / f"{kind}.safetensors" for kind in KINDS}
        self.write()

    def write(self) -> None:
        stream = self.model.stream().append(random_context(14))
        self.model.save_pretrained(self.paths["generator"].parent)
        stream.adapter().save(self.paths["adapter"])
        stream.save(self.paths["state"])

    def load(self, kind: str) -> object:
        if kind == "generator":
            return GenerativeAdapter.from_pretrained(self.paths[kind].parent, plain_copy(self.model))
        return Adapter.load(self.paths[kind]) if kind == "adapter" else ContextStream.load(self.model, self.paths[kind])


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def change_header(path: Path, change: Callable[[dict], object]) -> None:
    """Rewrite a file with another description, as another program would."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    description = json.loads(metadata["gakernels"])
    changed = change(description)
    metadata["gakernels"] = changed if isinstance(changed, str) else json.dumps(description)
    save_file(load_file(path), path, metadata=metadata)


@pytest.mark.parametrize("kind", KINDS)
def test_good_files_load(files: Files, kind: str) -> None:
    assert files.load(kind) is not None


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_file_is_named(files: Files, kind: str) -> None:
    files.paths[kind].unlink()
    with pytest.raises(InputError, match=rf"there is no file .*{kind}\.safetensors"):
        files.load(kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_truncated_file_is_refused(files: Files, kind: str, length: int) -> None:
    path = files.paths[kind]
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(FormatError, match=rf"{kind}\.safetensors is damaged"):
        files.load(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_anywhere_is_refused(files: Files, kind: str) -> None:
    path = files.paths[kind]
    good = path.read_bytes()
    header = 8 + struct.unpack("<Q", good[:8])[0]
    places = [*torch.randint(header, len(good), (6,)).tolist(), len(good) - 1, header]
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << int(torch.randint(8, ()))
        path.write_bytes(bad)
        with pytest.raises(FormatError, match=rf"{kind}\.safetensors is damaged"):
            files.load(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_random_bytes_and_foreign_files_are_refused(files: Files, kind: str, tmp_path: Path) -> None:
    path = files.paths[kind]
    path.write_bytes(bytes(torch.randint(256, (5000,)).tolist()))
    with pytest.raises(FormatError, match=rf"{kind}\.safetensors is damaged"):
        files.load(kind)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(FormatError, match=rf"{kind}\.safetensors is not a gakernels file"):
        files.load(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_kind_is_refused(files: Files, kind: str) -> None:
    other = KINDS[KINDS.index(kind) - 1]
    files.paths[kind].write_bytes(files.paths[other].read_bytes())
    with pytest.raises(FormatError, match=f"must be a {kind} file, but it is a {other} file"):
        files.load(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_newer_format_is_refused_with_the_version_that_wrote_it(files: Files, kind: str) -> None:
    newer = {"format_version": FORMAT_VERSION + 1, "gakernels_version": "9.8.7"}
    change_header(files.paths[kind], lambda description: description.update(newer))
    with pytest.raises(FormatError, match=rf"{kind}\.safetensors has format version {FORMAT_VERSION + 1}.*9\.8\.7"):
        files.load(kind)


NEEDED = {
    "generator": ("config", "base_name", "base_fingerprint"),
    "adapter": ("scale", "base_fingerprint", "tokens_seen", "target_modules"),
    "state": ("base_fingerprint", "generator_fingerprint", "tokens_seen"),
}


@pytest.mark.parametrize(("kind", "entry"), [(kind, entry) for kind, names in NEEDED.items() for entry in names])
def test_a_header_that_lacks_an_entry_is_refused(files: Files, kind: str, entry: str) -> None:
    change_header(files.paths[kind], lambda description: [description.pop(entry)])
    with pytest.raises(FormatError, match=rf"{kind}\.safetensors is damaged: its header has no entry '{entry}'"):
        files.load(kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("header", ["{", "[1]", "{}", '{"kind": 3, "format_version": 1, "gakernels_version": ""}'])
def test_a_header_that_is_no_description_is_refused(files: Files, kind: str, header: str) -> None:
    change_header(files.paths[kind], lambda _: header)
    with pytest.raises(FormatError, match=rf"{kind}\.safetensors is damaged"):
        files.load(kind)


def test_unknown_settings_of_a_generator_are_named(files: Files) -> None:
    change_header(files.paths["generator"], lambda description: description["config"].update(flux=3))
    with pytest.raises(FormatError, match=r"generator\.safetensors.*unknown generator setting.*flux"):
        files.load("generator")


def test_an_adapter_without_one_of_its_factors_is_refused(files: Files) -> None:
    path = files.paths["adapter"]
    tensors, description = read_tensors(path, "adapter")
    description = {key: value for key, value in description.items() if key != "checksum"}
    for name in list(tensors)[:2]:
        write_tensors(path, "adapter", {key: value for key, value in tensors.items() if key != name}, description)
        with pytest.raises(FormatError, match=r"adapter\.safetensors is damaged.*lora_A and lora_B"):
            files.load("adapter")


@contextmanager
def no_space_left(limit: int) -> Iterator[None]:
    """No file can grow beyond so many bytes."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("limit", [0, 1000, 6000])
def test_no_space_left_leaves_the_last_good_files_and_nothing_else(files: Files, tmp_path: Path, limit: int) -> None:
    stream = files.model.stream().append(random_context(14))
    stream.adapter().save_peft(tmp_path / "peft")
    before = content(tmp_path)
    assert min(len(data) for name, data in before.items() if name.endswith("safetensors")) > 6000
    make_trained(files.model)
    stream = files.model.stream().append(random_context(14))
    adapter = stream.adapter()
    for save in (
        lambda: files.model.save_pretrained(tmp_path),
        lambda: adapter.save(files.paths["adapter"]),
        lambda: stream.save(files.paths["state"]),
        lambda: adapter.save_peft(tmp_path / "peft"),
        lambda: adapter.save_peft(tmp_path / "new"),
        lambda: adapter.save(tmp_path / "new.safetensors"),
    ):
        with no_space_left(limit), pytest.raises(OSError, match=r"File too large|could not be written"):
            save()
        assert content(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {
        "peft",
        "generator.json",
        *(f"{k}.safetensors" for k in KINDS),
    }
    files.write()
    assert content(tmp_path) != before


def test_a_folder_is_never_replaced_by_a_file_nor_a_file_by_a_folder(files: Files, tmp_path: Path) -> None:
    adapter = files.model.stream().append(random_context(14)).adapter()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").write_text("mine")
    before = content(tmp_path)
    with pytest.raises(InputError, match="folder is a folder"):
        adapter.save(tmp_path / "folder")
    with pytest.raises(InputError, match=r"state\.safetensors is a file"):
        adapter.save_peft(files.paths["state"])
    assert content(tmp_path) == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_interrupted_write_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError), replacing(path) as temporary:
        temporary.write_text("new" * 5000 + "\ud800")
    assert content(tmp_path) == {"file": b"old"}


def test_the_folder_that_the_program_is_in_can_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_model()
    model.adapt([random_context(9)])[0].save_peft(".")
    model.save_pretrained(".")
    names = ["adapter_config.json", "adapter_model.safetensors", "generator.json", "generator.safetensors"]
    assert sorted(content(tmp_path)) == names


def test_missing_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "adapter.safetensors"
    make_model().adapt([random_context(9)])[0].save(path)
    assert Adapter.load(path).tokens_seen == 9
