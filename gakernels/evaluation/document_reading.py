"""What it costs to read a document, by its size, and to append a page to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from tqdm import tqdm

from gakernels.cost.shapes import ModelShape
from gakernels.errors import InputError
from gakernels.evaluation.cost import key_value_numbers
from gakernels.evaluation.measuring import measured
from gakernels.model import GenerativeAdapter
from gakernels.model.encoding import encode_context
from gakernels.model.stream import ContextStream

CHUNKS_PER_PASS = 8
PAGE_BYTES, PAGES = 3000, 5


@dataclass(frozen=True)
class ReadingCost:
    """What a document of one size costs.

    Attributes:
        bytes: of the text, in UTF-8.
        tokens: of the text.
        read_seconds: to turn the text into tokens and read them.
        adapter_seconds: to form the adapter of what has been read.
        peak_bytes: memory while it was read: that of PyTorch on a GPU, elsewhere of the process.
        added_bytes: how much more that is than before.
        page_tokens: of a page that is appended.
        page_seconds: to append it, and to form the adapter of all; the median of a few pages.
        cache_bytes: of keys and values of so many tokens; None if the shape of the model is not known.
    """

    bytes: int
    tokens: int
    read_seconds: float
    adapter_seconds: float
    peak_bytes: int
    added_bytes: int
    page_tokens: int
    page_seconds: float
    cache_bytes: int | None


@dataclass(frozen=True)
class KeptBytes:
    """What is kept of a document, whatever its size, in the dtype of the base model (a state in its own).

    Attributes:
        adapter: lora_A and lora_B.
        compact: U and V; None with the norm `frobenius`, which has no compact form.
        state: with which more can be appended.
    """

    adapter: int
    compact: int | None
    state: int


def measure_reading(
    model: GenerativeAdapter, texts: Sequence[str], sizes: Sequence[int], progress: bool = True
) -> tuple[list[ReadingCost], KeptBytes]:
    """Read one growing document, and measure it at each size.

    Args:
        model: with a tokenizer.
        texts: the document consists of these, again and again, with empty lines between them.
        sizes: of the document in bytes.
        progress: whether to show a bar.

    Raises:
        InputError: a size is below 1.
    """
    if not sizes or min(sizes) < 1:
        raise InputError(f"sizes must be at least 1 byte, but they are {', '.join(map(str, sizes)) or 'none'}")
    sizes = sorted(set(sizes))
    document = _document(texts, sizes[-1] + PAGES * PAGE_BYTES)
    stream, reading = model.stream(), _Reading(model)
    model.stream().append(_decoded(document[:PAGE_BYTES])).adapter()  # the first pass of a process takes longer
    costs = []
    with tqdm(total=sizes[-1], desc="reading", unit="B", unit_scale=True, disable=None if progress else True) as bar:
        for before, size in zip((0, *sizes), sizes, strict=False):
            reading.read(stream, _decoded(document[before:size]), bar, size - before)
            pages = [document[size + n * PAGE_BYTES :][:PAGE_BYTES] for n in range(PAGES)]
            costs.append(reading.cost(stream, size, [_decoded(page) for page in pages]))
    return costs, _kept(model, stream)


class _Reading:
    """The time and memory of a document so far."""

    def __init__(self, model: GenerativeAdapter) -> None:
        self._model = model
        with measured(model.device) as before:
            pass
        self._before, self._peak, self._seconds = before.peak_bytes, before.peak_bytes, 0.0

    def read(self, stream: ContextStream, text: str, bar: tqdm[None], size: int) -> None:
        """Read a text in passes, each of which counts as its share of `size` on the bar."""
        first, shown = stream.tokens_seen == 0, 0
        with measured(self._model.device) as took:
            tokens = encode_context(self._model.tokenizer, text, first)
            step = CHUNKS_PER_PASS * self._model.config.chunk_size
            for start in range(0, len(tokens), step):
                stream.append(tokens[start : start + step], CHUNKS_PER_PASS)
                done = min(start + step, len(tokens)) * size // len(tokens)
                bar.update(done - shown)
                shown = done
        self._seconds += took.seconds
        self._peak = max(self._peak, took.peak_bytes)

    def cost(self, stream: ContextStream, size: int, pages: Sequence[str]) -> ReadingCost:
        """What has been measured, and what pages cost that are appended to what has been read."""
        with measured(self._model.device) as forming:
            stream.adapter()
        seconds, tokens = [], []
        for page in pages:
            longer = self._model.stream().add(stream)
            with measured(self._model.device) as appending:
                longer.append(page).adapter()
            seconds.append(appending.seconds)
            tokens.append(longer.tokens_seen - stream.tokens_seen)
        return ReadingCost(
            bytes=size,
            tokens=stream.tokens_seen,
            read_seconds=self._seconds,
            adapter_seconds=forming.seconds,
            peak_bytes=self._peak,
            added_bytes=self._peak - self._before,
            page_tokens=round(median(tokens)),
            page_seconds=median(seconds),
            cache_bytes=_cache_bytes(self._model, stream.tokens_seen),
        )


def _document(texts: Sequence[str], size: int) -> bytes:
    """At least so many bytes of the texts, from the first one again after the last."""
    once = "".join(f"{text}\n\n" for text in texts).encode()
    return once * math.ceil(size / len(once))


def _decoded(part: bytes) -> str:
    """Its text, without a character that is cut off."""
    return part.decode(errors="ignore")


def _kept(model: GenerativeAdapter, stream: ContextStream) -> KeptBytes:
    width = model.base.dtype.itemsize
    compact = None if model.config.norm == "frobenius" else stream.compact().numbers() * width
    return KeptBytes(stream.adapter().numbers() * width, compact, sum(s.nbytes for s in stream.states().values()))


def _cache_bytes(model: GenerativeAdapter, tokens: int) -> int | None:
    try:
        shape = ModelShape.from_config(model.base.config)
    except InputError:
        return None
    return key_value_numbers(shape, tokens) * model.base.dtype.itemsize
