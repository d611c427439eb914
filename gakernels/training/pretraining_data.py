"""The segments of a pretraining run: what it trains on, and the contexts that are held out for its report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from gakernels.data import (
    Corpus,
    JoinedSegments,
    MixedOrder,
    Order,
    Segments,
    SegmentSet,
    ShuffledOrder,
    TokenCache,
    document_segments,
    hold_out_documents,
    packed_segments,
    source_of,
    token_cache,
)
from gakernels.data.cache import DESCRIPTION
from gakernels.data.caching import automatic_folder
from gakernels.errors import InputError
from gakernels.model.encoding import check_tokens
from gakernels.settings import AtLeastTwo, Flag, Number, PathText, UserPath, settings
from gakernels.training.perplexity import HeldOutContexts


@settings
class SourceConfig:
    """One source of a mixture.

    Attributes:
        path: a folder, a file, or `hub:` and the name of a data set (docs/pretraining.md).
        weight: share of every batch, relative to the other sources.
        text_key: the entry of a record, or the column, that holds the text.
    """

    path: PathText
    weight: Number = 1.0
    text_key: str = "text"


@settings
class DataConfig:
    """What a generator is pretrained on.

    The held-out contexts come from `held_out_path` if it is given, else from every k-th document (`held_out_every`),
    else from the end of each source.

    Attributes:
        path: the only source: a folder, a file, or `hub:` and the name of a data set.
        sources: or several sources, by name.
        text_key: the entry of a record, or the column, that holds the text, for `path` and `held_out_path`.
        within_documents: cut segments within documents, and leave out the rest of each; if not, from all documents
            in sequence, as the paper does.
        held_out_path: a source for the held-out contexts alone.
        held_out_every: hold out every document whose number is a multiple of it.
        cache: folder of the token cache; None for the automatic folder. For a single source.
        strict: a record that can't be used is an error; if not, such records are counted and reported.

    Raises:
        InputError: there is neither a path nor sources, or both, or the settings contradict each other.
    """

    path: PathText | None = None
    sources: Mapping[str, SourceConfig] = field(default_factory=dict)
    text_key: str = "text"
    within_documents: Flag = False
    held_out_path: PathText | None = None
    held_out_every: AtLeastTwo | None = None
    cache: UserPath | None = None
    strict: Flag = False

    def __post_init__(self) -> None:
        if (self.path is None) == (not self.sources):
            raise InputError("data must have either a path or sources")
        if self.held_out_path is not None and self.held_out_every is not None:
            raise InputError("data.held_out_path and data.held_out_every must not both be given")
        if self.cache is not None and len(self.sources) > 1:
            raise InputError("data.cache must not be given with several sources: each has a cache of its own")

    def all_sources(self) -> Mapping[str, SourceConfig]:
        """The sources by name, even if there is only a path."""
        return self.sources if self.path is None else {"data": SourceConfig(self.path, 1.0, self.text_key)}


@dataclass(frozen=True)
class HeldOutSize:
    """How much is held out: the number of contexts and their tokens; each is followed by as many tokens."""

    contexts: int
    tokens: int


@dataclass(frozen=True)
class PretrainingData:
    """The data of a run.

    Attributes:
        segments: to train on.
        order: which of them a step takes.
        held_out: contexts to score, and as many tokens after each.
    """

    segments: SegmentSet
    order: Order
    held_out: HeldOutContexts


ReadCorpus = Callable[[SourceConfig], Corpus]


def load_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    segment_tokens: int,
    held_out: HeldOutSize,
    progress: bool = True,
) -> PretrainingData:
    """Read, tokenise and cut the data; tokens cached by an earlier call are reused.

    Args:
        config: what to read.
        tokenizer: of the base model.
        vocabulary: rows of the base model's embedding.
        segment_tokens: T * M.
        held_out: how much to hold out.
        progress: show a bar.

    Raises:
        InputError: a source can't be used or is too small, or its tokens are not in the vocabulary.
    """

    def read(source: SourceConfig) -> Corpus:
        cache = token_cache(source_of(source.path, source.text_key), tokenizer, config.cache, config.strict, progress)
        if cache.largest_token >= vocabulary:
            number = cache.corpus.document_of(cache.largest_token) + 1
            check_tokens(tokenizer, [cache.largest_token], vocabulary, f"data: document {number} of {source.path}")
        return cache.corpus

    return split(config, read, segment_tokens, held_out)


def split(config: DataConfig, read: ReadCorpus, segment_tokens: int, held_out: HeldOutSize) -> PretrainingData:
    """Cut the corpus that `read` returns for each source; see `load_data`."""
    sources = config.all_sources()
    each = HeldOutSize(-(-held_out.contexts // len(sources)), held_out.tokens)
    parts, scored = [], []
    for source in sources.values():
        training, kept = _split_source(config, source, read, segment_tokens, each)
        parts.append(training)
        scored.extend(kept)
    if config.held_out_path is not None:
        scored = [_scored(read(SourceConfig(config.held_out_path, text_key=config.text_key)), held_out)]
    weights = [source.weight for source in sources.values()]
    segments: SegmentSet = parts[0] if len(parts) == 1 else JoinedSegments(parts)
    order: Order = ShuffledOrder(len(segments)) if len(parts) == 1 else MixedOrder([len(p) for p in parts], weights)
    return PretrainingData(segments, order, _contexts(scored, held_out.contexts))


def _split_source(
    config: DataConfig, source: SourceConfig, read: ReadCorpus, segment_tokens: int, held_out: HeldOutSize
) -> tuple[Segments, list[Segments]]:
    """The segments to train on and, if they come from this source, those to score: contexts and continuations."""
    corpus = read(source)
    cut = document_segments if config.within_documents else packed_segments
    if config.held_out_path is not None:
        return cut(corpus, segment_tokens), []
    if config.held_out_every is not None:
        training, kept = hold_out_documents(corpus, config.held_out_every)
        return cut(training, segment_tokens), [_scored(kept, held_out)]
    scored = _scored(corpus, held_out)
    scored = scored.select(np.arange(len(scored)) >= len(scored) - held_out.contexts)
    segments = cut(corpus, segment_tokens)
    before = segments.starts + segment_tokens <= int(scored.starts[0])
    if len(scored) < held_out.contexts or not before.any():
        raise InputError(
            f"data: {source.path} gives {corpus.tokens} tokens, of which {2 * held_out.tokens * held_out.contexts} are "
            f"held out ({held_out.contexts} contexts of {held_out.tokens} and what follows each) and {segment_tokens} "
            "make a segment; more text, shorter segments (chunks x chunk size) or fewer contexts are needed"
        )
    return segments.select(before), [scored]


def _scored(corpus: Corpus, held_out: HeldOutSize) -> Segments:
    """Contexts with their continuations: within documents if there are enough, else from all documents in sequence."""
    length = 2 * held_out.tokens
    if int((np.diff(corpus.offsets) // length).sum()) >= held_out.contexts:
        return document_segments(corpus, length)
    return packed_segments(corpus, length)


def _contexts(parts: Sequence[Segments], count: int) -> HeldOutContexts:
    """This many contexts, evenly spread over the held-out text, with continuations and, if known, their documents."""
    joined = JoinedSegments(parts)
    if len(joined) < count:
        raise InputError(
            f"data: {count} contexts are to be held out, each with {joined.length} tokens, but there are {len(joined)}"
        )
    chosen = [number * len(joined) // count for number in range(count)]
    tokens = joined.take(chosen)
    half = joined.length // 2
    documents = tuple(int(joined.document_ids[number]) for number in chosen)
    known = len(set(documents)) > 1 and all(_is_within_documents(part) for part in parts)
    return HeldOutContexts(tokens[:, :half], tokens[:, half:], documents if known else None)


def _is_within_documents(segments: Segments) -> bool:
    """Whether no segment crosses the border of two documents."""
    offsets = segments.corpus.offsets
    ends = np.searchsorted(offsets, segments.starts, side="right")
    return bool((segments.starts + segments.length <= offsets[ends]).all())


def few(held_out: HeldOutContexts, count: int) -> HeldOutContexts:
    """Some of the contexts, evenly spread; at least two, of different documents if those are known."""
    total = len(held_out.contexts)
    count = min(count, total)
    chosen = [number * total // count for number in range(count)]
    documents = None if held_out.documents is None else tuple(held_out.documents[number] for number in chosen)
    after = None if held_out.continuations is None else held_out.continuations[chosen]
    return HeldOutContexts(
        held_out.contexts[torch.tensor(chosen)], after, documents if documents and len(set(documents)) > 1 else None
    )


def cached_segments(config: DataConfig, tokenizer: PreTrainedTokenizerBase, segment_tokens: int) -> int | None:
    """About how many segments the data has (including held-out ones), from token caches that already exist.

    None if one of the caches does not exist.
    """
    tokens = 0
    for name in config.all_sources().values():
        source = source_of(name.path, name.text_key)
        folder = config.cache or automatic_folder(source, tokenizer)
        if not (folder / DESCRIPTION).is_file():
            return None
        tokens += TokenCache.open(folder).corpus.tokens
    return tokens // segment_tokens
