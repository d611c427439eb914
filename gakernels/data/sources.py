"""Where documents come from, and how a source is recognised."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from gakernels.data.bad_records import BadRecords
from gakernels.data.documents import Document, file_documents, record_documents
from gakernels.data.files import find_files
from gakernels.data.records import Record
from gakernels.errors import InputError
from gakernels.files import file_sha256

HUB = "hub:"


class Source(Protocol):
    """Documents, in an order that does not change."""

    @property
    def name(self) -> str:
        """Name for messages."""

    @property
    def identity(self) -> str:
        """What distinguishes this source from others on this machine, whatever it holds at the moment."""

    def documents(self, bad: BadRecords) -> Iterator[Document]:
        """All documents; records that can't be used are counted in `bad`."""

    def description(self) -> dict[str, Any]:
        """What the source holds, in JSON types."""

    def change(self, description: Mapping[str, Any]) -> str | None:
        """A sentence that says what changed since an earlier `description`; None if nothing did."""


@dataclass(frozen=True)
class FileSource:
    """A folder of text, JSON-lines and Parquet files, or one file (`find_files`).

    Attributes:
        path: the folder or file.
        text_key: the entry of a JSON object, or the column, that holds the text.
    """

    path: Path
    text_key: str = "text"

    @property
    def name(self) -> str:
        """The path as given."""
        return str(self.path)

    @property
    def identity(self) -> str:
        """The full path and the key."""
        return f"{self.path.resolve()} {self.text_key}"

    def documents(self, bad: BadRecords) -> Iterator[Document]:
        """The documents of all files, sorted by file name."""
        for file in find_files(self.path, bad=bad):
            yield from file_documents(file, self.text_key, bad)

    def description(self) -> dict[str, Any]:
        """Names, sizes, modification times and SHA-256 of the files; reads all of them."""
        files = [{**described, "sha256": file_sha256(file)} for file, described in self._files()]
        return {"kind": "files", "path": str(self.path), "text_key": self.text_key, "files": files}

    def change(self, description: Mapping[str, Any]) -> str | None:
        """See `Source`. Reads only files whose modification time is different."""
        if (description.get("kind"), description.get("text_key")) != ("files", self.text_key):
            return f"its texts are not the entries {self.text_key!r} of files"
        before = {file["name"]: file for file in description["files"]}
        now = {described["name"]: (file, described) for file, described in self._files()}
        for name in sorted(before.keys() ^ now.keys()):
            return f"{name} is {'new' if name in now else 'missing'}"
        for name, (file, described) in now.items():
            if described["size"] != before[name]["size"]:
                return f"{name} has {described['size']} bytes instead of {before[name]['size']}"
            if described["modified"] != before[name]["modified"] and file_sha256(file) != before[name]["sha256"]:
                return f"{name} has other contents"
        return None

    def _files(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        for file in find_files(self.path):
            status = file.stat()
            name = file.name if file == self.path else file.relative_to(self.path).as_posix()
            yield file, {"name": name, "size": status.st_size, "modified": status.st_mtime_ns}


@dataclass(frozen=True)
class HubSource:
    """A data set of the Hugging Face hub, or a folder that `datasets.load_dataset` takes, read as a stream.

    Attributes:
        dataset: its name.
        subset: its configuration, if it has several.
        split: the split.
        text_key: the column that holds the text.
        revision: commit or tag; without it, a cache keeps the state of the hub at the time it was written.
        limit: read at most this many rows.
    """

    dataset: str
    subset: str | None = None
    split: str = "train"
    text_key: str = "text"
    revision: str | None = None
    limit: int | None = None

    @property
    def name(self) -> str:
        """Data set, revision, subset and split, as `source_of` takes them."""
        dataset = f"{self.dataset}@{self.revision}" if self.revision else self.dataset
        return HUB + ":".join(filter(None, [dataset, self.subset, self.split]))

    @property
    def identity(self) -> str:
        """All settings."""
        return str(self.description())

    def documents(self, bad: BadRecords) -> Iterator[Document]:
        """The text of each row.

        Raises:
            InputError: the package datasets is not installed, or can't load the data set.
        """
        return record_documents(self.rows(), self.text_key, bad)

    def description(self) -> dict[str, Any]:
        """All settings; only `revision` identifies what the hub holds."""
        return {"kind": "hub", **asdict(self)}

    def change(self, description: Mapping[str, Any]) -> str | None:
        """See `Source`."""
        for key, value in self.description().items():
            if description.get(key) != value:
                return f"{key} was {description.get(key)!r} and is {value!r}"
        return None

    def rows(self) -> Iterator[Record]:
        """All rows, with all columns. Raises: as `documents`."""
        load, errors = _hub_loader()
        try:
            rows = load(self.dataset, self.subset, split=self.split, revision=self.revision, streaming=True)
            for number, row in enumerate(rows if self.limit is None else rows.take(self.limit), 1):
                yield Record(row, f"row {number} of {self.name}")
        except errors as error:
            raise InputError(f"data: {self.name} can't be read: {error}") from error


def source_of(text: str, text_key: str = "text") -> Source:
    """The source that a user names: a path, `hub:dataset` (its split `train`), `hub:dataset:split` or
    `hub:dataset:subset:split`; the data set may be followed by `@` and a revision.

    Raises:
        InputError: a hub name has another form.
    """
    if not text.startswith(HUB):
        return FileSource(Path(text), text_key)
    dataset, *parts = text.removeprefix(HUB).split(":")
    if len(parts) > 2 or not all([dataset, *parts]):
        raise InputError(
            f"data must be a path, hub:dataset, hub:dataset:split or hub:dataset:subset:split, but it is {text!r}"
        )
    dataset, _, revision = dataset.partition("@")
    subset = parts[0] if len(parts) == 2 else None
    return HubSource(dataset, subset, parts[-1] if parts else "train", text_key, revision or None)


def _hub_loader() -> tuple[Callable[..., Any], tuple[type[Exception], ...]]:
    try:
        import datasets
    except ImportError as error:
        needed = "reading data sets of the hub needs the package datasets: pip install 'gakernels[hub]'"
        raise InputError(needed) from error
    return datasets.load_dataset, (OSError, ValueError, datasets.exceptions.DatasetsError)
