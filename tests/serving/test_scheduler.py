"""Continuous batching: who waits, who joins, who leaves, and that one row's trouble is its own."""

from concurrent.futures import Future

import pytest
import torch
from tiny import make_model, random_context

from gakernels import CompactAdapter, GenerativeAdapter, InputError
from gakernels.generation import Sampling, Scheduler, generate
from gakernels.generation.running import Generation, Piece


@pytest.fixture
def model() -> GenerativeAdapter:
    return make_model(scale=2.0)


def run(scheduler: Scheduler) -> list[int]:
    """Rows in the batch after each step, until there is nothing to do."""
    sizes = []
    while not scheduler.idle:
        scheduler.step()
        sizes.append(len(scheduler.running))
    return sizes


def make(tokens: int, **options: object) -> Generation:
    return Generation(random_context(4), Sampling(tokens), **options)


def test_rows_join_as_others_leave_and_never_too_many(model: GenerativeAdapter) -> None:
    scheduler, generations = Scheduler(model, max_rows=3), [make(count) for count in (1, 7, 2, 5, 1, 3, 4)]
    for generation in generations:
        scheduler.submit(generation)
    sizes = run(scheduler)
    assert max(sizes) == 3
    assert [len(generation.tokens) for generation in generations] == [1, 7, 2, 5, 1, 3, 4]
    assert all(generation.finished == "length" for generation in generations)
    assert len(sizes) < sum(len(generation.tokens) for generation in generations) / 2
    for generation in generations:
        alone = generate(model, [generation.prompt], [None], generation.sampling)[0]
        assert alone.tokens == generation.tokens


def test_running_rows_advance_while_others_join(model: GenerativeAdapter) -> None:
    scheduler, first = Scheduler(model), make(50)
    scheduler.submit(first)
    for step in range(10):
        scheduler.submit(make(3))
        scheduler.step()
        assert len(first.tokens) == step + 1


def test_prompts_join_in_portions(model: GenerativeAdapter) -> None:
    scheduler = Scheduler(model, max_prefill_tokens=20)
    lengths = (6, 6, 6, 6, 30, 3)
    for length in lengths:
        scheduler.submit(Generation(random_context(length), Sampling(30)))
    running = []
    while scheduler.waiting:
        scheduler.step()
        running.append(len(scheduler.running))
    assert running == [3, 4, 5, 6]  # 3 times 6, then 6, which 30 does not fit beside, then 30 alone, then 3


def test_a_cancelled_row_leaves_and_one_that_waits_never_joins(model: GenerativeAdapter) -> None:
    pieces: list[Piece] = []
    scheduler, stays = Scheduler(model, max_rows=2), make(8)
    leaves, waits = make(50, on_piece=pieces.append), make(5)
    for generation in (stays, leaves, waits):
        scheduler.submit(generation)
    scheduler.step()
    scheduler.step()
    leaves.cancel()
    waits.cancel()
    run(scheduler)
    assert (leaves.finished, waits.finished) == ("cancelled", "cancelled")
    assert len(leaves.tokens) == 2
    assert pieces[-1].finished == "cancelled"
    assert waits.tokens == []
    assert stays.tokens == generate(model, [stays.prompt], [None], stays.sampling)[0].tokens


def test_an_adapter_is_loaded_ahead_and_its_row_lets_others_pass(model: GenerativeAdapter) -> None:
    adapter = model.stream().append(random_context(20)).compact()
    loading: Future[CompactAdapter] = Future()
    calls = []

    def load() -> Future[CompactAdapter]:
        calls.append(len(scheduler.running))
        return loading

    scheduler = Scheduler(model, max_rows=1)
    busy, late, passing = make(4), make(3, adapter=load), make(2)
    for generation in (busy, late, passing):
        scheduler.submit(generation)
    scheduler.step()
    assert calls == [0]  # there is no room for it yet, but it is on its way
    while not passing.finished:
        scheduler.step()
    assert late.tokens == []
    assert scheduler.step() == 0  # nothing to do but wait
    loading.set_result(adapter)
    run(scheduler)
    assert calls == [0]
    assert late.tokens == generate(model, [late.prompt], [adapter], late.sampling)[0].tokens


def test_a_row_whose_adapter_fails_fails_alone(model: GenerativeAdapter) -> None:
    def load() -> Future[CompactAdapter]:
        failed: Future[CompactAdapter] = Future()
        failed.set_exception(OSError("no disk"))
        return failed

    foreign = make_model().stream().append(random_context(20)).compact()
    scheduler = Scheduler(model)
    rows = [make(3), make(3, adapter=load), make(3, adapter=foreign), make(3)]
    for generation in rows:
        scheduler.submit(generation)
    run(scheduler)
    assert [type(row.error).__name__ for row in rows] == ["NoneType", "OSError", "FormatError", "NoneType"]
    assert [len(row.tokens) for row in rows] == [3, 0, 0, 3]


def test_after_a_failed_step_those_that_wait_go_on(model: GenerativeAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, first, second = Scheduler(model, max_rows=1), make(3), make(3)
    scheduler.submit(first)
    scheduler.submit(second)
    scheduler.step()
    with monkeypatch.context() as patch:
        patch.setattr(model, "logits", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            scheduler.step()
    assert isinstance(first.error, ZeroDivisionError)
    run(scheduler)
    assert (len(second.tokens), second.error) == (3, None)


def test_a_seed_repeats_a_drawn_text_whoever_is_beside_it(model: GenerativeAdapter) -> None:
    prompt, hot = random_context(5), Sampling(12, temperature=1.5, seed=7)
    alone = generate(model, [prompt], [None], hot)[0].tokens
    crowd = [random_context(5) for _ in range(4)]
    beside = generate(model, [*crowd, prompt], [None] * 5, [Sampling(3, temperature=2)] * 4 + [hot])[-1].tokens
    assert beside == alone
    drawn = {tuple(generate(model, [prompt], [None], Sampling(12, temperature=1.5))[0].tokens) for _ in range(4)}
    assert len(drawn) > 1  # without a seed


def test_the_cache_has_room_for_what_rows_may_become(model: GenerativeAdapter) -> None:
    scheduler = Scheduler(model, max_cache_tokens=40)  # prompts have 4 tokens
    rows = [make(6), make(9), make(3), make(2), make(16), make(50)]
    for row in rows:
        scheduler.submit(row)
    together = []
    while not scheduler.idle:
        scheduler.step()
        now = [row.most_tokens for row in scheduler.running]
        together.append(tuple(now))
        assert len(now) <= 1 or len(now) * max(now) <= 40
    assert (10, 13, 7) in together
    assert (54,) in together  # more than there may be: alone
    assert [len(row.tokens) for row in rows] == [6, 9, 3, 2, 16, 50]


@pytest.mark.parametrize("limits", [{"max_rows": 0}, {"max_prefill_tokens": 0}, {"max_cache_tokens": 0}])
def test_wrong_limits_are_refused(model: GenerativeAdapter, limits: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(limits))):
        Scheduler(model, **limits)


def test_no_gradient_is_kept(model: GenerativeAdapter) -> None:
    with torch.enable_grad():
        scheduler = Scheduler(model)
        scheduler.submit(make(3))
        scheduler.step()
    assert not any(tensor.requires_grad for tensor in scheduler._batch.adapters.left.values())
