"""Answers outlive whatever happens to the process that wrote them."""

import json
from pathlib import Path

import pytest
import torch

from gakernels.errors import InputError
from gakernels.evaluation.answer_log import AnswerLog, Entry

SETTINGS = {"scenario": "docqa", "limit": None, "lengths": [1, 2]}
FIRST = Entry("adapter", (((0, 1, -1), "an answer\nof two lines"), ((0, 2, 3), (1.5, 4))), {"seconds": 0.25})
SECOND = Entry("prompt", (((7, 0, -1), "ä \u2028 x"),), {})


def written(path: Path, *entries: Entry, rank: int = 0) -> AnswerLog:
    log = AnswerLog(path, SETTINGS, rank)
    for entry in entries:
        log.add(entry)
    return log


def test_what_was_added_is_there_again(tmp_path: Path) -> None:
    written(tmp_path / "r.json", FIRST, SECOND)
    log = AnswerLog(tmp_path / "r.json", SETTINGS)
    assert log.answers("adapter") == dict(FIRST.answers)
    assert log.answers("prompt") == dict(SECOND.answers)
    assert log.answers("closed_book") == {}
    assert log.facts("adapter") == [{"seconds": 0.25}]


def test_without_a_report_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log = AnswerLog(None, SETTINGS)
    log.add(FIRST)
    log.reload()
    assert log.answers("adapter") == dict(FIRST.answers)
    assert not list(tmp_path.iterdir())


def test_a_line_torn_at_any_place_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    written(path, FIRST, SECOND)
    file = tmp_path / "r.answers.jsonl"
    content = file.read_bytes()
    second = content.rfind(b"\n", 0, -1) + 1
    for _ in range(5):
        cut = int(torch.randint(second, len(content), ()))
        file.write_bytes(content[:cut])
        log = AnswerLog(path, SETTINGS)
        assert log.answers("adapter") == dict(FIRST.answers)
        assert log.answers("prompt") == {}
        log.add(SECOND)
        assert file.read_bytes() == content


def test_a_log_that_was_cut_within_its_first_line_starts_anew(tmp_path: Path) -> None:
    file = tmp_path / "r.answers.jsonl"
    file.write_text('{"settings": {"scen')
    written(tmp_path / "r.json", FIRST)
    assert AnswerLog(tmp_path / "r.json", SETTINGS).answers("adapter") == dict(FIRST.answers)


def test_damaged_lines_are_passed_over(tmp_path: Path) -> None:
    written(tmp_path / "r.json", FIRST)
    with (tmp_path / "r.answers.jsonl").open("a") as file:
        file.write("no json\n[1, 2]\n\n")
    written(tmp_path / "r.json", SECOND)
    log = AnswerLog(tmp_path / "r.json", SETTINGS)
    assert log.answers("adapter") == dict(FIRST.answers)
    assert log.answers("prompt") == dict(SECOND.answers)


def test_processes_write_to_files_of_their_own_and_read_all(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    first, second = AnswerLog(path, SETTINGS, 0), AnswerLog(path, SETTINGS, 12)
    first.add(FIRST)
    second.add(SECOND)
    assert {file.name for file in tmp_path.iterdir()} == {"r.answers.jsonl", "r.answers.12.jsonl"}
    first.reload()
    assert first.answers("prompt") == dict(SECOND.answers)
    alone = AnswerLog(path, SETTINGS)  # with fewer processes
    assert (alone.answers("adapter"), alone.answers("prompt")) == (dict(FIRST.answers), dict(SECOND.answers))


def test_files_of_other_reports_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "r.answers.old.jsonl").write_text("{}\n")
    (tmp_path / "r2.answers.jsonl").write_text("{}\n")
    assert written(tmp_path / "r.json", FIRST).answers("adapter")


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    written(tmp_path / "r.json", FIRST)
    with pytest.raises(InputError, match=r"r\.answers\.jsonl holds answers of .* limit was None and is 5 now"):
        AnswerLog(tmp_path / "r.json", {**SETTINGS, "limit": 5})
    with pytest.raises(InputError, match="lengths was \\[1, 2\\] and is None now"):
        AnswerLog(tmp_path / "r.json", {"scenario": "docqa", "limit": None})


@pytest.mark.parametrize("line", ["[]", "{}", json.dumps({"settings": 3}), "text"])
def test_a_file_that_is_no_log_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "r.answers.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match="is not a log of answers"):
        AnswerLog(tmp_path / "r.json", SETTINGS)
