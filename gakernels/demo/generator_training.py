"""Training the demo's generator: documents about invented people, with questions, in windows with adapters."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from transformers import PreTrainedTokenizerBase

from gakernels.data.people import Document, draw_document
from gakernels.model import GenerativeAdapter
from gakernels.model.window_losses import Loss, WindowBatch, window_losses
from gakernels.model.windows import pad_windows, split_evenly

MOST_FACTS = 18


@dataclass(frozen=True)
class GeneratorRecipe:
    """Shape and training of the generator.

    Attributes:
        steps: optimizer steps.
        documents: documents in a step.
        loss_weights: of the answers, and of the paper's two objectives, which keep the language model intact.
        growth: share of the steps over which documents grow from 3 facts to 18.
    """

    state_size: int = 128
    rank: int = 32
    steps: int = 800
    documents: int = 4
    learning_rate: float = 3e-3
    loss_weights: tuple[tuple[str, float], ...] = (("answers", 1.0), ("reconstruction", 0.5), ("completion", 0.3))
    growth: float = 0.4
    seed: int = 0


def generator_losses(model: GenerativeAdapter, recipe: GeneratorRecipe, step: int) -> dict[str, Loss]:
    """The losses of a training step; they depend only on the recipe and the step."""
    rng = Random(recipe.seed * 1_000_003 + step)
    assert model.tokenizer is not None
    documents = [_draw(rng, recipe, step / recipe.steps) for _ in range(recipe.documents)]
    return window_losses(model, document_windows(documents, model.tokenizer, model.config.chunk_size, rng))


def _draw(rng: Random, recipe: GeneratorRecipe, progress: float) -> Document:
    """A document about people of the training split."""
    facts = 3 + round((MOST_FACTS - 3) * min(1.0, progress / recipe.growth))
    return draw_document(rng, 1, (max(2, facts * 2 // 3), facts), "train")


def document_windows(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    chunk_size: int,
    rng: Random,
    questions: int = 16,
    questions_per_window: int = 8,
) -> WindowBatch:
    """Windows of B documents: T context chunks, T copies of them to reconstruct, and windows full of questions.

    Chunk t is read with the adapter of the chunks before it, copies and questions with that of the whole document.
    Losses: `completion` on the chunks but the first, `reconstruction` on the copies, `answers` on the answers alone.
    """
    contexts = [split_evenly(tokenizer(document.text())["input_ids"], chunk_size) for document in documents]
    chunks = max(len(context) for context in contexts)
    rows: list[list[list[int]]] = []
    answers: list[list[list[int]]] = []
    for document, context in zip(documents, contexts, strict=True):
        padded = [*context, *[[] for _ in range(chunks - len(context))]]
        asked, places = _question_windows(document, tokenizer, rng, questions, questions_per_window)
        rows.append([*padded, *padded, *asked])
        answers.append(places)
    input_ids, mask = pad_windows(rows, pad=0)
    targets = {name: torch.zeros_like(mask) for name in ("answers", "reconstruction", "completion")}
    targets["completion"][:, 1:chunks] = mask[:, 1:chunks]
    targets["reconstruction"][:, chunks : 2 * chunks] = mask[:, chunks : 2 * chunks]
    for row, of_windows in enumerate(answers):
        for number, of_window in enumerate(of_windows):
            targets["answers"][row, 2 * chunks + number, of_window] = True
    count = input_ids.shape[1] - 2 * chunks
    seen = (*range(chunks), *[chunks] * (chunks + count))
    return WindowBatch(input_ids, mask, chunks, seen, targets)


def _question_windows(
    document: Document, tokenizer: PreTrainedTokenizerBase, rng: Random, questions: int, per_window: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Windows of questions with their answers, and the positions of the answers in each."""
    pairs = document.questions()
    asked = rng.sample(pairs, questions) if len(pairs) >= questions else rng.choices(pairs, k=questions)
    (full_stop,) = tokenizer(".", add_special_tokens=False)["input_ids"]
    windows: list[list[int]] = []
    places: list[list[int]] = []
    for start in range(0, questions, per_window):
        tokens: list[int] = [tokenizer.bos_token_id]
        answers_here: list[int] = []
        for prompt, answer in asked[start : start + per_window]:
            tokens += tokenizer(prompt, add_special_tokens=False)["input_ids"]
            words = tokenizer(answer, add_special_tokens=False)["input_ids"]
            answers_here += range(len(tokens), len(tokens) + len(words))
            tokens += [*words, full_stop]
        windows.append(tokens)
        places.append(answers_here)
    return windows, places
