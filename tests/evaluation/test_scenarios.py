"""What each scenario asks, and how answers become samples."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from invented import make_tokenizer
from tiny import random_context
from worlds import contexts, make, merged, run, text

from gakernels import InputError
from gakernels.bootstrap import tail
from gakernels.evaluation.datasets import Dataset, EvaluationContext, Question, Task
from gakernels.evaluation.icl import SEEDS, TaskData, few_shot_context, icl
from gakernels.evaluation.metrics import answer_exact_match, answer_f1, score
from gakernels.evaluation.perplexity import CutDocument, perplexity
from gakernels.evaluation.prompts import icl_prompt, qa_prompt
from gakernels.evaluation.scenarios import (
    AskSettings,
    Cell,
    EvaluationCase,
    Scenario,
    dialog,
    docqa,
    group_contexts,
    sampled,
    with_others,
)
from gakernels.model.windows import split_evenly


@pytest.fixture
def random(generator: torch.Generator) -> Random:
    return Random(generator.initial_seed())


def data(count: int) -> Dataset:
    return Dataset(tuple(contexts(count)))


def cells(asked: Scenario) -> list[Cell]:
    return list(dict.fromkeys(case.cell for case in asked.cases))


# Cases


def asked_in(drawn: list[EvaluationContext]) -> list[str]:
    return [question.text for context in drawn for question in context.questions]


def numbered(counts: dict[str, int], per_context: int = 4) -> list[EvaluationContext]:
    """Contexts of so many questions of each category, each question with a text of its own."""
    questions = [
        Question(f"{category} {number}", ("a",), category=category)
        for category, count in counts.items()
        for number in range(count)
    ]
    starts = range(0, len(questions), per_context)
    return [EvaluationContext(f"c{start}", tuple(questions[start : start + per_context])) for start in starts]


def test_a_limit_is_one_of_questions_whatever_their_order() -> None:
    all_of_them = numbered({"": 30})
    turned = [replace(context, questions=context.questions[::-1]) for context in reversed(all_of_them)]
    regrouped = numbered({"": 30}, per_context=7)
    before: set[str] = set()
    for limit in range(1, 31):
        kept = sampled(all_of_them, limit, 5)
        drawn = asked_in(kept)
        assert len(drawn) == limit
        assert drawn == [text for text in asked_in(all_of_them) if text in drawn]  # in their order
        assert all(context.questions for context in kept)
        assert set(asked_in(sampled(turned, limit, 5))) == set(asked_in(sampled(regrouped, limit, 5))) == set(drawn)
        assert before < set(drawn)
        before = set(drawn)
    assert sampled(all_of_them, None) == sampled(all_of_them, 99) == all_of_them
    assert asked_in(sampled(all_of_them, 10, 5)) != asked_in(sampled(all_of_them, 10, 6))


def test_every_question_is_drawn_as_often_as_the_others() -> None:
    all_of_them = numbered({"": 20})
    counts = Counter(text for seed in range(2000) for text in asked_in(sampled(all_of_them, 5, seed)))
    # 500 each, give or take 19: a hypergeometric draw of 5 out of 20.
    assert all(500 - 6 * 19 < counts[text] < 500 + 6 * 19 for text in asked_in(all_of_them))


def test_a_sample_has_each_category_in_proportion() -> None:
    counts = {"single": 60, "multi": 30, "rare": 10}
    for limit in (10, 20, 50):
        drawn = Counter(text.split()[0] for text in asked_in(sampled(numbered(counts), limit)))
        assert drawn == {category: count * limit // 100 for category, count in counts.items()}


def test_categories_have_cells_of_their_own() -> None:
    asked = dialog(Dataset(tuple(numbered({"single": 6, "multi": 4}))), "locomo")
    given = {request.key: "a" if n % 2 else "b" for n, case in enumerate(asked.cases) for request in asked.ask(n, case)}
    measured = asked.measure(asked, given)
    whole = (("questions", "locomo"),)
    parts = [(*whole, ("category", name)) for name in ("single", "multi")]
    assert list(dict.fromkeys(cell for cell, _ in measured)) == [whole, *parts]
    assert measured[whole, "f1"] == {key: sample for part in parts for key, sample in measured[part, "f1"].items()}
    assert [len(measured[part, "f1"]) for part in parts] == [6, 4]


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_the_other_context_is_another_of_the_same_cell(count: int) -> None:
    cases = [EvaluationCase(context, (("length", n % 2),)) for n, context in enumerate(contexts(count))]
    for number, case in enumerate(with_others(cases, first=10)):
        same = [n for n in range(count) if n % 2 == number % 2 and n != number]
        assert (case.other is None) == (not same)
        assert case.other is None or case.other - 10 in same


# Documents


def documents(random: Random, count: int) -> list[EvaluationContext]:
    return [
        EvaluationContext("x" * random.randint(20, 60) + str(n), (Question(f"q{n}", ("a",)),), f"title {n % 3}")
        for n in range(count)
    ]


def test_groups_hold_every_document_once_and_in_order(random: Random) -> None:
    for _ in range(30):
        given, length = documents(random, random.randint(1, 30)), random.randint(10, 400)
        groups = group_contexts(given, length)
        assert "\n\n".join(group.text for group in groups) == "\n\n".join(document.text for document in given)
        asked = [question for group in groups for question in group.questions]
        assert asked == [question for document in given for question in document.questions]
        sizes = [len(group.questions) for group in groups]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] - sizes[-1] <= 1
        total = len("\n\n".join(document.text for document in given))
        assert len(groups) == min(-(-total // length), len(given))


def test_groups_are_measured_in_what_one_likes() -> None:
    given = [EvaluationContext(f"word {n}", (Question("q", ("a",)),)) for n in range(10)]
    assert len(group_contexts(given, 5, measure=lambda text: len(text.split()))) == 4  # 20 words
    assert len(group_contexts(given, 88)) == 1  # 10 x 6 letters and 9 x 2 line ends
    assert len(group_contexts(given, 77)) == 2


def test_only_the_first_tenth_is_scored_in_the_released_protocol(random: Random) -> None:
    given = documents(random, 40)
    every = group_contexts(given, 50)
    assert group_contexts(given, 50, part="first_tenth") == every[: max(1, len(every) // 10)]
    assert group_contexts(given[:3], 50, part="first_tenth") == group_contexts(given[:3], 50)[:1]


def test_a_document_that_comes_twice_counts_once() -> None:
    one, two = (EvaluationContext("text", (Question(name, ("a",)),), name) for name in ("one", "two"))
    other = EvaluationContext("other", (Question("three", ("a",)),), "three")
    group = group_contexts([one, other, two], 1000)[0]
    assert group.text == "text\n\nother"
    assert [question.text for question in group.questions] == ["one", "two", "three"]
    assert group.name == "one, three"


def test_grouping_refuses_bad_arguments() -> None:
    with pytest.raises(InputError, match="length must be at least 1, but it is 0"):
        group_contexts([], 0)
    with pytest.raises(InputError, match="part must be one of all, first_tenth, but it is 'some'"):
        group_contexts([], 10, part="some")


def test_each_document_by_itself() -> None:
    drawn = data(2)
    asked = docqa(drawn, len, None)
    assert [case.context.text for case in asked.cases] == [context.text for context in drawn.contexts]
    assert {case.cell for case in asked.cases} == {(("length", "own"),)}
    assert [case.other for case in asked.cases] == [1, 0]


def test_documents_are_grouped_to_every_length() -> None:
    asked = docqa(data(12), lambda text: len(text.split()), [20, 60, 20])
    assert cells(asked) == [(("length", 20),), (("length", 60),)]
    for cell in cells(asked):
        mine = [case.context for case in asked.cases if case.cell == cell]
        assert sum(len(context.questions) for context in mine) == 36
    assert len({case.context.text for case in asked.cases}) == len(asked.cases)


def test_the_released_protocol_asks_the_first_tenth_in_its_own_words() -> None:
    drawn = data(40)
    asked = docqa(drawn, lambda text: 1000, [25], "released")  # 40 groups
    assert len(asked.cases) == 4
    request = asked.ask(0, asked.cases[0])[0]
    question = asked.cases[0].context.questions[0].text
    assert request.prompt == qa_prompt(question, None, "released")
    assert request.adapted_prompt == question
    official = docqa(drawn, lambda text: 1000, [25])
    assert len(official.cases) == 40
    assert official.ask(0, official.cases[0])[0].adapted_prompt == qa_prompt(question)
    assert docqa(drawn, lambda text: 1000, [25], "released", "all").settings["part"] == "all"


@pytest.mark.parametrize("protocol", ["official", "released"])
def test_answers_are_scored_as_the_metrics_say(protocol: str, random: Random) -> None:
    asked = docqa(data(6), len, [1, 400], protocol, "all")
    given = {
        request.key: random.choice([text(1), text(3), asked.cases[number].context.questions[0].answers[0]])
        for number, case in enumerate(asked.cases)
        for request in asked.ask(number, case)
    }
    measured = asked.measure(asked, given)
    assert {cell for cell, _ in measured} == set(cells(asked))
    for (cell, metric), samples in measured.items():
        one = answer_f1 if metric == "f1" else answer_exact_match
        expected = [
            one(answer, asked.cases[key[0]].context.questions[key[1]].answers, protocol)
            for key, answer in given.items()
            if asked.cases[key[0]].cell == cell
        ]
        assert score(metric, samples).value == pytest.approx(sum(expected) / len(expected))


def test_the_next_turn_is_asked_without_an_instruction() -> None:
    asked = dialog(data(2), "response")
    request = asked.ask(0, asked.cases[0])[1]
    assert request.prompt == request.adapted_prompt == asked.cases[0].context.questions[1].text
    assert dialog(data(2), "recall").ask(0, asked.cases[0])[0].prompt.startswith("Instruction: ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"limit": 0}, "limit must be at least 1"), ({"new_tokens": 0}, "new_tokens must be at least 1")],
)
def test_bad_settings(settings: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AskSettings(**settings)


def test_bad_protocols_and_styles() -> None:
    with pytest.raises(InputError, match="protocol must be one of official, released"):
        docqa(data(1), len, [1], "mine")
    asked = docqa(data(1), len, [1], settings=AskSettings(style="loud"))
    with pytest.raises(InputError, match="style must be one of"):
        asked.ask(0, asked.cases[0])


# In-context learning


def task(name: str, labels: tuple[str, ...], count: int, own_options: bool = False) -> Task:
    items = []
    for number in range(count):
        answer = labels[number % len(labels)]
        options = (answer, text(2) + str(number)) if own_options else labels
        items.append(Question(f"{text(4)} {number}", (answer,), options, str(number)))
    return Task(name, tuple(items))


def test_demonstrations_are_the_context_and_the_other_one_is_of_another_task() -> None:
    tasks = [
        TaskData(task(name, labels, 20), task(name, labels, 6), seed, task(name, labels, 4).items)
        for name, labels in (("a", ("w3", "w4")), ("b", ("w5", "w6", "w7")))
        for seed in (13, 21)
    ]
    asked = icl(tasks, [1, 4], settings=AskSettings(limit=5))
    assert len(asked.cases) == 2 * 2 * 2
    for case in asked.cases:
        cell = dict(case.cell)
        assert case.context.text.count("Input: ") == cell["shots"]
        assert len(case.context.questions) == 5
        assert case.other is not None
        other = dict(asked.cases[case.other].cell)
        assert (other["shots"], other["seed"]) == (cell["shots"], cell["seed"])
        assert other["task"] != cell["task"]
        assert len(case.training) == 16
        assert len(case.validation) == 4
    assert all(case.other is None for case in icl(tasks[:1], [1]).cases)


def test_labels_are_generated_and_options_ranked() -> None:
    asked = icl([TaskData(task("a", ("w3", "w4"), 4), task("a", ("w3", "w4"), 3), 13)], [2])
    requests = asked.ask(0, asked.cases[0])
    assert [(request.question, request.option, request.continuation) for request in requests[:3]] == [
        (0, -1, None),
        (0, 0, "w3"),
        (0, 1, "w4"),
    ]
    assert len(requests) == 9
    item = asked.cases[0].context.questions[0].text
    assert {request.prompt for request in requests[:3]} == {icl_prompt(item)}


def ranked_answers(asked: Scenario, random: Random, labels: tuple[str, ...]) -> dict[tuple[int, int, int], Any]:
    """Random answers to all requests."""
    return {
        request.key: random.choice(labels) if request.option < 0 else (random.uniform(0, 9), random.randint(1, 3))
        for number, case in enumerate(asked.cases)
        for request in asked.ask(number, case)
    }


def test_tasks_and_seeds_are_averaged_apart_by_kind(random: Random) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    labels = ("w3", "w4", "w5")
    tests = {name: task(name, labels, 9, own) for name, own in (("a", False), ("b", False), ("c", True))}
    tasks = [TaskData(task(name, labels, 8), test, seed) for name, test in tests.items() for seed in (13, 21, 42)]
    asked = icl(tasks, [2])
    given = ranked_answers(asked, random, labels)
    measured = asked.measure(asked, given)
    values: dict[str, dict[str, list[float]]] = {}
    for number, case in enumerate(asked.cases):
        cell = dict(case.cell)
        chosen, gold, hits = [], [], []
        for place, question in enumerate(case.context.questions):
            losses = [given[number, place, n] for n in range(len(question.options))]
            chosen.append(question.options[min(range(len(losses)), key=lambda n: losses[n][0] / losses[n][1])])
            gold.append(question.answers[0])
            hits.append(given[number, place, -1] == gold[-1])
        found = values.setdefault(cell["task"], {"match": [], "ranking_accuracy": [], "ranking_macro_f1": []})
        found["match"].append(sum(hits) / 9)
        found["ranking_accuracy"].append(sum(map(str.__eq__, chosen, gold)) / 9)
        wanted = sklearn.f1_score(gold, chosen, labels=sorted(set(gold)), average="macro", zero_division=0)
        found["ranking_macro_f1"].append(wanted)

    def mean(metric: str, *names: str) -> float:
        return sum(sum(values[name][metric]) / 3 for name in names) / len(names)

    for metric in values["a"]:
        both = score(metric, measured[(("kind", "classification"), ("shots", 2)), metric])
        assert (both.value, both.clusters) == (pytest.approx(mean(metric, "a", "b")), 2)  # tasks
        of_a = score(metric, measured[(("kind", "classification"), ("task", "a"), ("shots", 2)), metric])
        assert of_a.value == pytest.approx(mean(metric, "a"))
        assert (of_a.count, of_a.clusters) == (27, 9)  # items under three seeds
    other = (("kind", "other"), ("shots", 2))
    alone = score("match", measured[other, "match"])
    assert alone.value == pytest.approx(mean("match", "c"))
    assert (alone.low, alone.high) == (None, None)  # a single task
    assert (other, "ranking_macro_f1") not in measured
    resampled = {asked.resampled(cell): "task" in dict(cell) for cell, _ in measured}
    assert resampled == {"tasks": False, "items": True}


def test_an_item_is_drawn_with_its_answers_under_all_seeds(random: Random) -> None:
    """The interval of a task is that of its items' shares of right answers, by a bootstrap of another kind."""
    test = task("a", ("w3", "w4"), 40)
    asked = icl([TaskData(task("a", ("w3", "w4"), 8), test, seed) for seed in (13, 21, 42, 87, 100)], [2])
    given = ranked_answers(asked, random, ("w3", "w4"))
    found = score(
        "match", asked.measure(asked, given)[(("kind", "classification"), ("task", "a"), ("shots", 2)), "match"]
    )
    shares = [
        sum(given[seed, place, -1] == item.answers[0] for seed in range(5)) / 5 for place, item in enumerate(test.items)
    ]
    drawn = sorted(sum(random.choices(shares, k=40)) / 40 for _ in range(10_000))
    assert found.value == pytest.approx(sum(shares) / 40)
    for end, level in ((found.low, tail(40)), (found.high, 1 - tail(40))):
        # Both scatter; six standard deviations of a quantile, in ranks.
        scatter = 6 * round((2 * 10_000 * level * (1 - level)) ** 0.5)
        assert drawn[max(round(10_000 * level) - scatter, 0)] - 1e-9 <= end
        assert end <= drawn[min(round(10_000 * level) + scatter, 9_999)] + 1e-9


def test_demonstrations_are_drawn_from_the_training_items() -> None:
    train = Task("t", tuple(Question(f"in {n}", (f"out {n}",)) for n in range(16)))
    test = Task("t", tuple(Question(f"q{n}", ("a",)) for n in range(200)))
    contexts = {seed: few_shot_context(train, test, 4, seed) for seed in SEEDS}
    assert few_shot_context(train, test, 4, 13) == contexts[13]
    assert len({context.text for context in contexts.values()}) > 1
    for context in contexts.values():
        shown = context.text.split("\n\n")
        assert len(set(shown)) == 4
        for part in shown:
            given, wanted = part.split("\n")
            assert given.removeprefix("Input: in ") == wanted.removeprefix("Output: out ")
        assert context.questions == test.items
    assert few_shot_context(train, test, 16, 13, "released").questions == test.items[:20]
    few = Task("t", test.items[:30])
    assert few_shot_context(train, few, 1, 13, "released").questions == test.items[:16]


def test_few_shot_contexts_refuse_bad_arguments() -> None:
    task = Task("t", (Question("x", ("yes",)),))
    with pytest.raises(InputError, match="shots must be between 1 and the 1 training items, but it is 2"):
        few_shot_context(task, task, 2, 13)
    with pytest.raises(InputError, match="protocol must be one of"):
        few_shot_context(task, task, 1, 13, "mine")


def test_no_task_is_refused() -> None:
    with pytest.raises(InputError, match="tasks must be at least one task"):
        icl([])


# Perplexity


@pytest.mark.parametrize("protocol", ["official", "released"])
def test_perplexities_are_those_of_a_plain_model(protocol: str) -> None:
    model, tokenizer = make(), make_tokenizer()
    pairs = [(random_context(8 + 3 * n), random_context(11)) for n in range(3)]
    texts = [" ".join(f"w{token}" for token in context) for context, _ in pairs]
    documents = [CutDocument(f"d{n}", texts[n], *map(tuple, pair)) for n, pair in enumerate(pairs)]
    asked = perplexity(documents, 6, protocol)
    runner = run(model, asked, "closed_book", "prompt", "adapter", "other_adapter")
    measured = runner.measurements()
    adapters = [model.stream().append(context).adapter() for context in texts]

    def losses(window: list[int], front: list[int], base: torch.nn.Module) -> tuple[float, int]:
        labels = [-100] * (len(front) + 1) + window[1:]
        with torch.no_grad():
            loss = base(input_ids=torch.tensor([front + window]), labels=torch.tensor([labels]), use_cache=False).loss
        return float(loss) * (len(window) - 1), len(window) - 1

    for name in runner.methods:
        for part in (0, 1):
            by_document = []
            for number, pair in enumerate(pairs):
                adapter = {"adapter": adapters[number], "other_adapter": adapters[asked.cases[number].other]}.get(name)
                front = tokenizer(texts[number])["input_ids"] if name == "prompt" else [1]
                base = merged(model, adapter)
                found = [losses(window, front, base) for window in split_evenly(pair[part], 6) if len(window) > 1]
                by_document.append((sum(loss for loss, _ in found), sum(tokens for _, tokens in found)))
            if protocol == "official":
                mean = sum(loss for loss, _ in by_document) / sum(tokens for _, tokens in by_document)
            else:
                mean = sum(loss / tokens for loss, tokens in by_document) / 3
            metric = ("reconstruction_perplexity", "completion_perplexity")[part]
            assert score(metric, measured[name][(), metric]).value == pytest.approx(math.exp(mean), rel=1e-5)


def test_pieces_of_a_document_are_resampled_together() -> None:
    context, following = tuple(random_context(8)), tuple(random_context(11))
    pieces = [CutDocument(f"p{n}", f"w{n + 3}", context, following, name) for n, name in enumerate("abca")]
    scenario = perplexity(pieces, 20)
    answers = {(case, place, 0): (float(case), 1) for case in range(4) for place in range(2)}
    for samples in scenario.measure(scenario, answers).values():
        assert [sample.cluster for sample in samples.values()] == [0, 1, 2, 0]
        assert [sample.total for sample in samples.values()] == [0, 1, 2, 3]
    assert scenario.resampled(()) == "documents"


def test_documents_that_are_too_short_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least two tokens of context"):
        perplexity([CutDocument("d", "w3", (3,), (4, 5))], 6)
    with pytest.raises(InputError, match="at least one document"):
        perplexity([], 6)
    with pytest.raises(InputError, match="protocol must be one of"):
        perplexity([CutDocument("d", "w3 w4", (3, 4), (4, 5))], 6, "mine")


def test_a_context_keeps_its_name() -> None:
    asked = dialog(Dataset((EvaluationContext("w3", (Question("w4", ("w5",)),), "line 7"),)), "recall")
    assert asked.cases[0].context.name == "line 7"
