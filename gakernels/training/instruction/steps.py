"""The contexts and conversations of each step, in batches of similar size: a function of the step alone."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

import numpy as np
import numpy.typing as npt

from gakernels.cost.step_memory import StepShape
from gakernels.data.chat import EncodedConversation, EncodedRecord
from gakernels.data.mixture import Draw, MixedContexts, chosen
from gakernels.distributed import Ranks
from gakernels.errors import InputError
from gakernels.settings import Count, Int, settings
from gakernels.training.instruction.batches import InstructionBatch, instruction_batch
from gakernels.training.instruction.packing import Rounding
from gakernels.training.run_recipe import MicroBatches

LOSSES = ("answers", "reconstruction", "completion")
POOL_STEPS = 128
PACKED = 4  # windows of several conversations may be so many times as long: less of them is padding


Sizes = npt.NDArray[np.int64]
"""(n, 3): number of chunks T, tokens of a chunk, and tokens of all conversations of a context."""


@settings
class BatchConfig:
    """How contexts and conversations become batches.

    Attributes:
        batch_size: contexts in a step, over all processes.
        conversations: maximum number of conversations about each context in a step; later rounds take the next ones.
        group_size: contexts of similar size that are processed together; divides batch_size and is a multiple of the
            number of processes, each of which gets its share of every group. None for the greatest common divisor of
            batch_size and 8.
        positions: approximate number of tokens, with padding, that go through the model at once; larger groups are
            divided.
        window: largest number of tokens in a conversation; None for the chunk size. A window of several conversations
            may have four times as many.
        losses: `answers`, and `reconstruction` and `completion` to train them too.

    Raises:
        InputError: a value is out of range.
    """

    batch_size: Count = 32
    conversations: Count = 16
    group_size: Int | None = None
    positions: Count = 16384
    window: Count | None = None
    losses: tuple[str, ...] = ("answers",)

    def __post_init__(self) -> None:
        if self.group_size is not None and (self.group_size < 1 or self.batch_size % self.group_size):
            raise InputError(f"group_size must divide batch_size ({self.batch_size}), but it is {self.group_size}")
        unknown = [name for name in self.losses if name not in LOSSES]
        if unknown or "answers" not in self.losses:
            raise InputError(f"losses must be answers and others of {', '.join(LOSSES)}, but they are {self.losses}")

    @property
    def group(self) -> int:
        """Contexts in a group."""
        return self.group_size or math.gcd(self.batch_size, 8)


@dataclass(frozen=True)
class StepLoad:
    """Averages over steps, for all processes together.

    Attributes:
        tokens: tokens of contexts and conversations.
        positions: tokens with padding.
        batches: passes through the model on one process.
    """

    tokens: float
    positions: float
    batches: float

    @property
    def padding(self) -> float:
        """Share of positions that are padding."""
        return 1 - self.tokens / self.positions


class InstructionSteps:
    """The batches of each step.

    The draws depend only on the number of a step and the seed, and are the same for any number of processes.
    Contexts are drawn many steps ahead (a pool of at most 128 steps, not more than there are contexts) and grouped by
    size; the groups come in random order.

    Args:
        sources: the examples of each source.
        weights: share of each source; None to use its size.
        config: see `BatchConfig`.
        chunk_size: largest number of tokens in a chunk of a context.
        pack: whether several conversations may share a window.
        seed: of all random draws.
        ranks: this process among all processes of the run.
        rounded: whether the batches have few shapes, with more padding (`Rounding`); the contents of a step stay.

    Attributes:
        contexts: their number in all sources.

    Raises:
        InputError: there is no example, or the processes do not divide the groups.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[EncodedRecord]],
        weights: Sequence[float | None],
        config: BatchConfig,
        chunk_size: int,
        pack: bool = True,
        seed: int = 0,
        ranks: Ranks | None = None,
        rounded: bool = False,
    ) -> None:
        self._ranks = ranks or Ranks()
        if config.group % self._ranks.world:
            raise InputError(
                f"group_size must be a multiple of the {self._ranks.world} processes and divide batch_size "
                f"({config.batch_size}), but it is {config.group}"
            )
        self.config, self._sources, self._chunk_size, self._seed = config, sources, chunk_size, seed
        conversation = config.window or chunk_size
        self._window = PACKED * conversation if pack else None
        longest = max((len(example.context) for source in sources for example in source), default=1)
        chunks = math.ceil(longest / chunk_size)
        self._rounding = Rounding(chunk_size, chunks, conversation) if rounded else None
        sizes = [len(source) for source in sources]
        self.contexts = sum(sizes)
        self._steps = max(1, min(POOL_STEPS, self.contexts // config.batch_size))
        self._mixture = MixedContexts(sizes, weights, self._steps * config.batch_size, seed)
        self._pool = lru_cache(maxsize=2)(self._draw_pool)

    def batches(self, step: int) -> list[InstructionBatch]:
        """The micro-batches of this process; every process has the same number."""
        return [self._batch(part[self._ranks.rank :: self._ranks.world]) for part in self._parts(step)]

    def micro_batches(self, steps: int) -> MicroBatches:
        """The largest batches of all processes in the first steps, of at most one pool: the next ones are like it."""
        world = self._ranks.world
        parts = [list(self._parts(step)) for step in range(min(steps, self._steps))]
        shapes = {self._batch(part[rank::world]).shape for of in parts for part in of for rank in range(world)}
        return MicroBatches(_largest(list(shapes)), any(len(of_step) > 1 for of_step in parts))

    def load(self, steps: int = 8) -> "StepLoad":
        """The average load of a step, from the first steps."""
        batches = [batch for step in range(steps) for batch in self.batches(step)]
        tokens, positions = sum(batch.tokens for batch in batches), sum(batch.size for batch in batches)
        world = self._ranks.world
        return StepLoad(tokens * world / steps, positions * world / steps, len(batches) / steps)

    def _draw_pool(self, number: int) -> list[list[Draw]]:
        """The groups of a pool, in the order in which the steps take them."""
        draws = self._mixture.draw(number)
        sizes = np.array([self._size(draw) for draw in draws])
        groups = [[draws[n] for n in group] for group in alike(sizes, self.config.group)]
        rng = Random(f"{self._seed} pool {number}")
        rng.shuffle(groups)
        return groups

    def _size(self, draw: Draw) -> tuple[int, int, int]:
        """The number of chunks, the tokens of a chunk, and the tokens of the conversations of a context."""
        tokens = len(self._example(draw).context)
        chunk = math.ceil(tokens / math.ceil(tokens / self._chunk_size))
        return math.ceil(tokens / chunk), chunk, sum(len(said.tokens) for said in self._conversations(draw))

    def _parts(self, step: int) -> Iterator[Sequence[Draw]]:
        """The contexts of each batch, for all processes together."""
        pool, place = divmod(step, self._steps)
        count = self.config.batch_size // self.config.group
        for group in self._pool(pool)[place * count : (place + 1) * count]:
            group = sorted(group, key=self._size)
            yield from (group[part] for part in self._divided(np.array([self._size(draw) for draw in group])))

    def _divided(self, sizes: Sizes) -> list[slice]:
        """A group in batches of about the configured number of positions."""
        limit, world, rounding = self.config.positions, self._ranks.world, self._rounding
        if rounding is None:
            return divided(sizes, limit, self._chunk_size // 8, world)
        chunks, tokens, said = sizes.max(axis=0).tolist()
        largest = np.array([[rounding.chunk_count(chunks), rounding.chunk_tokens(tokens), said]])
        return evenly_divided(len(sizes), int(_positions(largest)[0]), limit, world)

    def _batch(self, draws: Sequence[Draw]) -> InstructionBatch:
        return instruction_batch(
            [self._example(draw).context.tolist() for draw in draws],
            [self._conversations(draw) for draw in draws],
            self._chunk_size,
            self._window,
            [self._repeated(draw) for draw in draws] if "reconstruction" in self.config.losses else None,
            "completion" in self.config.losses,
            self._rounding,
        )

    def _repeated(self, draw: Draw) -> int:
        """The chunk to reconstruct this time."""
        rng = Random(f"{self._seed} chunk {draw.source} {draw.index} {draw.round}")
        return rng.randrange(self._size(draw)[0])

    def _example(self, draw: Draw) -> EncodedRecord:
        return self._sources[draw.source][draw.index]

    def _conversations(self, draw: Draw) -> list[EncodedConversation]:
        said = self._example(draw).conversations
        return [said[n] for n in chosen(len(said), self.config.conversations, draw, self._seed)]


def alike(sizes: Sizes, group: int) -> list[list[int]]:
    """The numbers 0..n-1 in groups of `group` contexts of similar size; `group` divides n.

    All are cut in two where that saves the most padding, sorted either by the size of the context or by that of the
    conversations; then each part is cut again, down to single groups.
    """
    groups: list[list[int]] = []
    parts = [np.arange(len(sizes))]
    while parts:
        part = parts.pop()
        if len(part) <= group:
            groups.append([int(number) for number in part])
        else:
            parts.extend(_cut(part, sizes, group))
    return groups


def divided(sizes: Sizes, limit: int, price: int, unit: int = 1) -> list[slice]:
    """Cut contexts, sorted by size, into consecutive parts, one per pass: where a cut saves more padding than another
    pass is worth, and where one part would have too many positions.

    Args:
        sizes: of the contexts.
        limit: most positions in a pass of one process; a part of `unit` contexts may have more.
        price: cost of one more pass, in positions.
        unit: number of processes, which share each part evenly; divides n.
    """
    costs, cuts = [0], [0]
    for end in range(unit, len(sizes) + 1, unit):
        options = []
        for begin in range(0, end, unit):
            rows = (end - begin) // unit
            positions = rows * int(_positions(sizes[begin:end].max(axis=0)[None])[0])
            if positions <= limit or rows == 1:
                options.append((costs[begin // unit] + positions + price, begin))
        cost, cut = min(options)
        costs.append(cost)
        cuts.append(cut)
    parts, end = [], len(sizes)
    while end:
        parts.append(slice(cuts[end // unit], end))
        end = parts[-1].start
    return parts[::-1]


def evenly_divided(contexts: int, positions: int, limit: int, unit: int = 1) -> list[slice]:
    """Cut contexts into as few parts of one size as leave no part too many positions, or into single ones.

    Args:
        contexts: their number.
        positions: of each, with padding.
        limit: as in `divided`.
        unit: as in `divided`.
    """
    rows = contexts // unit
    size = next(size for size in range(rows, 0, -1) if rows % size == 0 and (size * positions <= limit or size == 1))
    return [slice(start, start + size * unit) for start in range(0, contexts, size * unit)]


def _cut(part: npt.NDArray[np.int64], sizes: Sizes, group: int) -> Sequence[npt.NDArray[np.int64]]:
    chunks, chunk, said = sizes[part].T
    best: tuple[float, npt.NDArray[np.int64], int] | None = None
    for order in (np.lexsort((said, chunk, chunks)), np.lexsort((chunk, chunks, said))):
        ordered = sizes[part[order]]
        places = np.arange(group, len(part), group)
        left = np.maximum.accumulate(ordered)[places - 1]
        right = np.maximum.accumulate(ordered[::-1])[::-1][places]
        costs = places * _positions(left) + (len(part) - places) * _positions(right)
        least = int(costs.argmin())
        if best is None or costs[least] < best[0]:
            best = (float(costs[least]), part[order], int(places[least]))
    assert best is not None
    return best[1][: best[2]], best[1][best[2] :]


def _largest(shapes: Sequence[StepShape]) -> list[StepShape]:
    """The shapes that no other exceeds in every respect."""
    sizes = np.array([(s.rows, s.chunks, len(s.seen), s.window_tokens, s.predicted, *_said(s)) for s in shapes])
    exceeded = (sizes[:, None] >= sizes).all(-1).sum(0) > 1
    return [shape for shape, smaller in zip(shapes, exceeded.tolist(), strict=True) if not smaller]


def _said(shape: StepShape) -> tuple[int, ...]:
    said = shape.conversations
    assert said is not None
    return said.windows, said.window_tokens, said.predicted, int(said.packed)


def _positions(largest: Sizes) -> npt.NDArray[np.int64]:
    """The positions that each context takes in a batch with these largest sizes."""
    positions: npt.NDArray[np.int64] = largest[:, 0] * largest[:, 1] + largest[:, 2]
    return positions
