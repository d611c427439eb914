"""Several threads and tasks on one model: each has its own adapter and context pass, and nothing stays behind."""

import asyncio
import contextvars
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import logits_of, make_model, random_context, random_ids
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from gakernels import Adapter, GenerativeAdapter, InputError
from gakernels.cost.memory import Recomputation, set_recomputation
from gakernels.model.compilation import compile_layers

USERS = 4
PATIENCE = 10  # seconds, should a test fail


class World:
    """A model, some adapters, and the logits of a prompt with each of them alone; None for the base alone."""

    def __init__(self, **settings: Any) -> None:
        self.model = make_model(scale=2.0, **settings)
        self.adapters: list[Adapter | None] = [*self.model.adapt([random_context(20) for _ in range(USERS)]), None]
        self.ids = random_ids(1, 6)
        self.alone = [self.logits(adapter) for adapter in self.adapters]
        pairs = zip(self.alone, self.alone[1:], strict=False)
        assert all((one - other).abs().max() > 1e-2 for one, other in pairs)

    def logits(self, adapter: Adapter | None) -> Tensor:
        with ExitStack() as stack:
            if adapter is not None:
                stack.enter_context(self.model.adapted(adapter))
            return self.now()

    def now(self) -> Tensor:
        return logits_of(self.model.base, self.ids)

    def assert_clean(self) -> None:
        """No adapter in any thread, and nobody holds off a merge."""
        assert torch.equal(self.now(), self.alone[-1])
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(self.now).result(), self.alone[-1])
        self.model.merge(self.adapters[0])
        self.model.unmerge()


def in_threads(*works: Callable[[], Any]) -> list[Any]:
    """The results of functions that start at the same moment, a thread each."""
    barrier = threading.Barrier(len(works))

    def started(work: Callable[[], Any]) -> Any:
        barrier.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result() for future in [pool.submit(started, work) for work in works]]


# Threads


def test_each_thread_has_its_own_adapter() -> None:
    world = World()

    def work(number: int) -> bool:
        return all(torch.equal(world.logits(world.adapters[number]), world.alone[number]) for _ in range(20))

    assert all(in_threads(*(lambda number=number: work(number) for number in range(USERS + 1))))
    world.assert_clean()


def test_each_thread_generates_its_own_text(tokenizer: PreTrainedTokenizerFast, text: Callable[[int], str]) -> None:
    model = make_model(tokenizer=tokenizer, scale=2.0)
    documents, prompts = [text(20) for _ in range(USERS)], [text(3), text(7)]

    def answers(document: str) -> list[str]:
        with model.adapted(model.adapt(document)):
            return model.generate(prompts, max_new_tokens=8)

    alone = [answers(document) for document in documents]
    assert len({tuple(texts) for texts in alone}) == USERS
    for _ in range(3):
        assert in_threads(*(lambda document=document: answers(document) for document in documents)) == alone


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_overlapping_blocks_of_threads_leave_nothing_whatever_their_order(order: tuple[int, ...]) -> None:
    world = World()
    entered, end = [threading.Event() for _ in order], [threading.Event() for _ in order]

    def work(number: int) -> bool:
        with world.model.adapted(world.adapters[number]):
            entered[number].set()
            end[number].wait(PATIENCE)
            return torch.equal(world.now(), world.alone[number])

    with ThreadPoolExecutor(len(order)) as pool:
        futures = [pool.submit(work, number) for number in range(3)]
        for event in entered:
            event.wait(PATIENCE)
        assert torch.equal(world.now(), world.alone[-1])
        with pytest.raises(InputError, match=r"in use, here or in another thread"):
            world.model.merge(world.adapters[0])
        for number in order:
            end[number].set()
            assert futures[number].result()
    world.assert_clean()


def test_a_thread_has_no_adapter_unless_it_is_handed_the_context() -> None:
    world = World()
    with world.model.adapted(world.adapters[0]), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(world.now).result(), world.alone[-1])
        handed = contextvars.copy_context()
        assert torch.equal(pool.submit(handed.run, world.now).result(), world.alone[0])


def test_context_passes_and_generation_run_at_the_same_time() -> None:
    world, contexts = World(chunk_size=4), [random_context(length) for length in (30, 17)]
    alone = [world.model.states([context], chunks_per_pass=2) for context in contexts]

    def read(number: int) -> bool:
        for _ in range(8):
            states = world.model.states([contexts[number]], chunks_per_pass=2)
            if not all(torch.equal(states[name], alone[number][name]) for name in states):
                return False
        return True

    def use(number: int) -> bool:
        return all(torch.equal(world.logits(world.adapters[number]), world.alone[number]) for _ in range(30))

    assert all(in_threads(lambda: read(0), lambda: use(0), lambda: read(1), lambda: use(-1)))
    world.assert_clean()


def losses_and_gradients(model: GenerativeAdapter, ids: Tensor) -> list[Tensor]:
    hidden, _ = model(ids, torch.ones_like(ids, dtype=torch.bool), 3, (0, 1, 2, 1, 2, 3))
    loss = hidden.square().mean()
    return [loss.detach(), *torch.autograd.grad(loss, list(model.generators.parameters()))]


@pytest.mark.parametrize("way", ["plain", "overlapped", "compiled"])
def test_training_passes_run_at_the_same_time(way: str) -> None:
    model, batches = make_model(linears=("q_proj", "o_proj")), [random_ids(2, 6, 5) for _ in range(3)]
    if way == "overlapped":
        model.overlap_generators()
    if way == "compiled":
        torch.compiler.reset()
        compile_layers(model.base, backend="aot_eager")
    alone = [losses_and_gradients(model, ids) for ids in batches]
    for _ in range(3):
        together = in_threads(*(lambda ids=ids: losses_and_gradients(model, ids) for ids in batches))
        for found, wanted in zip(together, alone, strict=True):
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


def test_compiled_layers_find_the_adapter_of_their_thread() -> None:
    world = World()
    torch.compiler.reset()
    compile_layers(world.model.base, backend="aot_eager", fullgraph=True)
    for adapter in (world.adapters[0], None):
        world.logits(adapter)  # compiled here: torch 2.11 can't compile in two threads at once

    def work(number: int) -> bool:
        logits = [world.logits(world.adapters[number]) for _ in range(10)]
        return all(torch.allclose(found, world.alone[number], atol=1e-4) for found in logits)

    assert all(in_threads(*(lambda number=number: work(number) for number in range(USERS + 1))))


@pytest.mark.parametrize("kind", ["gated", "whole"])
def test_what_is_computed_again_in_the_backward_of_another_thread_has_its_adapter(kind: str) -> None:
    """As on a GPU, where autograd has threads of its own."""
    model, ids = make_model(linears=("gate_proj", "o_proj")), random_ids(2, 6, 5)
    wanted = losses_and_gradients(model, ids)
    set_recomputation(model, Recomputation(**{kind: (0, 1, 2)}))
    hidden, _ = model(ids, torch.ones_like(ids, dtype=torch.bool), 3, (0, 1, 2, 1, 2, 3))
    (found,) = in_threads(lambda: torch.autograd.grad(hidden.square().mean(), list(model.generators.parameters())))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted[1:], strict=True))


def test_gradient_checkpointing_of_whole_layers_is_refused_where_it_would_lose_the_adapter() -> None:
    world = World()
    world.model.base.gradient_checkpointing_enable()
    assert torch.equal(world.logits(world.adapters[0]), world.alone[0])  # off in eval mode
    world.model.base.train()
    world.model.base(input_ids=world.ids)
    with world.model.adapted(world.adapters[0]), pytest.raises(InputError, match="gradient checkpointing"):
        world.model.base(input_ids=world.ids)
    assert world.model.train().base.training is False


def test_a_stream_is_appended_to_by_one_thread_at_a_time() -> None:
    model, pieces = make_model(), [random_context(12), random_context(18)]
    both = [model.stream().append(first).append(second) for first, second in (pieces, pieces[::-1])]
    for _ in range(5):
        stream = model.stream()
        in_threads(lambda stream=stream: stream.append(pieces[0]), lambda stream=stream: stream.append(pieces[1]))
        assert stream.tokens_seen == 30
        states = stream.states()
        assert any(all(torch.equal(states[name], one.states()[name]) for name in states) for one in both)


# Tasks


def test_each_task_has_its_own_adapter() -> None:
    world = World()

    async def work(number: int) -> bool:
        good = True
        for _ in range(5):
            with ExitStack() as stack:
                if world.adapters[number] is not None:
                    stack.enter_context(world.model.adapted(world.adapters[number]))
                await asyncio.sleep(0)
                good &= torch.equal(world.now(), world.alone[number])
                await asyncio.sleep(0)
                good &= torch.equal(await asyncio.to_thread(world.now), world.alone[number])
        return good

    async def everybody() -> list[bool]:
        return await asyncio.gather(*(work(number) for number in range(USERS + 1)))

    assert all(asyncio.run(everybody()))
    world.assert_clean()


def test_a_task_keeps_the_adapter_that_it_was_started_with() -> None:
    world = World()

    async def child(go: asyncio.Event) -> Tensor:
        await go.wait()
        return world.now()

    async def parent() -> Tensor:
        go = asyncio.Event()
        with world.model.adapted(world.adapters[0]):
            task = asyncio.create_task(child(go))
            await asyncio.sleep(0)
        assert torch.equal(world.now(), world.alone[-1])
        go.set()
        return await task

    assert torch.equal(asyncio.run(parent()), world.alone[0])
    world.assert_clean()


def test_a_cancelled_task_leaves_nothing() -> None:
    world = World()

    async def sleep() -> None:
        with world.model.adapted(world.adapters[0]):
            await asyncio.sleep(60)

    async def main() -> None:
        task = asyncio.create_task(sleep())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        world.assert_clean()

    asyncio.run(main())


# Generators, which can leave a block open while others run


def pieces(world: World, number: int, steps: int = 2) -> Iterator[Tensor]:
    with world.model.adapted(world.adapters[number]):
        for _ in range(steps):
            yield world.now()


def test_a_generator_that_ends_in_its_place_is_fine() -> None:
    world = World()
    assert all(torch.equal(piece, world.alone[1]) for piece in pieces(world, 1))
    world.assert_clean()


def test_a_generator_that_moves_between_contexts_is_told() -> None:
    """As a web framework does that draws each piece in a copy of its context: later pieces have no adapter."""
    world, generator = World(), None
    generator = pieces(world, 1)
    for wanted in (world.alone[1], world.alone[-1]):
        assert torch.equal(contextvars.copy_context().run(next, generator), wanted)
    with pytest.raises(InputError, match="must end in the thread or task where it began"):
        next(generator)
    world.assert_clean()


def test_generators_that_are_drawn_from_in_turn_are_told() -> None:
    world = World()
    one, other = pieces(world, 0), pieces(world, 1)
    next(one), next(other)
    assert torch.equal(next(one), world.alone[1])  # the block that began last is in force
    with pytest.raises(InputError, match="before the blocks around it"):
        next(one)
    assert torch.equal(next(other), world.alone[1])
    assert next(other, None) is None
    world.assert_clean()


@pytest.mark.parametrize("place", ["here", "thread", "copy"])
def test_a_generator_that_is_closed_anywhere_leaves_nothing(place: str) -> None:
    world, generator = World(), None
    generator = pieces(world, 0)
    next(generator)
    assert torch.equal(world.now(), world.alone[0])
    if place == "here":
        generator.close()
    elif place == "thread":
        in_threads(generator.close)
    else:
        contextvars.copy_context().run(generator.close)
    world.assert_clean()


# Nesting and errors


def test_blocks_nest_also_those_of_two_models() -> None:
    one, other = World(), World()
    with one.model.adapted(one.adapters[0]), other.model.adapted(other.adapters[1]):
        assert torch.equal(one.now(), one.alone[0])
        assert torch.equal(other.now(), other.alone[1])
        with one.model.using({}):
            assert torch.equal(one.now(), one.alone[-1])
            assert torch.equal(other.now(), other.alone[1])
        one.model.adapt([random_context(9)])
        assert torch.equal(one.now(), one.alone[0])
    one.assert_clean()
    other.assert_clean()


def test_an_error_in_the_middle_of_a_pass_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    last = world.model.generator(world.model.adapted_names[-1])

    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(last, "factors", broken)
        stream = world.model.stream()
        with pytest.raises(RuntimeError, match="out of memory"):
            stream.append(random_context(20))
        with (
            pytest.raises(RuntimeError, match="out of memory"),
            world.model.adapted(world.adapters[0]),
        ):
            stream.append(random_context(20))
    assert stream.tokens_seen == 0
    world.assert_clean()


# Merging


def test_a_merge_waits_for_nobody_and_lets_nobody_in(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    world = World(tokenizer=tokenizer)
    merged = threading.Event()
    end = threading.Event()

    def merge() -> None:
        world.model.merge(world.adapters[0])
        merged.set()
        end.wait(PATIENCE)
        world.model.unmerge()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(merge)
        merged.wait(PATIENCE)
        for use in (lambda: world.logits(world.adapters[1]), lambda: world.model.adapt([random_context(5)])):
            with pytest.raises(InputError, match=r"merged into the base model; call unmerge\(\)"):
                use()
        assert len(world.model.generate("w3 w4")) == 1  # with the merged weights
        with world.model.using({}), pytest.raises(InputError, match="in use"):
            world.model.unmerge()
        end.set()
        future.result()
    world.assert_clean()


def test_a_merged_folder_is_written_while_others_use_the_model(tmp_path: Path) -> None:
    world = World()

    def use(number: int) -> bool:
        return all(torch.equal(world.logits(world.adapters[number]), world.alone[number]) for _ in range(40))

    def save() -> bool:
        world.model.save_merged(world.adapters[0], tmp_path / "merged")
        return True

    assert all(in_threads(lambda: use(1), save, lambda: use(-1)))
    found = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval(), world.ids)
    assert (found - world.alone[0]).abs().max() < 1e-4 * world.alone[0].abs().max()
