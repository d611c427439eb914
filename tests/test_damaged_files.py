"""Files that are cut off or in which bits have flipped: a right value, or one line that names the file.

Where a file has a checksum, what is read from it is what was written. Each example damages one file in one way.
"""

import contextlib
import gzip
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from invented import make_tokenizer
from tiny import make_base, plain_copy
from torch import nn
from writers import Writers, write

from gakernels import Adapter, CompactAdapter, ContextStream, GenerativeAdapter, InputError
from gakernels.adapters.quantized_compact import QuantizedCompactAdapter
from gakernels.data import source_of, token_cache
from gakernels.data.bad_records import BadRecords
from gakernels.data.instruction_sources import InstructionSource, read_source
from gakernels.distributed import Parallel
from gakernels.evaluation.answer_log import AnswerLog
from gakernels.evaluation.datasets import read_flat_qa
from gakernels.model import load_base
from gakernels.ops import dispatch, gpus, measured, tuned
from gakernels.ops.measured import calibration
from gakernels.server.context_store import ContextStore
from gakernels.training.checkpoint import RunState, load_checkpoint, newest_good
from gakernels.training.curves import read_runs
from gakernels.training.instruction.recipe import FinetuningRecipe
from gakernels.training.pretraining_recipe import PretrainingRecipe
from gakernels.training.recipes import CONFIGS, load_recipe

GPU = gpus.known("NVIDIA H100 80GB HBM3")
Read = Callable[[Path], object]  # gives everything that stands in the files, as something to compare


class Formats:
    """For each format its files in a folder, and what reads them."""

    def __init__(self, folder: Path) -> None:
        (folder / "texts").mkdir(parents=True)
        self.folder, self.writers = folder, Writers(folder / "texts")
        self.model = self.writers.models[0]
        self.released_base = plain_copy(self.writers.released[0])
        self.made: dict[str, Path] = {}

    def files(self, name: str) -> Path:
        """A folder with whole files of a format."""
        if name not in self.made:
            self.made[name] = self.folder / name
            self.made[name].mkdir()
            getattr(self, name)(self.made[name])
        return self.made[name]

    # Each method writes the files and each `read_` gives their content.

    def adapter(self, folder: Path) -> None:
        write(self.writers, "adapter", folder, new=False)

    def read_adapter(self, folder: Path) -> object:
        return bits(vars(Adapter.load(folder / "adapter.safetensors")))

    def generator(self, folder: Path) -> None:
        write(self.writers, "generator", folder, new=False)

    def read_generator(self, folder: Path) -> object:
        model = GenerativeAdapter.from_pretrained(folder / "generator", plain_copy(self.model))
        return repr((model.config, model.generator_fingerprint(), model.base_fingerprint()))

    def state(self, folder: Path) -> None:
        write(self.writers, "state", folder, new=False)

    def read_state(self, folder: Path) -> object:
        stream = ContextStream.load(self.model, folder / "state.safetensors")
        return bits((stream._states, stream.tokens_seen, stream.parts))

    def compact(self, folder: Path) -> None:
        write(self.writers, "compact", folder, new=False)

    def read_compact(self, folder: Path) -> object:
        return bits(vars(CompactAdapter.load(folder / "compact.safetensors")))

    def quantized(self, folder: Path) -> None:
        write(self.writers, "quantized", folder, new=False)

    def read_quantized(self, folder: Path) -> object:
        return bits(vars(QuantizedCompactAdapter.load(folder / "quantized.safetensors")))

    def released(self, folder: Path) -> None:
        write(self.writers, "released_format", folder, new=False)

    def read_released(self, folder: Path) -> object:
        model = GenerativeAdapter.from_pretrained(folder / "released", self.released_base)
        model.detach()
        return None

    def checkpoint(self, folder: Path) -> None:
        for new in (False, True):
            write(self.writers, "checkpoint", folder, new)
        self.states = [self._restored(path) for path in sorted((folder / "checkpoints").iterdir())]

    def _restored(self, path: Path) -> object:
        parameters = {"weight": nn.Parameter(torch.zeros(40, 40))}
        load_checkpoint(path, RunState(parameters, torch.optim.AdamW(parameters.values())), Parallel())
        return bits(parameters["weight"].detach())

    def read_checkpoint(self, folder: Path) -> object:
        """The last good state: the newest, or the one before where that is damaged."""
        path, damage = newest_good(folder / "checkpoints", {})
        assert path is not None
        assert bool(damage) == (path.name == "step-00000001")
        assert self._restored(path) == self.states[not damage]
        return None

    def cache(self, folder: Path) -> None:
        write(self.writers, "cache", folder, new=False)

    def read_cache(self, folder: Path) -> object:
        source = source_of(str(self.writers.texts / "0.txt"))
        cache = token_cache(source, make_tokenizer(), folder / "cache0", progress=False)
        return cache.corpus.read(0, cache.corpus.tokens).tolist(), cache.corpus.offsets.tolist()

    def log(self, folder: Path) -> None:
        lines = [{"step": step, "loss": {"completion": 1 / step}, "seconds_per_step": 0.1} for step in range(1, 9)]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def read_log(self, folder: Path) -> object:
        read_runs([folder])
        return None

    def answers(self, folder: Path) -> None:
        for new in (False, True):
            write(self.writers, "answers", folder, new)

    def read_answers(self, folder: Path) -> object:
        AnswerLog(folder / "report.json", {"seed": 1}).answers("prompt")
        return None

    def context(self, folder: Path) -> None:
        write(self.writers, "context", folder, new=False)

    def read_context(self, folder: Path) -> object:
        store = ContextStore(folder / "contexts", "base", "generator")
        try:
            found = [(context, bits(store.states(context))) for context in store.of("owner")]
            if store.damaged:
                raise InputError(f"damaged: {folder / 'contexts' / store.damaged[0]}")
            return found
        finally:
            store.close()

    def recipe(self, folder: Path) -> None:
        shutil.copy(CONFIGS / "mistral-7b-pretraining.yaml", folder / "recipe.yaml")

    def read_recipe(self, folder: Path) -> object:
        load_recipe(PretrainingRecipe, folder / "recipe.yaml", ["data.path=x"])
        return None

    def tuning_recipe(self, folder: Path) -> None:
        shutil.copy(CONFIGS / "mistral-7b-finetuning.yaml", folder / "recipe.yaml")

    def read_tuning_recipe(self, folder: Path) -> object:
        load_recipe(FinetuningRecipe, folder / "recipe.yaml", ["data.path=x"])
        return None

    def tuned_table(self, folder: Path) -> None:
        shutil.copy(tuned.DEFAULT, folder / "table.json")

    def read_tuned_table(self, folder: Path) -> object:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(tuned.ENVIRONMENT_VARIABLE, str(folder / "table.json"))
            tuned._entries.cache_clear()
            for kernel in json.loads(tuned.DEFAULT.read_text())["kernels"]:
                with contextlib.suppress(LookupError):  # a name has changed
                    tuned.settings(kernel, torch.device("cpu"), torch.float32, hidden=4096)
        return None

    def calibrated(self, folder: Path) -> None:
        sizes = {"batch": 2, "tokens": 5, "in": 16, "out": 24, "rank": 4}
        row = {"operation": "lowrank_linear", "dtype": "bfloat16", "sizes": sizes}
        record = {
            "kind": calibration.KIND,
            "versions": calibration.versions(),
            "gpu": GPU.name,
            "date": "2026-01-02T03:04:05Z",
            "capability": list(GPU.capability),
            "checks": {"lowrank_linear.triton": ""},
            "gemm_flops": {"bfloat16": 1e14},
            "copy_bytes": 1e12,
            "rows": [{**row, "milliseconds": {"eager": [2.0, 1.0], "triton": [0.5, 1.0]}}],
        }
        path = folder / "gakernels" / "calibration" / f"{gpus.slug(GPU.name)}.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(record, indent=1))

    def read_calibrated(self, folder: Path) -> object:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(folder))
            dispatch.forget()
            try:
                calibration.obstacle(GPU, "lowrank_linear", "triton", True)
                measured.nearest(measured.rows_of(GPU), "lowrank_linear", torch.bfloat16, {"in": 16}, ("triton",))
            finally:
                dispatch.forget()
        return None

    def records(self, folder: Path) -> None:
        rows = [{"context": f"c{n}", "question": "q", "answer": "a"} for n in range(20)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "a.jsonl").write_text(lines)
        (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        (folder / "c.json").write_text(json.dumps(rows))
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "d.parquet")

    def read_records(self, folder: Path) -> object:
        read_source(InstructionSource(str(folder)), BadRecords())
        for path in sorted(folder.iterdir()):
            with contextlib.suppress(InputError):
                read_flat_qa(str(path))
        return None

    def base(self, folder: Path) -> None:
        make_base().save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)

    def read_base(self, folder: Path) -> object:
        load_base(str(folder))
        return None


FORMATS = [name.removeprefix("read_") for name in vars(Formats) if name.startswith("read_")]


def bits(value: Any) -> Any:
    """Everything in it, to the bit, as something to compare."""
    if isinstance(value, dict):
        return {name: bits(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(inner) for inner in value]
    return (str(value.dtype), value.numpy().tobytes()) if isinstance(value, torch.Tensor) else value


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory) -> Formats:
    return Formats(tmp_path_factory.mktemp("formats"))


@contextlib.contextmanager
def copied(folder: Path) -> Iterator[Path]:
    place = folder.with_name(f"{folder.name}-damaged")
    shutil.copytree(folder, place)
    try:
        yield place
    finally:
        shutil.rmtree(place)


def flipped(data: bytes, place: float, bit: int) -> bytes:
    index = min(int(place * len(data)), len(data) - 1)
    return data[:index] + bytes([data[index] ^ 1 << bit]) + data[index + 1 :]


def cut(data: bytes, place: float, bit: int) -> bytes:
    return data[: int(place * len(data))]


def erased(data: bytes, place: float, bit: int) -> bytes:
    """A page of zeros, as file systems leave it after a loss of power."""
    start = int(place * len(data))
    return data[:start] + bytes(len(data[start : start + 4096])) + data[start + 4096 :]


def lengthened(data: bytes, place: float, bit: int) -> bytes:
    return data + bytes([bit]) * (1 + int(place * 100))


DAMAGES = (flipped, cut, erased, lengthened)
# Ends and middles: the length of a header, its text, the first numbers, the last ones.
PLACES = (0.0, 1e-9, 0.001, 0.01, 0.5, 1 - 1e-9)


@pytest.mark.parametrize("name", FORMATS)
def test_whole_files_are_read(formats: Formats, name: str) -> None:
    with copied(formats.files(name)) as folder:
        getattr(formats, f"read_{name}")(folder)


def check(formats: Formats, name: str, which: float, damage: Callable[..., bytes], place: float, bit: int) -> None:
    whole, read = formats.files(name), getattr(formats, f"read_{name}")
    with copied(whole) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        right = read(folder)
    with copied(whole) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
        path = paths[min(int(which * len(paths)), len(paths) - 1)]
        data = path.read_bytes()
        path.write_bytes(damage(data, place, bit))
        try:
            found = read(folder)
        except (InputError, OSError) as error:
            message = str(error)
            assert str(folder) in message, message
            assert "\n" not in message.strip(), message
        else:
            assert found == right


EXAMPLES = int(os.environ.get("GAKERNELS_TEST_EXAMPLES", 40))


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_gives_a_right_value_or_its_name(formats: Formats, name: str) -> None:
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.floats(0, 1), st.sampled_from(DAMAGES), st.sampled_from(PLACES) | st.floats(0, 1), st.integers(0, 7))
    @example(0.0, cut, 0.0, 0)
    def any_damage(which: float, damage: Callable[..., bytes], place: float, bit: int) -> None:
        check(formats, name, which, damage, place, bit)

    any_damage()
