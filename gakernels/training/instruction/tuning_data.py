"""The examples of a run: what it trains on, and what is held out for its report."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from gakernels.data.bad_records import BadRecords
from gakernels.data.chat import EncodedRecord, TokenLimits, encode_records, template_of
from gakernels.data.conversations import ContextRecord
from gakernels.data.instruction_sources import FILE_FAULTS, InstructionSource, read_source, source_given
from gakernels.data.tokenizing import tokenizer_description
from gakernels.errors import InputError
from gakernels.model.encoding import check_tokens
from gakernels.training.instruction.recipe import InstructionDataConfig

MOST_LOST = 0.05  # share of a source's rows, unless the recipe allows more


@dataclass(frozen=True)
class TuningData:
    """The data of a run.

    Attributes:
        sources: examples to train on, source by source.
        weights: share of each source; None to use its size.
        held_out: examples to score.
        skipped: records that could not be used.
        shortened: conversations that lost their oldest exchanges.
        refusal: a message why the run stops unless the recipe allows it: too much of a source can't be used. None if
            nothing stops it.
        given: what the data was made from, in JSON types (`source_given`).
    """

    sources: Sequence[Sequence[EncodedRecord]]
    weights: Sequence[float | None]
    held_out: Sequence[EncodedRecord]
    skipped: BadRecords
    shortened: BadRecords
    refusal: str | None = None
    given: Mapping[str, Any] = field(default_factory=dict)

    @property
    def contexts(self) -> int:
        """The number of contexts to train on."""
        return sum(map(len, self.sources))

    @property
    def conversations(self) -> int:
        """The number of conversations about them."""
        return sum(map(_conversations, self.sources))

    def fingerprint(self) -> str:
        """Fingerprint of all tokens and answers that are trained on, in order."""
        digest = hashlib.sha256()
        for source in self.sources:
            digest.update(np.int64(len(source)).tobytes())
            for example in source:
                for said in (None, *example.conversations):
                    tokens = example.context if said is None else said.tokens
                    digest.update(np.int64(len(tokens)).tobytes() + tokens.tobytes())
                    digest.update(b"" if said is None else said.answers.tobytes())
        return digest.hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """The counts, in JSON types."""
        return {
            "contexts": self.contexts,
            "conversations": self.conversations,
            "held_out_contexts": len(self.held_out),
            "skipped": self.skipped.to_dict(),
            "shortened": self.shortened.to_dict(),
        }


def load_tuning_data(
    config: InstructionDataConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    window: int,
    held_out: int,
    seed: int = 0,
    progress: bool = True,
    clock: datetime | None = None,
) -> TuningData:
    """Read and tokenise all sources.

    Args:
        config: what to read.
        tokenizer: of the base model.
        vocabulary: rows of the base model's embedding.
        window: longest conversation, in tokens.
        held_out: number of contexts to hold out.
        seed: of the grouping of task items.
        progress: show bars.
        clock: see `ChatEncoder`.

    Raises:
        InputError: a source has no usable record or not enough of them, or its tokens are not in the vocabulary.
    """
    skipped, shortened = BadRecords(config.strict), BadRecords()
    refusals: list[str] = []
    limits = TokenLimits(config.context_tokens, window)
    given: dict[str, Any] = {}

    def read(name: str, source: InstructionSource) -> list[EncodedRecord]:
        bad = BadRecords(config.strict)
        records = read_source(source, bad, seed)
        examples = encode_records(records, tokenizer, limits, bad, shortened, name, progress, clock)
        if not examples:
            reasons = f": {bad}" if bad.total else ""
            raise InputError(f"data: {source.path} has no context with a conversation within the limits{reasons}")
        if not config.allow_skipped:
            refusals.extend(_refusals(source.path, bad, _conversations(examples) / _conversations(records)))
        skipped.merge(bad)
        given[name] = source_given(source, records)
        for number, example in enumerate(examples, 1):
            for tokens in (example.context, *(said.tokens for said in example.conversations)):
                check_tokens(tokenizer, [int(tokens.max())], vocabulary, f"data: context {number} of {source.path}")
        return examples

    sources = {name: read(name, source) for name, source in config.all_sources().items()}
    kept: list[EncodedRecord] = []
    if config.held_out_path is not None:
        kept = read("held_out", InstructionSource(config.held_out_path))[:held_out]
    else:
        each = -(-held_out // len(sources))
        for name, source in config.all_sources().items():
            sources[name], rest = _split(sources[name], each, source.path)
            kept += rest
        kept = kept[:held_out]
    if len(kept) < 2:
        raise InputError(
            f"data.held_out_path must have at least 2 contexts, but {config.held_out_path} has {len(kept)}"
        )
    for name, source in config.all_sources().items():
        sources[name] = _without(kept, sources[name], name, source.path, skipped)
    weights = [source.weight for source in config.all_sources().values()]
    refusal = "; ".join(refusals) or None
    made_of = {
        "sources": given,
        "tokenizer": tokenizer_description(tokenizer)["fingerprint"],
        "chat template": hashlib.sha256(template_of(tokenizer).encode()).hexdigest()[:32],
        "clock": clock and clock.isoformat(),
        "data.context_tokens": config.context_tokens,
        "tokens of a conversation": window,
        "evaluation.contexts": held_out,
    }
    return TuningData(list(sources.values()), weights, kept, skipped, shortened, refusal, made_of)


def _conversations(items: Sequence[ContextRecord] | Sequence[EncodedRecord]) -> int:
    return sum(len(item.conversations) for item in items)


def _refusals(path: str, bad: BadRecords, encoded: float) -> Iterator[str]:
    """Messages that say that too much of a source was lost; none if it was not.

    Args:
        path: path of the source.
        bad: what was left out.
        encoded: the share of what was read that is within the limits.
    """
    lost = 1 - (1 - bad.share) * encoded
    broken = any(kind in bad.counts for kind in FILE_FAULTS)
    if broken or lost > MOST_LOST:
        what = f"{path} can't be read to its end" if broken else f"{lost:.1%} of the rows of {path} can't be used"
        yield f"{what}: {bad}. With --allow-skipped (data.allow_skipped) a run trains on the rest"


def _split(examples: list[EncodedRecord], held_out: int, path: str) -> tuple[list[EncodedRecord], list[EncodedRecord]]:
    if len(examples) <= held_out:
        raise InputError(
            f"data: {path} has {len(examples)} contexts, and {held_out} of them are held out: more data, a smaller "
            "evaluation.contexts or a data.held_out_path is needed"
        )
    return examples[:-held_out], examples[-held_out:]


def _without(
    held_out: Sequence[EncodedRecord], examples: Sequence[EncodedRecord], name: str, path: str, skipped: BadRecords
) -> list[EncodedRecord]:
    """The examples whose context is not held out, be it from another source or from separate data."""
    contexts = {example.context.tobytes() for example in held_out}
    left = [example for example in examples if example.context.tobytes() not in contexts]
    for _ in range(len(examples) - len(left)):
        skipped.add("context that is held out", name)
    if not left:
        raise InputError(f"data: {path} has no context that is not held out: {skipped}")
    return left
