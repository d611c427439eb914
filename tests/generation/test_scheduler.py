"""Continuous batching: who waits, who joins, who leaves, and that one row's trouble is its own."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
import torch
from demo_users import User
from tiny import make_model, random_context
from torch.utils._python_dispatch import TorchDispatchMode

from gakernels import CompactAdapter, GenerativeAdapter, InputError
from gakernels.generation import Generation, Piece, Sampling, Scheduler, generate, scheduler


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


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: a step begins before the tokens of the last one are read."""
    monkeypatch.setattr(scheduler, "runs_ahead", lambda _: True)


def test_running_ahead_shows_in_no_token_and_no_text(
    demo: GenerativeAdapter, make_users: Callable[[int], list[User]], monkeypatch: pytest.MonkeyPatch
) -> None:
    users = make_users(12)
    rules = [
        Sampling(1 + row, 1.5 * (row % 2), seed=row, stop=(".", " ") if row % 4 > 1 else (), stop_token_ids=(row,))
        for row in range(12)
    ]

    def found(sampling: list[Sampling]) -> list[tuple[list[int], str, str | None, list[Piece]]]:
        pieces: list[list[Piece]] = [[] for _ in users]
        rows = [
            Generation(
                demo.tokenizer(user.question)["input_ids"], how, user.adapter, demo.tokenizer, demo.end_tokens(), take
            )
            for user, how, take in zip(users, sampling, [each.append for each in pieces], strict=True)
        ]
        scheduler.run(Scheduler(demo, max_rows=5), rows)
        return [(row.tokens, row.text, row.finished, each) for row, each in zip(rows, pieces, strict=True)]

    expected = found(rules)
    ends = [replace(how, stop_token_ids=(row[0][len(row[0]) // 2],)) for how, row in zip(rules, expected, strict=True)]
    early = found(ends)
    assert any(len(row[0]) < len(one[0]) for row, one in zip(early, expected, strict=True))
    monkeypatch.setattr(scheduler, "runs_ahead", lambda _: True)
    assert found(rules) == expected
    assert found(ends) == early


@pytest.mark.usefixtures("ahead")
def test_the_tokens_of_a_step_are_read_while_the_next_one_runs(
    model: GenerativeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, advance, read = [], scheduler.DecodingBatch.advance, scheduler.TokensToCome.read
    monkeypatch.setattr(scheduler.DecodingBatch, "advance", lambda *given: (order.append("step"), advance(*given))[1])
    monkeypatch.setattr(scheduler.TokensToCome, "read", lambda tokens: (order.append("read"), read(tokens))[1])
    generation = generate(model, [random_context(4)], [None], Sampling(4))[0]
    assert order == ["step", "read", "step", "read", "step", "read", "read"]
    assert len(generation.tokens) == 4


@pytest.mark.usefixtures("ahead")
def test_rows_whose_last_token_is_still_to_come_are_told_of_a_failed_step_and_of_the_end(
    model: GenerativeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, rows = Scheduler(model, max_rows=2), [make(2), make(9), make(3), make(4)]
    for generation in rows:
        batch.submit(generation)
    batch.step()
    batch.step()
    assert [(row.begun, len(row.tokens)) for row in rows] == [(2, 1), (2, 1), (1, 0), (0, 0)]
    assert batch.running == rows[1:3]
    with monkeypatch.context() as patch:
        patch.setattr(model, "logits", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            batch.step()
    assert [type(row.error).__name__ for row in rows] == ["ZeroDivisionError"] * 3 + ["NoneType"]
    batch.step()
    batch.fail_all(OSError("the end"))
    assert isinstance(rows[3].error, OSError)
    assert batch.idle


EVERYTHING = {"logprobs": 3, "prompt_logprobs": True, "presence_penalty": 1.0, "logit_bias": ((5, 1.0),)}


@pytest.mark.parametrize("asked", [{}, EVERYTHING])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_of_a_step_is_asked_of_the_device_but_its_tokens(
    model: GenerativeAdapter, temperature: float, asked: dict[str, Any]
) -> None:
    """Neither by this library nor by transformers, for rows of different lengths with adapters of their own."""
    aten = torch.ops.aten
    waits = (aten._local_scalar_dense.default, aten.is_nonzero.default, aten.nonzero.default)

    class Questions(TorchDispatchMode):
        """Counts where the host waits for a single number."""

        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func in waits
            return func(*args, **(kwargs or {}))

    def count(tokens: int) -> int:
        prompts = [random_context(length) for length in (3, 9, 5)]
        adapters = [model.stream().append(random_context(20)).compact(), None, None]
        with Questions() as questions:
            generate(model, prompts, adapters, Sampling(tokens, temperature, stop_at_end_token=False, **asked))
        return questions.count

    assert count(3) == count(20)


@pytest.mark.gpu
def test_a_step_on_a_gpu_waits_for_nothing() -> None:
    model = make_model(scale=2.0).to("cuda")
    rows = [
        Generation(random_context(3 + row), Sampling(30, float(row % 2), **(EVERYTHING if row > 1 else {})))
        for row in range(4)
    ]
    batch = Scheduler(model)
    for row in rows:
        batch.submit(row)
    for _ in range(3):
        batch.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            batch.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    scheduler.run(batch, [])
    on_cpu = generate(model.to("cpu"), [rows[0].prompt], [None], rows[0].sampling)[0]
    assert rows[0].tokens == on_cpu.tokens
