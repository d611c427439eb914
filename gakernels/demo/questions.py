"""Asking questions in batches, and counting right answers."""

from collections.abc import Sequence

from gakernels.adapters.adapter import Adapter
from gakernels.model import GenerativeAdapter


def answer(
    model: GenerativeAdapter,
    prompts: Sequence[str],
    adapters: Sequence[Adapter] | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 4,
) -> list[str]:
    """The greedy answers to prompts, up to the first full stop.

    Args:
        model: the base model with its generators.
        prompts: texts that end where the answer begins.
        adapters: one for each prompt; None for the base model alone.
        batch_size: prompts answered together.
        max_new_tokens: longest answer.
    """
    texts: list[str] = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        if adapters is None:
            texts += model.generate(prompts[part], max_new_tokens=max_new_tokens)
        else:
            with model.adapted(adapters[part]):
                texts += model.generate(prompts[part], max_new_tokens=max_new_tokens)
    return [text.split(".")[0].strip() for text in texts]


def accuracy(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Share of answers that are exactly as expected."""
    return sum(given == right for given, right in zip(answers, expected, strict=True)) / len(expected)
