"""A run divides its work in any way, is interrupted anywhere, and gives the same answers."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_model
from worlds import BARE, contexts, make, merged, run, scenario, text

from gakernels import InputError
from gakernels.cost.shapes import ModelShape
from gakernels.distributed import Ranks
from gakernels.evaluation.answer_log import AnswerLog
from gakernels.evaluation.cost import adapter_numbers, compact_numbers
from gakernels.evaluation.datasets import Dataset, EvaluationContext, Question
from gakernels.evaluation.perplexity import CutDocument, perplexity
from gakernels.evaluation.runner import Runner, RunSettings
from gakernels.evaluation.scenarios import EvaluationCase, EvaluationRequest, Scenario, docqa
from gakernels.generation.decoder import Decoder, Row
from gakernels.generation.decoding_batch import DecodingBatch

NAMES = ("closed_book", "adapter", "adapter_merged", "other_adapter")
SMALL = RunSettings(batch_tokens=30, max_rows=3, shard_contexts=2, shard_questions=5)


def answers(runner: Runner) -> dict[str, dict[Any, Any]]:
    return {name: runner.log.answers(name) for name in runner.methods}


def test_however_the_work_is_divided() -> None:
    model, asked = make(), scenario(5)
    assert answers(run(model, asked, *NAMES)) == answers(run(model, asked, *NAMES, settings=SMALL))


class Interrupted(BaseException):
    """As a signal would come."""


@pytest.mark.parametrize("at", range(1, 9, 2))
def test_an_interrupted_run_goes_on_and_asks_nothing_twice(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = make(), scenario(5)
    whole = answers(run(model, asked, *NAMES, settings=SMALL))
    original, calls = Decoder.generate, []

    def generate(self: Decoder, rows: Sequence[Row], *options: Any) -> list[str]:
        calls.append(len(rows))
        if len(calls) == at:
            raise Interrupted
        return original(self, rows, *options)

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "generate", generate)
        with pytest.raises(Interrupted):
            run(model, asked, *NAMES, log=AnswerLog(tmp_path / "r.json", {}), settings=SMALL)
    kept = AnswerLog(tmp_path / "r.json", {})
    before = {name: kept.answers(name) for name in NAMES}
    resumed = run(model, asked, *NAMES, log=kept, settings=SMALL)
    assert answers(resumed) == whole
    lines = (tmp_path / "r.answers.jsonl").read_text().splitlines()[1:]
    logged = [key for entry in AnswerLog(tmp_path / "r.json", {})._entries for key, _ in entry.answers]
    assert len(logged) == 4 * 15, (before, lines)  # every answer stands there once

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "generate", None)  # a finished run asks nothing any more
        assert answers(run(model, asked, *NAMES, log=AnswerLog(tmp_path / "r.json", {}), settings=SMALL)) == whole


def test_methods_may_be_added_to_a_run(tmp_path: Path) -> None:
    model, asked = make(), scenario(3)
    run(model, asked, "closed_book", log=AnswerLog(tmp_path / "r.json", {}))
    runner = run(model, asked, "closed_book", "prompt", log=AnswerLog(tmp_path / "r.json", {}))
    assert answers(runner) == answers(run(model, asked, "closed_book", "prompt"))


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_work(world: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked, path = make(), scenario(5), tmp_path / "r.json"
    monkeypatch.setattr(torch.distributed, "new_group", lambda **_: "group")
    monkeypatch.setattr(torch.distributed, "barrier", lambda _: None)
    for rank in range(world):  # one after the other, as if they ran at a time
        log = AnswerLog(path, {}, rank)
        log._entries = []
        Runner(model, asked, NAMES, log, None, SMALL, Ranks(rank, world, rank), progress=False).run()
    assert len(list(tmp_path.iterdir())) == world
    together = Runner(model, asked, NAMES, AnswerLog(path, {}), None, SMALL, progress=False)
    assert answers(together) == answers(run(model, asked, *NAMES))
    assert sum(run.requests for run in together.method_runs()) == 4 * 15


def test_what_is_too_long_is_cut_in_front_and_counted() -> None:
    model = make()
    model.base.config.max_position_embeddings = 30
    long, short = text(60), text(5)
    data = Dataset(tuple(EvaluationContext(one, (Question(text(4), ("w9",)),)) for one in (long, short)))
    asked = docqa(data, len, [1], settings=BARE)
    runner = run(model, asked, "prompt", "adapter")
    ids = model.tokenizer(f"{long}\n\n{asked.cases[0].context.questions[0].text}")["input_ids"][-25:]
    assert runner.log.answers("prompt")[0, 0, -1] == Decoder(model).generate([Row(tuple(ids))], 5, ("\n",))[0]
    assert [run.truncated for run in runner.method_runs()] == [1, 0]


def test_a_case_without_another_context_is_left_out_and_counted() -> None:
    model = make()
    runner = run(model, scenario(1), "adapter", "other_adapter")
    assert runner.log.answers("other_adapter") == {}
    taken = {run.method: run for run in runner.method_runs()}
    assert taken["other_adapter"].left_out == {"no other context of the same kind": 1}
    assert taken["adapter"].left_out == {}
    assert "other_adapter" in runner.measurements()


def test_what_a_method_took_is_measured() -> None:
    runner = run(make(), scenario(4), "adapter", "closed_book", settings=SMALL)
    for taken in runner.method_runs():
        assert taken.requests == 12
        assert taken.question_seconds > 0
        assert taken.latency_seconds is not None
        assert taken.latency_seconds > 0
        assert taken.peak_bytes > 1e6


def test_what_is_kept_of_a_context_is_measured_by_length() -> None:
    model, data = make(), Dataset(tuple(contexts(6)))
    asked = docqa(data, len, [20, 60], settings=BARE)
    names = (
        "closed_book",
        "prompt",
        "adapter",
        "adapter_merged",
        "adapter_compact",
        "adapter_retrieval",
        "other_adapter",
    )
    found = {(dict(cost.cell)["length"], cost.method): cost for cost in run(model, asked, *names).measured_costs()}
    assert list(found) == [(length, name) for length in (20, 60) for name in names]
    factors = 8 * adapter_numbers(ModelShape.from_config(model.base.config), model.config)  # float64
    compact = 8 * compact_numbers(ModelShape.from_config(model.base.config), model.config)
    for length in (20, 60):
        texts = [case.context.text for case in asked.cases if dict(case.cell)["length"] == length]
        text = sum(len(text.encode()) for text in texts) / len(texts)
        kept = {name: found[length, name].stored_bytes for name in names}
        assert kept == pytest.approx(
            {"closed_book": 0, "prompt": text, "adapter": factors, "adapter_merged": factors, "other_adapter": factors}
            | {"adapter_retrieval": factors + text, "adapter_compact": compact}
        )
        for name in names:
            assert found[length, name].contextualization_seconds >= 0
            assert (found[length, name].first_token_seconds or 0) > 0
            assert (found[length, name].tokens_per_second or 0) > 0


def test_a_run_that_generates_nothing_has_no_first_token() -> None:
    documents = [CutDocument("d", text(8), tuple(range(3, 9)), tuple(range(9, 15))) for _ in range(2)]
    for cost in run(make(), perplexity(documents, 4), "adapter").measured_costs():
        assert (cost.first_token_seconds, cost.tokens_per_second) == (None, None)
        assert cost.stored_bytes > 0


def test_the_first_token_and_those_after_it_are_timed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(make())
    exchange, advance = DecodingBatch.exchange, DecodingBatch.advance

    def slowly(seconds: float, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            time.sleep(seconds)
            return method(*arguments)

        return call

    decoder.speed(Row((3, 4, 5)), 2)  # a warm-up
    monkeypatch.setattr(DecodingBatch, "exchange", slowly(0.3, exchange))
    monkeypatch.setattr(DecodingBatch, "advance", slowly(0.1, advance))
    first, rate = decoder.speed(Row((3, 4, 5)), 4)
    assert 0.3 <= first < 0.6
    assert rate is not None
    assert 3 <= rate <= 10  # 0.1 s each
    assert decoder.speed(Row((3, 4, 5)), 1)[1] is None


def test_options_are_scored_as_the_continuation_of_the_prompt() -> None:
    model = make()
    asked = scenario(2, 2)
    options = ("w5", "w6 w7", "w8 w8 w8")

    def ask(number: int, case: EvaluationCase) -> list[EvaluationRequest]:
        return [
            EvaluationRequest(number, place, n, prompt=question.text, adapted_prompt=question.text, continuation=option)
            for place, question in enumerate(case.context.questions)
            for n, option in enumerate(options)
        ]

    ranked = Scenario("x", "official", asked.cases, ask, asked.measure)
    runner = run(model, ranked, "prompt", "adapter", settings=SMALL)
    for name in ("prompt", "adapter"):
        found = runner.log.answers(name)
        assert len(found) == 2 * 2 * 3
        for (number, place, n), answer in found.items():
            case = asked.cases[number]
            question = case.context.questions[place].text
            front = f"{case.context.text}\n\n" if name == "prompt" else ""
            adapter = model.stream().append(case.context.text).adapter() if name == "adapter" else None
            head = model.tokenizer(f"{front}{question}")["input_ids"]
            tail = model.tokenizer(options[n], add_special_tokens=False)["input_ids"]
            labels = torch.tensor([[-100] * len(head) + tail])
            with torch.no_grad():
                loss = merged(model, adapter)(
                    input_ids=torch.tensor([head + tail]), labels=labels, use_cache=False
                ).loss
            assert answer[1] == len(tail)
            assert answer[0] == pytest.approx(float(loss) * len(tail), rel=1e-5)


@pytest.mark.parametrize(
    ("names", "message"),
    [((), "methods must be among closed_book, .* but they are none"), (("magic",), "but they are magic")],
)
def test_unknown_methods_are_refused(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(make(), scenario(1), *names)


def test_chunks_that_the_base_model_can_not_read_are_refused() -> None:
    model = make()
    model.base.config.max_position_embeddings = 5
    with pytest.raises(InputError, match="reads chunks of 6 tokens, but the base model at most 5"):
        run(model, scenario(1), "closed_book")


def test_a_memory_that_is_not_enough_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(*_: Any) -> list[str]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Decoder, "generate", generate)
    with pytest.raises(InputError, match=r"closed_book: not enough memory .* smaller --batch-tokens"):
        run(make(), scenario(1), "closed_book")


@pytest.mark.parametrize("name", ["batch_tokens", "max_rows", "shard_contexts", "shard_questions"])
def test_bad_settings(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} must be at least 1"):
        RunSettings(**{name: 0})


def test_a_model_without_tokenizer_is_refused() -> None:
    with pytest.raises(InputError, match="tokenizer"):
        run(make_model(), scenario(1), "closed_book")
