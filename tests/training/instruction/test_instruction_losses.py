"""Losses of conversations under the adapters of their contexts, against one at a time and against plain windows."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from drawn_examples import drawn_example
from tiny import make_model

from gakernels import GenerativeAdapter
from gakernels.data.chat import EncodedRecord
from gakernels.model.window_losses import Loss, WindowBatch, window_losses
from gakernels.model.windows import pad_windows, split_evenly
from gakernels.training.instruction.answers import can_pack, conversation_losses, instruction_losses
from gakernels.training.instruction.batches import InstructionBatch, count_answers, instruction_batch
from gakernels.training.instruction.packing import Rounding

CHUNK = 6


def double_model(family: str = "llama", **settings: object) -> GenerativeAdapter:
    return make_model(family, torch.float64, torch.float64, chunk_size=CHUNK, **settings)


def drawn_examples() -> list[EncodedRecord]:
    """Contexts of one to four chunks, with one to five conversations each, but the last one."""
    lengths = [int(torch.randint(1 + CHUNK * number, CHUNK * (number + 1), ())) for number in (0, 2, 1, 3)]
    examples = [drawn_example(length, int(torch.randint(1, 6, ()))) for length in lengths]
    return [*examples, drawn_example(9, 8)]  # of eight short conversations some always share a window


def batch_of(examples: list[EncodedRecord], window: int | None = 20, **losses: Any) -> InstructionBatch:
    contexts = [example.context.tolist() for example in examples]
    return instruction_batch(contexts, [example.conversations for example in examples], CHUNK, window, **losses)


def merged_loss(model: GenerativeAdapter, context: list[int], tokens: list[int], counted: list[bool]) -> float:
    """The loss of some tokens with the adapter of a context merged into the weights."""
    (adapter,) = model.adapt([context])
    model.merge(adapter)
    try:
        with torch.no_grad():
            logits = model.base(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    finally:
        model.unmerge()
    losses = F.cross_entropy(logits[:-1], torch.tensor(tokens[1:]), reduction="none")
    return float(losses[torch.tensor(counted[1:])].sum())


@pytest.mark.parametrize(
    ("family", "window"),
    [("llama", None), *((name, 20) for name in ("llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt_neox", "phi3"))],
)
def test_answers_are_scored_as_one_at_a_time_with_a_merged_adapter(family: str, window: int | None) -> None:
    model = double_model(family)
    examples = drawn_examples()
    batch = batch_of(examples, window)
    with torch.no_grad():
        loss = instruction_losses(model, batch)["answers"]
    expected = sum(
        merged_loss(model, example.context.tolist(), said.tokens.tolist(), said.answers.tolist())
        for example in examples
        for said in example.conversations
    )
    tolerance = 1e-6 if family == "gemma2" else 1e-9  # whose attention takes its softmax in float32
    assert float(loss.total) == pytest.approx(expected, rel=tolerance)
    assert loss.tokens == sum(int(said.answers.sum()) for example in examples for said in example.conversations)
    assert (batch.positions is None) == (window is None)


def test_several_conversations_share_a_window() -> None:
    batch = batch_of([drawn_example(9, 8), drawn_example(9, 8)])
    assert len(batch.owner) < 16
    assert batch.owner.tolist() == sorted(batch.owner.tolist())


def test_attention_that_can_not_keep_conversations_apart_is_known() -> None:
    model = double_model()
    assert can_pack(model)
    model.base.config._attn_implementation = "flash_attention_2"
    assert not can_pack(model)


def as_windows(examples: list[EncodedRecord]) -> WindowBatch:
    """The same in windows of equal length, each conversation in one of its own: the definition, with much padding."""
    rows = [split_evenly(example.context.tolist(), CHUNK) for example in examples]
    chunks, most = max(map(len, rows)), max(len(example.conversations) for example in examples)
    windows, answers = [], []
    for row, example in zip(rows, examples, strict=True):
        said = [conversation.tokens.tolist() for conversation in example.conversations]
        windows.append([*row, *[[]] * (chunks - len(row)), *said, *[[]] * (most - len(said))])
        flags = [conversation.answers.tolist() for conversation in example.conversations]
        answers.append([*[[]] * chunks, *flags, *[[]] * (most - len(said))])
    ids, mask = pad_windows(windows, pad=0)
    target = torch.zeros_like(mask)
    for r, row in enumerate(answers):
        for w, flags in enumerate(row):
            target[r, w, : len(flags)] = torch.tensor(flags, dtype=torch.bool)
    return WindowBatch(ids, mask, chunks, (*range(chunks), *[chunks] * most), {"answers": target})


@pytest.mark.parametrize("settings", [{}, {"static_rank": 2}])
def test_losses_and_gradients_are_those_of_plain_windows(settings: dict[str, int]) -> None:
    model = double_model(**settings)
    with torch.no_grad():
        for parameter in model.generators.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    examples = drawn_examples()
    ours, plain = instruction_losses(model, batch_of(examples)), window_losses(model, as_windows(examples))
    assert ours["answers"].total.item() == pytest.approx(plain["answers"].total.item(), rel=1e-10)
    parameters = dict(model.generators.named_parameters())
    gradients = [torch.autograd.grad(loss["answers"].total, parameters.values()) for loss in (ours, plain)]
    for name, mine, expected in zip(parameters, *gradients, strict=True):
        assert (mine - expected).norm() <= 1e-8 * expected.norm() + 1e-12, name
        assert expected.norm() > 0


@pytest.mark.parametrize("window", [20, None])
@pytest.mark.parametrize("settings", [{}, {"static_rank": 2, "token_weights": True}])
def test_losses_and_gradients_of_rounded_batches_are_the_same(settings: dict[str, int], window: int | None) -> None:
    model = double_model(**settings)
    with torch.no_grad():
        for parameter in model.generators.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    examples = drawn_examples()[1:]  # of three, two and four chunks, the last of two
    examples = [*examples[:2], drawn_example(5 * CHUNK - 1, 3), examples[-1]]
    repeated = [int(torch.randint(2, ())) for _ in examples]
    batches = [
        batch_of(examples, window, repeated=repeated, completion=True, rounding=rounding)
        for rounding in (None, Rounding(CHUNK, 7, 9))
    ]
    plain, rounded = batches
    assert (plain.context.chunks, rounded.context.chunks) == (5, 6)
    assert len(rounded.owner) % 4 == 0
    assert rounded.size > plain.size
    assert rounded.tokens == plain.tokens
    losses = [instruction_losses(model, batch) for batch in batches]
    parameters = dict(model.generators.named_parameters())
    for name in ("answers", "reconstruction", "completion"):
        ours, expected = losses[1][name], losses[0][name]
        assert ours.tokens == expected.tokens > 0
        assert ours.total.item() == pytest.approx(expected.total.item(), rel=1e-12)
        pair = [torch.autograd.grad(of[name].total, parameters.values(), retain_graph=True) for of in losses]
        for parameter, whole, padded in zip(parameters, *pair, strict=True):
            assert (padded - whole).norm() <= 1e-9 * whole.norm() + 1e-13, (name, parameter)
    assert all(gradient.norm() > 0 for gradient in pair[0])


def test_a_context_can_also_be_reconstructed_and_completed() -> None:
    model = double_model()
    examples = drawn_examples()
    rows = [split_evenly(example.context.tolist(), CHUNK) for example in examples]
    repeated = [int(torch.randint(len(row), ())) for row in rows]
    batch = batch_of(examples, repeated=repeated, completion=True)
    with torch.no_grad():
        losses = instruction_losses(model, batch)
    expected = {"reconstruction": 0.0, "completion": 0.0}
    for row, number in zip(rows, repeated, strict=True):
        whole = [token for chunk in row for token in chunk]
        # Adapters of the same chunks, whatever even cutting would make of fewer tokens.
        expected["reconstruction"] += scored(model, row, len(row), row[number])
        expected["completion"] += sum(scored(model, row, t, row[t]) for t in range(1, len(row)))
        assert sum(map(len, row)) == len(whole)
    for name, value in expected.items():
        assert float(losses[name].total) == pytest.approx(value, rel=1e-9)
        assert losses[name].tokens == count_answers(batch)[name]
    assert losses["reconstruction"].tokens == sum(len(row[n]) - 1 for row, n in zip(rows, repeated, strict=True))
    assert losses["completion"].tokens == sum(len(chunk) - 1 for row in rows for chunk in row[1:])


def scored(model: GenerativeAdapter, chunks: list[list[int]], seen: int, tokens: list[int]) -> float:
    """The loss of all tokens of a window under the adapter of the first chunks, which are read one after the other."""
    stream = model.stream()
    for chunk in chunks[:seen]:
        stream.append(chunk)
    model.merge(stream.adapter())
    try:
        with torch.no_grad():
            logits = model.base(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    finally:
        model.unmerge()
    return float(F.cross_entropy(logits[:-1], torch.tensor(tokens[1:], dtype=torch.int64), reduction="sum"))


def test_losses_have_the_same_names_in_every_batch() -> None:
    short = batch_of([drawn_example(3, 1)], repeated=[0], completion=True)
    assert set(count_answers(short)) == {"answers", "reconstruction", "completion"}
    assert count_answers(short)["completion"] == 0
    losses = instruction_losses(double_model(), short)
    assert losses["completion"].tokens == 0
    assert losses["completion"].total.item() == 0
    assert set(count_answers(batch_of([drawn_example(3, 1)]))) == {"answers"}


def test_padding_counts_nowhere_and_the_base_model_is_scored_without_adapters() -> None:
    model = double_model()
    examples = drawn_examples()
    batch = batch_of(examples)
    with torch.no_grad():
        bare: Loss = conversation_losses(model, batch, {})["answers"]
        for part in (batch, batch.context):
            part.input_ids[~part.mask] = 7
        again = conversation_losses(model, batch, {})["answers"]
        expected = 0.0
        for example in examples:
            for said in example.conversations:
                logits = model.base(input_ids=torch.tensor([said.tokens.tolist()]), use_cache=False).logits[0]
                losses = F.cross_entropy(logits[:-1], torch.tensor(said.tokens[1:].tolist()), reduction="none")
                expected += float(losses[torch.tensor(said.answers[1:])].sum())
    assert float(bare.total) == pytest.approx(expected, rel=1e-9)
    assert torch.equal(bare.total, again.total)
