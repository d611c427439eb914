"""Which contexts and conversations a step has, and how little of it is padding."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from drawn_examples import drawn_example, realistic_examples
from tiny import make_model

from gakernels import InputError
from gakernels.data.chat import EncodedRecord
from gakernels.data.mixture import Draw, MixedContexts, chosen
from gakernels.distributed import Ranks
from gakernels.training.instruction.answers import instruction_losses
from gakernels.training.instruction.batches import InstructionBatch
from gakernels.training.instruction.packing import Rounding, pack, window_length, windows_of
from gakernels.training.instruction.steps import BatchConfig, InstructionSteps, alike, divided, evenly_divided


def drawn(low: int, high: int) -> int:
    return int(torch.randint(low, high, ()))


def make_steps(
    sources: list[list[EncodedRecord]],
    ranks: Ranks | None = None,
    seed: int | None = None,
    chunk_size: int = 6,
    rounded: bool = False,
    **settings: object,
) -> InstructionSteps:
    config = BatchConfig(**{"batch_size": 8, "window": 24, "positions": 60, **settings})
    seed = drawn(0, 9) if seed is None else seed
    weights = [None] * len(sources)
    return InstructionSteps(sources, weights, config, chunk_size, seed=seed, ranks=ranks, rounded=rounded)


def small_sources() -> list[list[EncodedRecord]]:
    return [[drawn_example(drawn(1, 30), drawn(1, 7)) for _ in range(count)] for count in (40, 11)]


# The mixture


def test_every_round_of_a_source_has_each_context_once_and_in_another_order() -> None:
    size, pool, seed = drawn(20, 60), drawn(5, 20), drawn(0, 1000)
    mixture = MixedContexts([size], [None], pool, seed)
    draws = [draw for number in range(5 * size) for draw in mixture.draw(number)]
    rounds = [[draw for draw in draws if draw.round == number] for number in range(4)]
    for number, had in enumerate(rounds):
        assert sorted(draw.index for draw in had) == list(range(size))
        assert draws[number * size : (number + 1) * size] == had
    orders = [[draw.index for draw in had] for had in rounds]
    assert orders[0] != orders[1] != orders[2]
    assert MixedContexts([size], [None], pool, seed).draw(7) == mixture.draw(7)
    assert MixedContexts([size], [None], pool, seed + 1).draw(0) != mixture.draw(0)


def test_sources_have_the_shares_of_their_weights() -> None:
    weights = [float(weight) for weight in torch.rand(4) + 0.05]
    mixture = MixedContexts([drawn(1, 90) for _ in range(4)], weights, 1000, 0)
    assert sum(mixture.shares) == 1000
    for share, weight in zip(mixture.shares, weights, strict=True):
        assert abs(share - 1000 * weight / sum(weights)) <= 4  # one context each comes first
    assert Counter(draw.source for draw in mixture.draw(3)) == dict(enumerate(mixture.shares))


def test_without_weights_all_sources_go_round_together() -> None:
    mixture = MixedContexts([60, 30, 10], [None] * 3, 50, 0)
    assert mixture.shares == (30, 15, 5)
    assert MixedContexts([10**6, 1], [None] * 2, 10, 0).shares == (9, 1)  # none is left out
    assert MixedContexts([10, 10], [1e-9, 1.0], 2, 0).shares == (1, 1)


def test_impossible_mixtures_are_refused() -> None:
    with pytest.raises(InputError, match=r"every source must have a context, but the sources have \[3, 0\]"):
        MixedContexts([3, 0], [None, None], 8, 0)
    with pytest.raises(InputError, match=r"batch_size must be at least the number of sources \(3\), but it is 2"):
        MixedContexts([3, 3, 3], [None] * 3, 2, 0)


def test_later_rounds_go_on_with_the_conversations_that_were_not_had() -> None:
    count, wanted = drawn(3, 30), drawn(1, 6)
    had = [n for round_ in range(count) for n in chosen(count, wanted, Draw(0, 5, round_), 3)]
    for start in range(0, count * (len(had) // count), count):
        assert sorted(had[start : start + count]) == list(range(count))
    assert all(len(set(chosen(count, wanted, Draw(0, 5, r), 3))) == min(wanted, count) for r in range(9))


# Grouping and packing


def test_groups_hold_everything_once() -> None:
    group, groups = drawn(1, 6), drawn(1, 12)
    sizes = torch.randint(1, 50, (group * groups, 3)).numpy()
    found = alike(sizes, group)
    assert [len(part) for part in found] == [group] * groups
    assert sorted(n for part in found for n in part) == list(range(group * groups))


def cost(sizes: np.ndarray, limit: int, price: int, unit: int) -> float:
    """The least cost of cutting rows in consecutive parts, by trying all cuts."""
    places = range(unit, len(sizes), unit)
    best = math.inf
    for chosen_places in range(2 ** len(places)):
        cuts = [0, *[p for n, p in enumerate(places) if chosen_places >> n & 1], len(sizes)]
        total = 0.0
        for start, end in pairwise(cuts):
            chunks, chunk, said = sizes[start:end].max(axis=0)
            rows = (end - start) // unit
            positions = rows * (chunks * chunk + said)
            total += price + positions if positions <= limit or rows == 1 else math.inf
        best = min(best, total)
    return best


def test_cuts_are_the_cheapest() -> None:
    for _ in range(20):
        unit = drawn(1, 3)
        sizes = torch.randint(1, 30, (unit * drawn(1, 8), 3)).numpy()
        limit, price = drawn(1, 4000), drawn(0, 600)
        parts = divided(sizes, limit, price, unit)
        assert [n for part in parts for n in range(len(sizes))[part]] == list(range(len(sizes)))
        found = sum(
            price + (part.stop - part.start) // unit * (m[0] * m[1] + m[2])
            for part in parts
            for m in [sizes[part].max(axis=0)]
        )
        assert found == cost(sizes, limit, price, unit)


def test_windows_hold_every_conversation_once_and_are_no_longer_than_allowed() -> None:
    for _ in range(30):
        lengths = [torch.randint(1, 40, (drawn(1, 20),)).tolist() for _ in range(drawn(1, 6))]
        limit = max(map(max, lengths)) + drawn(0, 100)
        windows = pack(lengths, limit)
        assert [sorted(n for window in row for n in window) for row in windows] == [[*range(len(r))] for r in lengths]
        assert window_length(windows, lengths) <= limit
        # Never more positions than with each conversation in a window of its own.
        size = sum(map(len, windows)) * window_length(windows, lengths)
        assert size <= sum(map(len, lengths)) * max(map(max, lengths))


# Rounding


def test_sizes_are_powers_of_two_and_one_and_a_half_times_such_within_their_limits() -> None:
    rounding = Rounding(chunk=1000, chunks=11, conversation=300)
    assert [rounding.chunk_count(n) for n in range(1, 12)] == [1, 2, 3, 4, 6, 6, 8, 8, 11, 11, 11]
    assert [rounding.chunk_tokens(n) for n in (1, 125, 129, 193, 769, 1000)] == [128, 128, 192, 256, 1000, 1000]
    assert rounding.window_sizes(9, 1200) == [128, 192, 256, 384, 512, 768, 1024, 1200]
    assert rounding.window_sizes(260, None) == [300]
    assert rounding.window_sizes(260, 1200)[:2] == [300, 384]


def test_rounded_windows_hold_every_conversation_once() -> None:
    for _ in range(30):
        lengths = [torch.randint(1, 40, (drawn(1, 20),)).tolist() for _ in range(drawn(1, 6))]
        limit, rounding = (None, 160)[drawn(0, 2)], Rounding(64, 3, 40)
        windows, count, size = windows_of(lengths, limit, rounding)
        assert [sorted(n for window in row for n in window) for row in windows] == [[*range(len(r))] for r in lengths]
        assert window_length(windows, lengths) <= size <= (limit or 40)
        assert size in (8, 12, 16, 24, 32, 40, 48, 64, 96, 128, 160)
        assert sum(map(len, windows)) <= count
        assert count / len(lengths) in (1, 2, 4, 8, 16, 32)


def test_parts_of_one_size() -> None:
    assert evenly_divided(8, 30, 100) == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]
    assert evenly_divided(12, 30, 100, unit=2) == [slice(0, 6), slice(6, 12)]
    assert evenly_divided(3, 101, 100) == [slice(0, 1), slice(1, 2), slice(2, 3)]


# The steps


def contents(batches: list[InstructionBatch]) -> Counter[tuple[object, ...]]:
    """Each context and each conversation under it, as often as it occurs."""
    found: Counter[tuple[object, ...]] = Counter()
    for batch in batches:
        chunks = batch.context.chunks
        contexts = [ids[mask].tolist() for ids, mask in zip(batch.context.input_ids, batch.context.mask, strict=True)]
        assert batch.context.input_ids.shape[1] == chunks
        for window, owner in enumerate(batch.owner.tolist()):
            mask = batch.mask[window]
            ids, answers = batch.input_ids[window][mask], batch.answers[window][mask]
            places = torch.arange(len(ids)) if batch.positions is None else batch.positions[window][mask]
            starts = [*torch.nonzero(places == 0).flatten().tolist(), len(ids)]
            for start, end in pairwise(starts):
                assert places[start:end].tolist() == list(range(end - start))
                said = (*ids[start:end].tolist(), *answers[start:end].tolist())
                found[(*contexts[owner], -1, *said)] += 1
        assert not batch.answers[~batch.mask].any()
        assert sorted(set(batch.owner.tolist())) == list(range(len(contexts)))
    return found


def test_a_round_has_every_conversation_of_every_context_once() -> None:
    sources = [[drawn_example(drawn(1, 30), drawn(1, 7)) for _ in range(count)] for count in (16, 8)]
    steps = make_steps(sources, conversations=7)
    found = contents([batch for step in range(3) for batch in steps.batches(step)])
    expected = Counter(
        (*example.context.tolist(), -1, *said.tokens.tolist(), *said.answers.tolist())
        for source in sources
        for example in source
        for said in example.conversations
    )
    assert found == expected
    assert contents([batch for step in range(3, 6) for batch in steps.batches(step)]) == expected


def test_rounded_steps_have_the_same_contents_in_few_shapes() -> None:
    sources, seed = small_sources(), drawn(0, 9)
    plain, rounded = (make_steps(sources, seed=seed, positions=200, rounded=flag) for flag in (False, True))
    steps = range(0, 30, 7)
    for step in steps:
        assert contents(rounded.batches(step)) == contents(plain.batches(step))
    shapes = [{batch.shape for step in range(60) for batch in of.batches(step)} for of in (plain, rounded)]
    sizes = [{(shape.window_tokens, shape.conversations.window_tokens) for shape in of} for of in shapes]
    assert len(sizes[1]) < len(sizes[0])
    assert {shape.chunks for shape in shapes[1]} <= {1, 2, 3, 4, 5}
    known = rounded.micro_batches(60)
    assert set(known.shapes) <= shapes[1]
    assert known.accumulates == any(len(rounded.batches(step)) > 1 for step in range(6))


def test_most_batches_of_realistic_lengths_have_the_shape_of_others_if_rounded() -> None:
    examples, seed = realistic_examples(400), drawn(0, 1000)
    counts = []
    for rounded in (False, True):
        steps = InstructionSteps([examples], [None], BatchConfig(), 1024, seed=seed, rounded=rounded)
        batches = [batch for step in range(12) for batch in steps.batches(step)]
        contexts, said = {batch.context.mask.shape for batch in batches}, {batch.mask.shape for batch in batches}
        counts.append((len(contexts), len(said), len(batches)))
        assert steps.load(12).padding < (0.25 if rounded else 0.05)
    assert counts[0][0] > counts[0][2] / 2
    assert counts[1][0] <= 24
    assert counts[1][1] <= 48


def test_the_shapes_of_all_processes_are_known_to_each() -> None:
    sources = small_sources()
    each = [make_steps(sources, Ranks(rank, 2), seed=3) for rank in range(2)]
    whole = [steps.micro_batches(9) for steps in each]
    assert set(whole[0].shapes) == set(whole[1].shapes)
    pool = {batch.shape for steps in each for step in range(6) for batch in steps.batches(step)}
    assert set(whole[0].shapes) <= pool
    for name in ("rows", "chunks", "window_tokens"):
        assert max(getattr(shape, name) for shape in whole[0].shapes) == max(getattr(shape, name) for shape in pool)


def test_a_step_has_so_many_contexts_and_at_most_so_many_conversations_of_each() -> None:
    steps = make_steps(small_sources(), conversations=3)
    for step in (0, 4, 100):
        batches = steps.batches(step)
        assert sum(len(batch.context.input_ids) for batch in batches) == 8
        for batch in batches:
            begins = (torch.arange(batch.mask.shape[1]) == 0).expand_as(batch.mask)
            begins = begins if batch.positions is None else (batch.positions == 0) & batch.mask
            per_context = torch.bincount(batch.owner, weights=begins.sum(1))
            assert per_context.min() >= 1
            assert per_context.max() <= 3


def same(left: InstructionBatch, right: InstructionBatch) -> bool:
    return left.context.input_ids.equal(right.context.input_ids) and left.input_ids.equal(right.input_ids)


def test_a_step_follows_from_its_number_and_the_seed_alone() -> None:
    sources = small_sources()
    first, second = (make_steps(sources, seed=3) for _ in range(2))
    steps = [drawn(0, 60) for _ in range(5)]
    before = {step: first.batches(step) for step in sorted(steps)}
    for step in steps:  # in another order, as after a resume
        again = second.batches(step)
        assert len(again) == len(before[step])
        assert all(same(one, other) for one, other in zip(again, before[step], strict=True))
    other = make_steps(sources, seed=4)
    assert contents(other.batches(0)) != contents(first.batches(0))


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_same_step_with_equally_many_batches(world: int) -> None:
    model, sources = make_model(chunk_size=6), small_sources()
    whole = make_steps(sources, seed=3, losses=("answers", "reconstruction"))
    parts = [
        make_steps(sources, Ranks(rank, world), seed=3, losses=("answers", "reconstruction")) for rank in range(world)
    ]
    for step in (0, 7):
        batches = [part.batches(step) for part in parts]
        assert len({len(of_rank) for of_rank in batches}) == 1
        assert all(
            len({len(batch.context.input_ids) for batch in at_once}) == 1 for at_once in zip(*batches, strict=True)
        )
        with torch.no_grad():
            totals = [
                sum(float(instruction_losses(model, batch)[name].total) for batch in of_run)
                for of_run in ([b for of_rank in batches for b in of_rank], whole.batches(step))
                for name in ("answers", "reconstruction")
            ]
        assert totals[:2] == pytest.approx(totals[2:], rel=1e-5)


def test_no_more_positions_go_through_the_model_at_once_than_asked_for() -> None:
    limit = 100
    steps = make_steps(small_sources(), positions=limit)
    for step in range(5):
        for batch in steps.batches(step):
            # Packed windows may be a little larger than the sum of what is in them.
            assert batch.size <= 2 * limit or len(batch.context.input_ids) == 1


def test_under_five_percent_of_positions_are_padding_on_realistic_lengths() -> None:
    steps = InstructionSteps([realistic_examples(400)], [None], BatchConfig(), 1024, seed=drawn(0, 1000))
    batches = [batch for step in range(6) for batch in steps.batches(step)]
    positions = sum(b.context.mask.numel() + b.mask.numel() for b in batches)
    tokens = sum(int(b.context.mask.sum()) + int(b.mask.sum()) for b in batches)
    assert 1 - tokens / positions < 0.05
    load = steps.load(6)
    assert (load.tokens, load.positions, load.batches) == (tokens / 6, positions / 6, len(batches) / 6)
    assert load.padding == pytest.approx(1 - tokens / positions)
    # Positions of one window size for everything, as in plain windows, are several times as many.
    plain = sum(
        len(b.context.input_ids) * (b.context.chunks + most) * max(b.context.mask.shape[2], b.mask.shape[1])
        for b in batches
        for most in [16]
    )
    assert plain > 2 * positions


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, but it is 0"),
        ({"conversations": 0}, "conversations must be at least 1, but it is 0"),
        ({"positions": 0}, "positions must be at least 1, but it is 0"),
        ({"window": 0}, "window must be at least 1, but it is 0"),
        ({"group_size": 3}, r"group_size must divide batch_size \(8\), but it is 3"),
        ({"group_size": 0}, r"group_size must divide batch_size \(8\), but it is 0"),
        ({"losses": ("completion",)}, r"losses must be answers and others of .*, but they are \('completion',\)"),
        ({"losses": ("answers", "all")}, r"losses must be .*, but they are \('answers', 'all'\)"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BatchConfig(**{"batch_size": 8, **settings})


def test_a_number_of_processes_that_does_not_divide_is_refused() -> None:
    message = r"group_size must be a multiple of the 3 processes and divide batch_size \(8\), but it is 8"
    with pytest.raises(InputError, match=message):
        make_steps(small_sources(), Ranks(0, 3))
