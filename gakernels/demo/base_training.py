"""Training the demo's base model: a small Llama that learns to read documents about people it has never seen.

Each step has rows of one kind: documents with questions, with more facts as training proceeds, or pieces of documents
and lists of questions, as in the windows of a generator.
"""

from dataclasses import dataclass, field
from random import Random

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gakernels.data.people import Document, draw_document
from gakernels.model.window_losses import Loss

MOST_FACTS = 18


@dataclass
class Row:
    """Token ids, and the loss in which each counts."""

    tokens: list[int]
    answers: list[int] = field(default_factory=list)
    unpredictable: list[int] = field(default_factory=list)

    def add(self, tokens: list[int]) -> None:
        """Append text."""
        self.tokens += tokens

    def add_answer(self, tokens: list[int], known: bool = True) -> None:
        """Append an answer; if the row doesn't contain the fact, nothing is learned from it."""
        places = range(len(self.tokens), len(self.tokens) + len(tokens))
        (self.answers if known else self.unpredictable).extend(places)
        self.tokens += tokens


@dataclass(frozen=True)
class BaseRecipe:
    """Shape and training of the base model.

    Attributes:
        steps: optimizer steps.
        tokens_per_step: rows are drawn until they have about so many tokens.
        growth: shares of the steps at which documents begin to grow from 3 facts, and reach 18.
    """

    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    head_size: int = 64
    ffn_size: int = 384
    steps: int = 800
    tokens_per_step: int = 2500
    learning_rate: float = 3e-3
    growth: tuple[float, float] = (0.12, 0.5)
    seed: int = 0


def build_base(recipe: BaseRecipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model. Tied embeddings start at 1/sqrt(d): smaller ones keep words of the same kind alike."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.ffn_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        head_dim=recipe.head_size,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=recipe.hidden_size**-0.5)
    return model


def base_losses(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: BaseRecipe, step: int
) -> dict[str, Loss]:
    """Losses of one step: `language` on running text, `answers` on the facts that the row tells."""
    rng = Random(recipe.seed * 1_000_003 + step)
    tokens, places = _batch(_draw_rows(tokenizer, recipe, step / recipe.steps, rng), tokenizer.pad_token_id)
    hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
    chosen = (places != 0)[:, 1:]
    losses = F.cross_entropy(model.lm_head(hidden[chosen]), tokens[:, 1:][chosen], reduction="none")
    kinds = places[:, 1:][chosen]
    return {
        name: Loss((losses * (kinds == kind)).sum(), (kinds == kind).sum())
        for name, kind in (("language", 1), ("answers", 2))
    }


def _draw_rows(tokenizer: PreTrainedTokenizerFast, recipe: BaseRecipe, progress: float, rng: Random) -> list[Row]:
    facts = _facts_at(progress, recipe)
    kind = rng.random()
    rows: list[Row] = []
    length = 0
    while length < recipe.tokens_per_step:
        if kind < 0.08:
            rows.append(_window_row(tokenizer, rng, facts))
        else:
            rows.append(_document_row(tokenizer, draw_document(rng, 1, (max(2, facts * 2 // 3), facts)), rng))
        length += len(rows[-1].tokens)
    return rows


def _facts_at(progress: float, recipe: BaseRecipe) -> int:
    start, end = recipe.growth
    return 3 + round((MOST_FACTS - 3) * min(1.0, max(0.0, (progress - start) / (end - start))))


def _document_row(tokenizer: PreTrainedTokenizerFast, document: Document, rng: Random) -> Row:
    """A document, then questions about it in any order, some of them repeated as statements."""
    row = Row(list(tokenizer(document.text())["input_ids"]))
    facts = list(document.facts)
    rng.shuffle(facts)
    for fact in (facts * 3)[:9]:
        again = rng.random() < 0.2
        row.add(_ids(tokenizer, fact.statement().removesuffix(f"{fact.value}.") if again else fact.question()))
        row.add_answer(_ids(tokenizer, fact.value))
        row.add(_ids(tokenizer, "."))
    return row


def _window_row(tokenizer: PreTrainedTokenizerFast, rng: Random, facts: int) -> Row:
    """A piece of a document, which may begin anywhere, or questions that no text answers."""
    document = draw_document(rng, 1, (facts, facts), "train")
    if rng.random() < 0.5:
        tokens = list(tokenizer(document.text())["input_ids"])
        start = rng.choice((0, rng.randrange(len(tokens) // 2)))
        return Row(tokens[start : start + 128])
    row = Row([tokenizer.bos_token_id])
    for prompt, value in document.questions()[:8]:
        row.add(_ids(tokenizer, prompt))
        row.add_answer(_ids(tokenizer, value), known=False)
        row.add(_ids(tokenizer, "."))
    return row


def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _batch(rows: list[Row], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and, of the same shape, the kind of each token: 0 nothing, 1 language, 2 answer."""
    length = max(len(row.tokens) for row in rows)
    tokens = torch.full((len(rows), length), pad)
    places = torch.zeros((len(rows), length), dtype=torch.long)
    for number, row in enumerate(rows):
        tokens[number, : len(row.tokens)] = torch.tensor(row.tokens)
        places[number, : len(row.tokens)] = 1
        places[number, row.answers] = 2
        places[number, row.unpredictable] = 0
    return tokens, places
