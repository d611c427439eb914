"""The data of examples/smollm2: questions that their passages answer, and nothing held out among them."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from random import Random
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "smollm2" / "make_data.py"
PASSAGE = (
    "Abbey number {0} was founded in 1{1:03} by monks who came from Cluny. Its library held {2} books, and the abbot "
    "{3} Dunmore wrote the chronicle of the valley. In the following century the buildings burned down."
)
NAMES = ("Aldric", "Bertram", "Conrad", "Dietrich", "Emeric")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_data", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(count: int, tags: bool) -> list[dict[str, str]]:
    made = []
    for number in range(count):
        context = PASSAGE.format(number, number, 300 + number, NAMES[number % len(NAMES)])
        question = f"How many books did the library of abbey number {number} hold?"
        context = f"<P> {context} </P>" if tags else context
        made.append({"context": context, "question": question, "answer": str(300 + number)})
    return made


def write(path: Path, records: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    squad, swap = write(folder / "squad.jsonl", rows(80, False)), write(folder / "swap.jsonl", rows(80, True))
    text = "\n\n".join(record["context"] for record in rows(20, False))
    write(folder / "books" / "book.jsonl", [{"title": "The abbeys", "text": text}])
    command = [sys.executable, str(SCRIPT), "--squad", str(squad), "--nq-swap", str(swap)]
    subprocess.run([*command, "--books", str(folder / "books"), "--output", str(folder / "data")], check=True)
    return folder / "data"


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("kind", "name"),
    [*((kind, name) for kind in ("long", "short") for name in ("squad", "nq_swap", "books")), ("long", "several")],
)
def test_each_question_is_answered_by_its_passage(data: Path, kind: str, name: str) -> None:
    found = read(data / kind / f"{name}.jsonl")
    assert found
    for row in found:
        assert "<P>" not in row["context"]
        assert 1 <= len(row["qas"]) <= 4
        for qa in row["qas"]:
            assert qa["answers"][0] in row["context"]
            assert qa["question"].rstrip().endswith("?")


@pytest.mark.parametrize("name", ["squad", "nq_swap"])
def test_passages_that_are_held_out_are_not_trained_on(data: Path, name: str) -> None:
    held_out = {row["context"] for row in read(data / "held-out" / f"{name}.jsonl")}
    assert held_out
    for kind in ("long", "short"):
        trained = [row["context"] for row in read(data / kind / f"{name}.jsonl")]
        assert not [context for context in trained if any(context in passage for passage in held_out)]


def test_a_passage_with_another_answer_is_held_out_with_it(script: ModuleType) -> None:
    text = "The mayor is {}, who was elected in May."
    made = [
        {"context": text.format(name), "qas": [{"question": "Who is the mayor?", "answers": [name]}]} for name in NAMES
    ]
    training, held_out = script.split(made)
    assert len(made) in (len(training), len(held_out))


def test_a_gap_is_asked_for_without_telling_it(script: ModuleType) -> None:
    text = PASSAGE.format(7, 7, 307, "Aldric")
    asked = list(script.gaps(text, Random(1)))
    assert {answer for _, answer in asked} >= {"1007", "307", "Cluny"}
    for question, answer in asked:
        assert not re.search(rf"\b{re.escape(answer)}\b", question)


def test_a_text_of_several_passages_has_none_twice(data: Path) -> None:
    for row in read(data / "long" / "several.jsonl"):
        passages = [text.split(" was founded")[0] for text in row["context"].split("\n\n")]
        assert 2 <= len(passages) == len(set(passages)) <= 4


def test_held_out_passages_stand_at_each_place_of_the_same_longer_texts(data: Path, script: ModuleType) -> None:
    passages = read(data / "held-out" / "squad.jsonl")
    for words in script.PLACED_WORDS:
        places = [read(data / "held-out" / f"squad_{place}_{words}.jsonl") for place in script.PLACES_OF_PASSAGE]
        for passage, start, middle, end in zip(passages, *places, strict=True):
            assert start["context"].startswith(passage["context"])
            assert end["context"].endswith(passage["context"])
            parts = [sorted(row["context"].split("\n\n")) for row in (start, middle, end)]
            assert parts[0] == parts[1] == parts[2]
            assert {passage["context"]} < set(parts[0])
            assert set(parts[0]) <= {row["context"] for row in passages}
            assert passage["qas"] == start["qas"] == middle["qas"] == end["qas"]
