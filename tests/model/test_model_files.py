"""The format of this library's files: damage, other kinds, newer and older versions, disks that are full."""

import hashlib
import json
import pickle
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

from gakernels import Adapter, CompactAdapter, ContextStream, FormatError, GenerativeAdapter, InputError
from gakernels.adapters.quantized_compact import QuantizedCompactAdapter
from gakernels.files import FORMAT_VERSION, read_tensors, replacing, write_tensors, write_text

KINDS = ("generator", "adapter", "state", "compact", "quantized")


class Files:
    """A folder with one file of each kind and what loads them."""

    def __init__(self, folder: Path) -> None:
        self.model = make_model()
        self.paths = {kind: folder / f"{kind}.safetensors" for kind in KINDS}
        self.write()

    def write(self) -> None:
        other = self.model.stream().append(random_context(9))
        stream = self.model.stream().append(random_context(14)).add(other, 0.5)
        self.model.save_pretrained(self.paths["generator"].parent)
        stream.adapter().save(self.paths["adapter"])
        stream.save(self.paths["state"])
        stream.compact().save(self.paths["compact"])
        QuantizedCompactAdapter.quantize(stream.compact(), bits=4).save(self.paths["quantized"])

    def load(self, kind: str) -> object:
        path = self.paths[kind]
        if kind == "generator":
            return GenerativeAdapter.from_pretrained(path.parent, plain_copy(self.model))
        if kind == "state":
            return ContextStream.load(self.model, path)
        return {"adapter": Adapter, "compact": CompactAdapter, "quantized": QuantizedCompactAdapter}[kind].load(path)

    def content(self, kind: str) -> str:
        """Everything that loading the file gives, to compare: every bit of its tensors and all else."""
        loaded = self.load(kind)
        if isinstance(loaded, GenerativeAdapter):
            return repr((loaded.config, loaded.generator_fingerprint(), loaded.base_fingerprint()))
        values = {name: value for name, value in vars(loaded).items() if name != "_model"}
        return repr({name: _bits(value) for name, value in values.items()})


def _bits(value: object) -> object:
    if isinstance(value, dict):
        return {name: _bits(part) for name, part in value.items()}
    return (value.dtype, value.tolist()) if isinstance(value, torch.Tensor) else value


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
    metadata["gakernels_header_sha256"] = hashlib.sha256(metadata["gakernels"].encode()).hexdigest()
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
def test_a_flipped_bit_of_the_header_is_refused_or_changes_nothing(files: Files, kind: str) -> None:
    path, good = files.paths[kind], files.content(kind)
    data = path.read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    refused = 0
    for place in [*range(8), *torch.randint(8, header, (40,)).tolist()]:
        bad = bytearray(data)
        bad[place] ^= 1 << int(torch.randint(8, ()))
        path.write_bytes(bad)
        try:
            assert files.content(kind) == good
        except FormatError:
            refused += 1
    assert refused > 24  # some bits do not matter: those of the padding and of the name of the checksum


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
    "compact": ("base_fingerprint", "generator_fingerprint", "tokens_seen"),
    "quantized": ("bits", "state_size", "loss", "base_fingerprint", "generator_fingerprint", "tokens_seen"),
}
# Kind, entry of its header, a value of the wrong type or out of range.
WRONG: list[tuple[str, str, object]] = [
    ("generator", "config", []),
    ("generator", "config", {"rank": "4"}),
    ("generator", "config", {"state_size": 10**12, "rank": 4}),
    ("generator", "config", {"linears": [3]}),
    ("generator", "config", {"layers": "0"}),
    ("generator", "config", {"seed": 1.5}),
    ("generator", "config", {"damping": "low"}),
    ("generator", "config", {"scale": True}),
    ("generator", "config", {"sketch_side": "left"}),
    ("generator", "base_name", 3),
    ("generator", "base_fingerprint", None),
    ("adapter", "scale", "1"),
    ("adapter", "scale", float("nan")),
    ("adapter", "scale", float("inf")),
    ("adapter", "scale", True),
    ("adapter", "tokens_seen", -1),
    ("adapter", "tokens_seen", 1.5),
    ("adapter", "base_fingerprint", ["a"]),
    ("adapter", "target_modules", "o_proj"),
    ("adapter", "target_modules", [1]),
    ("adapter", "base_config", []),
    ("adapter", "base_config", {"model_type": 1}),
    ("adapter", "base_config", {"model_type": "llama", "num_hidden_layers": "3"}),
    ("state", "tokens_seen", "20"),
    ("state", "parts", {}),
    ("state", "parts", [3]),
    ("state", "parts", [{"fingerprint": "a", "tokens": 3}]),
    ("state", "parts", [{"fingerprint": "a", "tokens": -3, "weight": 1.0}]),
    ("state", "parts", [{"fingerprint": "a", "tokens": 3, "weight": float("nan")}]),
    ("state", "parts", [{"fingerprint": "a", "tokens": 3000, "weight": 1.0}]),
    ("compact", "tokens_seen", None),
    ("compact", "generator_fingerprint", 3),
    ("quantized", "bits", 3),
    ("quantized", "bits", 8),
    ("quantized", "state_size", 33),
    ("quantized", "loss", {}),
    ("quantized", "loss", {"somewhere": 0.1}),
    ("quantized", "loss", [0.1]),
    ("generator", "chat_template", 5),
]


@pytest.mark.parametrize(("kind", "entry"), [(kind, entry) for kind, names in NEEDED.items() for entry in names])
def test_a_header_that_lacks_an_entry_is_refused(files: Files, kind: str, entry: str) -> None:
    change_header(files.paths[kind], lambda description: [description.pop(entry)])
    with pytest.raises(FormatError, match=rf"{kind}\.safetensors is damaged: it has no entry '{entry}'"):
        files.load(kind)


@pytest.mark.parametrize(("kind", "entry", "value"), WRONG)
def test_a_header_with_an_entry_of_another_type_is_refused(files: Files, kind: str, entry: str, value: object) -> None:
    change_header(files.paths[kind], lambda description: description.update({entry: value}))
    with pytest.raises(FormatError, match=rf"{kind}\.safetensors (is damaged|can't be read)"):
        files.load(kind)


def test_files_of_early_versions_are_read(files: Files) -> None:
    """They lack what came later: the checksum of the header, the side of the sketch, parts and base_config."""
    later = {"generator": "config", "adapter": "base_config", "state": "parts"}
    for kind, entry in later.items():
        path = files.paths[kind]
        with safe_open(path, framework="pt") as file:
            description = json.loads(file.metadata()["gakernels"])
        if kind == "generator":
            assert description["config"].pop("sketch_side") == "input"
        else:
            assert description.pop(entry)
        save_file(load_file(path), path, metadata={"gakernels": json.dumps(description)})
    assert files.load("generator").config == files.model.config
    assert files.load("adapter").base_config == {}
    assert files.load("state").parts == ()


class Harm:
    """What would run if a file were read as a pickle."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("harm"),))


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickle_is_refused_and_not_run(
    files: Files, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files.paths[kind].write_bytes(pickle.dumps(Harm()))
    with pytest.raises(FormatError, match=rf"{kind}\.safetensors is damaged"):
        files.load(kind)
    torch.save({"weight": Harm()}, files.paths[kind])
    with pytest.raises(FormatError, match=rf"{kind}\.safetensors is damaged"):
        files.load(kind)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "header",
    [
        "[" * 100_000,
        '{"kind": 1' + "0" * 5000 + "}",
        "{",
        "[1]",
        "{}",
        '{"kind": 3, "format_version": 1, "gakernels_version": ""}',
    ],
)
def test_a_header_that_is_no_description_is_refused(files: Files, kind: str, header: str) -> None:
    change_header(files.paths[kind], lambda _: header)
    with pytest.raises(FormatError, match=rf"{kind}\.safetensors is damaged"):
        files.load(kind)


def test_unknown_settings_of_a_generator_are_named(files: Files) -> None:
    change_header(files.paths["generator"], lambda description: description["config"].update(flux=3))
    with pytest.raises(FormatError, match=r"generator\.safetensors.*flux is not a setting; known are linears"):
        files.load("generator")


def change_tensors(path: Path, kind: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite a file with other tensors and a checksum that fits them."""
    tensors, description = read_tensors(path, kind)
    change(tensors)
    write_tensors(path, kind, tensors, {key: value for key, value in description.items() if key != "checksum"})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", ["one is missing", "one is too many", "one is a vector", "one is of integers"])
def test_tensors_that_do_not_make_a_whole_are_refused(files: Files, kind: str, change: str) -> None:
    def apply(tensors: dict[str, torch.Tensor]) -> None:
        name = list(tensors)[int(torch.randint(len(tensors), ()))]
        if change == "one is missing":
            del tensors[name]
        elif change == "one is too many":
            tensors["another"] = torch.zeros(3, 3)
        elif change == "one is a vector":
            tensors[name] = tensors[name].flatten()[:5].clone()
        else:
            tensors[name] = torch.zeros(tensors[name].shape, dtype=torch.int32)

    change_tensors(files.paths[kind], kind, apply)
    if kind == "generator" and change == "one is of integers":
        return  # its shape fits, and its numbers become those of the parameter
    with pytest.raises(FormatError, match=rf"{kind}\.safetensors (is damaged|does not fit)"):
        files.load(kind)


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
    assert (
        min(len(before[name]) for name in ("generator.safetensors", "adapter.safetensors", "state.safetensors")) > 6000
    )
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
