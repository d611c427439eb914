"""The engine's thread: decoding and other work in turns, what is too much, and the end."""

import threading
from collections.abc import Iterator

import pytest
from tiny import make_model, random_context

from gakernels import GenerativeAdapter
from gakernels.generation import Sampling, generate
from gakernels.generation.scheduler import Generation, Piece
from gakernels.server.engine import BusyError, Engine
from gakernels.server.settings import Limits


class Row:
    """A generation and its end."""

    def __init__(self, tokens: int, prompt: list[int] | None = None) -> None:
        self.pieces: list[Piece] = []
        self.ended = threading.Event()
        self.generation = Generation(prompt or random_context(4), Sampling(tokens), on_piece=self._take)

    def _take(self, piece: Piece) -> None:
        self.pieces.append(piece)
        if piece.finished is not None:
            self.ended.set()


@pytest.fixture
def model() -> GenerativeAdapter:
    return make_model(scale=2.0)


@pytest.fixture
def engine(model: GenerativeAdapter) -> Iterator[Engine]:
    engine = Engine(model, Limits(rows=4, waiting=6), threads=1)
    yield engine
    engine.close()


def test_rows_and_contexts_take_turns(engine: Engine, model: GenerativeAdapter) -> None:
    row, tokens = Row(100, [5, 6, 7]), random_context(40)
    turns: list[int] = []

    def passes() -> Iterator[object]:
        for states in model.passes([tokens], chunks_per_pass=1):
            turns.append(len(row.generation.tokens))
            yield states

    engine.submit(row.generation)
    found = engine.work(passes).result(30)
    assert row.ended.wait(30)
    assert len(turns) == 7
    assert turns[-1] < 100  # neither waited for the other's end
    assert len(set(turns)) > 1
    expected = model.states([tokens], chunks_per_pass=1)
    assert all((found[name] - expected[name]).abs().max() < 1e-5 for name in expected)  # type: ignore[index]
    assert row.generation.tokens == generate(model, [[5, 6, 7]], [None], Sampling(100))[0].tokens


def test_several_works_take_turns_and_fail_alone(engine: Engine) -> None:
    order, go = [], threading.Event()

    def work(name: str, count: int, fails: bool = False) -> Iterator[str]:
        go.wait(10)
        for number in range(count):
            order.append(name)
            yield f"{name}{number}"
        if fails:
            raise OSError("no")

    long = engine.work(lambda: work("a", 4))
    short, bad = engine.work(lambda: work("b", 1)), engine.work(lambda: work("c", 1, True))
    go.set()
    assert (long.result(10), short.result(10)) == ("a3", "b0")
    with pytest.raises(OSError, match="no"):
        bad.result(10)
    assert order.index("b") < 3
    assert engine.alive


def test_too_much_is_refused_and_room_comes_back(engine: Engine) -> None:
    rows = [Row(60) for _ in range(6)]
    for row in rows:
        engine.submit(row.generation)
    with pytest.raises(BusyError, match="try again"):
        engine.submit(Row(1).generation)
    with pytest.raises(BusyError):
        engine.work(lambda: iter([1]))
    rows[0].generation.cancel()
    assert all(row.ended.wait(30) for row in rows)
    assert engine.work(lambda: iter([1])).result(10) == 1
    assert engine.running <= 4


def test_a_failed_step_is_told_to_its_rows_and_the_engine_goes_on(
    engine: Engine, model: GenerativeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(model, "logits", lambda _: 1 / 0)
        row = Row(3)
        engine.submit(row.generation)
        assert row.ended.wait(10)
    assert isinstance(row.pieces[-1].error, ZeroDivisionError)
    row = Row(3)
    engine.submit(row.generation)
    assert row.ended.wait(10)
    assert len(row.generation.tokens) == 3


def test_work_that_nobody_waits_for_any_more_is_not_done(engine: Engine) -> None:
    go, done = threading.Event(), []

    def slow() -> Iterator[int]:
        go.wait(10)
        yield 1

    first = engine.work(slow)
    second = engine.work(lambda: iter([done.append(1)]))
    assert second.cancel()
    go.set()
    assert first.result(10) == 1
    assert not first.cancel()
    assert engine.work(lambda: iter([3])).result(10) == 3
    assert done == []


def test_the_end_is_told_to_all_that_wait(model: GenerativeAdapter) -> None:
    engine, go = Engine(model, Limits(rows=1)), threading.Event()

    def slow() -> Iterator[int]:
        go.wait(10)
        yield 1
        yield 2

    rows, works = [Row(1000) for _ in range(3)], [engine.work(slow) for _ in range(2)]
    for row in rows:
        engine.submit(row.generation)
    closing = threading.Thread(target=engine.close)
    closing.start()
    go.set()
    closing.join(10)
    assert not engine.alive
    assert all(isinstance(row.pieces[-1].error, BusyError) for row in rows)
    assert all(isinstance(work.exception(1), BusyError) for work in works)
    with pytest.raises(BusyError, match="shutting down"):
        engine.submit(Row(1).generation)
