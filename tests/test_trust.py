"""No file that a user may get from somebody else can run code: every reader is given pickles under its names."""

import ast
import contextlib
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from invented import make_tokenizer
from tiny import make_base, make_model, make_trained, random_context

import gakernels
from gakernels import Adapter, ContextStream, FormatError, GenerativeAdapter, InputError
from gakernels.adapters.compact import CompactAdapter
from gakernels.adapters.quantized_compact import QuantizedCompactAdapter
from gakernels.data import TokenCache, source_of, token_cache
from gakernels.data.bad_records import BadRecords
from gakernels.data.instruction_sources import InstructionSource, read_source
from gakernels.evaluation.answer_log import AnswerLog
from gakernels.evaluation.datasets import read_flat_qa, read_squad
from gakernels.model import load_base
from gakernels.model.hub import PATTERNS
from gakernels.model.released import save_released
from gakernels.server.context_store import ContextStore
from gakernels.training.pretraining_recipe import PretrainingRecipe
from gakernels.training.recipes import load_recipe

PACKAGE = Path(gakernels.__file__).parent


class Bomb:
    """Reading a pickle of it writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.write_text, (self.mark, "boom")


def test_the_bomb_goes_off(tmp_path: Path) -> None:
    """What follows would show nothing if it did not."""
    pickle.loads(pickle.dumps(Bomb(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


def plain(bomb: Bomb, path: Path) -> None:
    path.write_bytes(pickle.dumps(bomb))


def zipped(bomb: Bomb, path: Path) -> None:
    with path.open("wb") as file:
        torch.save(bomb, file)


def array(bomb: Bomb, path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([bomb], dtype=object), allow_pickle=True)


BOMBS = (plain, zipped, array)
# What libraries look for beside the files of ours.
BESIDE = (".metadata", "pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl")


@pytest.fixture(scope="module")
def model() -> GenerativeAdapter:
    model = make_trained(make_model("llama"))
    model.tokenizer = make_tokenizer()
    return model


def make_generator(model: GenerativeAdapter, folder: Path) -> Callable[[], object]:
    model.save_pretrained(folder)
    return lambda: GenerativeAdapter.from_pretrained(folder, make_base())


def make_released(model: GenerativeAdapter, folder: Path) -> Callable[[], object]:
    save_released(make_trained(make_model("llama", sketch_side="output", damping=0.0)), folder)
    return lambda: GenerativeAdapter.from_pretrained(folder, make_base())


def make_adapter(model: GenerativeAdapter, folder: Path) -> Callable[[], object]:
    model.adapt(random_context(9)).save(folder / "adapter.safetensors")
    return lambda: Adapter.load(folder / "adapter.safetensors")


def make_stream(model: GenerativeAdapter, folder: Path) -> Callable[[], object]:
    stream = model.stream()
    stream.append(random_context(9))
    stream.save(folder / "stream.safetensors")
    return lambda: ContextStream.load(model, folder / "stream.safetensors")


def make_compact(model: GenerativeAdapter, folder: Path) -> Callable[[], object]:
    stream = model.stream()
    stream.append(random_context(9))
    stream.compact().save(folder / "compact.safetensors")
    return lambda: CompactAdapter.load(folder / "compact.safetensors")


def make_quantized(model: GenerativeAdapter, folder: Path) -> Callable[[], object]:
    stream = model.stream()
    stream.append(random_context(9))
    QuantizedCompactAdapter.quantize(stream.compact()).save(folder / "quantized.safetensors")
    return lambda: QuantizedCompactAdapter.load(folder / "quantized.safetensors")


def make_base_folder(model: GenerativeAdapter, folder: Path) -> Callable[[], object]:
    make_base().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return lambda: load_base(str(folder))


def make_token_cache(model: GenerativeAdapter, folder: Path) -> Callable[[], object]:
    (folder.parent / "text.txt").write_text("one two three four five " * 20)
    token_cache(source_of(str(folder.parent / "text.txt")), make_tokenizer(), folder, progress=False)

    def read() -> None:
        np.array(TokenCache.open(folder).corpus.tokens)

    return read


def make_server_folder(model: GenerativeAdapter, folder: Path) -> Callable[[], object]:
    def opened() -> ContextStore:
        return ContextStore(folder, "base", "generator")

    store = opened()
    store.create("owner")
    store.close()
    return lambda: opened().close()


def make_recipe(model: GenerativeAdapter, folder: Path) -> Callable[[], object]:
    (folder / "recipe.yaml").write_text("model: {name: m}\ndata: {path: d}\ntrainer: {steps: 1}\n")
    return lambda: load_recipe(PretrainingRecipe, folder / "recipe.yaml")


def make_records(model: GenerativeAdapter, folder: Path) -> Callable[[], object]:
    row = '{"context": "c", "question": "q", "answer": "a"}'
    (folder / "a.jsonl").write_text(row + "\n")
    (folder / "b.json").write_text(f"[{row}]")
    (folder / "c.parquet").write_bytes(b"")
    return lambda: read_source(InstructionSource(str(folder)), BadRecords())


def make_questions(model: GenerativeAdapter, folder: Path) -> Callable[[], object]:
    (folder / "a.jsonl").write_text('{"context": "c", "question": "q", "answer": "a"}\n')
    return lambda: read_flat_qa(str(folder / "a.jsonl"))


def make_squad(model: GenerativeAdapter, folder: Path) -> Callable[[], object]:
    question = '{"question": "q", "answers": [{"text": "a"}]}'
    (folder / "a.json").write_text(f'{{"data": [{{"paragraphs": [{{"context": "c", "qas": [{question}]}}]}}]}}')
    return lambda: read_squad(folder / "a.json")


def make_answers(model: GenerativeAdapter, folder: Path) -> Callable[[], object]:
    AnswerLog(folder / "report.json", {})
    (folder / "report.answers.jsonl").touch()
    return lambda: AnswerLog(folder / "report.json", {})


READERS = {
    name.removeprefix("make_"): value
    for name, value in list(globals().items())
    if name.startswith("make_") and name not in ("make_base", "make_model", "make_tokenizer", "make_trained")
}


@pytest.mark.parametrize("reader", READERS)
def test_nothing_runs(model: GenerativeAdapter, tmp_path: Path, reader: str) -> None:
    """Each file in turn is a bomb of each kind; then bombs lie beside them all. Whatever is read, none goes off."""
    whole, folder, mark = tmp_path / "whole", tmp_path / "folder", tmp_path / "mark"
    folder.mkdir()
    read = READERS[reader](model, folder)
    shutil.copytree(folder, whole)
    places = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
    assert places
    for place in [*places, *map(Path, BESIDE)]:
        for bomb in BOMBS:
            shutil.rmtree(folder)
            shutil.copytree(whole, folder)
            bomb(Bomb(mark), folder / place)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with contextlib.suppress(InputError, FormatError, OSError):  # refused in words
                    read()
            assert not mark.exists(), (place, bomb.__name__)


def test_a_base_whose_weights_are_a_bomb(tmp_path: Path) -> None:
    make_base().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for bomb in BOMBS:
        bomb(Bomb(tmp_path / "mark"), tmp_path / "pytorch_model.bin")
        with pytest.raises(InputError, match="can't be loaded"):
            load_base(str(tmp_path))
    assert not (tmp_path / "mark").exists()


def test_yaml_makes_no_objects(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{path}.x]]")
    with pytest.raises(InputError):
        load_recipe(PretrainingRecipe, path)
    assert not Path(f"{path}.x").exists()


def test_the_hub_gives_data_alone() -> None:
    assert not {Path(pattern).suffix for pattern in PATTERNS} - {".json", ".safetensors", ".jinja", ".model"}


TRUSTED = {"training/old_checkpoint.py"}  # asked for by name, with --trust


def test_nothing_of_the_library_reads_pickles_or_runs_text() -> None:
    calls = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            place = f"{path.relative_to(PACKAGE).as_posix()}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name for alias in node.names}
                if names == {"UnpicklingError"}:
                    continue
                names.add(getattr(node, "module", None) or "")
                calls += [place] if names & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"} else []
                calls += [place] if "FileSystemReader" in names else []
            if isinstance(node, ast.Call):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                function = ast.unparse(node.func)
                is_load = function == "torch.load" and given.get("weights_only") != "True"
                is_yaml = function in ("yaml.load", "yaml.unsafe_load") and "_Loader" not in ast.unparse(node)
                trusts = given.get("allow_pickle") == "True" or given.get("trust_remote_code") == "True"
                if is_load or is_yaml or trusts or function in ("eval", "exec"):
                    calls.append(place)
    assert {call.rpartition(":")[0] for call in calls} <= TRUSTED, calls
