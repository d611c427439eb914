"""Context distillation against its definition: full distributions in float64, the base model run on each prompt."""

from dataclasses import replace

import pytest
import torch
from tiny import VOCABULARY, make_model, plain_copy, random_context, random_ids
from torch import Generator, Tensor

from gakernels import GenerativeAdapter, InputError
from gakernels.model.divergence import divergence
from gakernels.model.window_losses import WindowBatch, count_targets, pretraining_windows, window_losses
from gakernels.model.windows import pad_windows
from gakernels.nn import token_loss
from gakernels.training import distillation as module
from gakernels.training.distillation import Distillation, teacher_states

LENGTH = 5


def double_model(**settings: object) -> GenerativeAdapter:
    return make_model(base_dtype=torch.float64, dtype=torch.float64, chunk_size=LENGTH, **settings)


def pretraining_batch(rows: int = 2, chunks: int = 3) -> WindowBatch:
    random = torch.Generator().manual_seed(int(torch.randint(10**6, ())))
    return pretraining_windows(random_ids(rows, chunks * LENGTH), chunks, random)


def conversation_batch() -> WindowBatch:
    """Two contexts of three padded chunks, two windows behind each that see all of it or a part, answers at the end."""
    rows = [[random_context(n) for n in lengths] for lengths in ([4, 5, 2, 5, 3], [5, 3, 3, 2, 4])]
    ids, mask = pad_windows(rows, pad=0)
    targets = torch.zeros_like(mask)
    targets[:, 3:, 2:] = mask[:, 3:, 2:]
    return WindowBatch(ids, mask, 3, (0, 1, 2, 3, 2), {"answers": targets})


def naive_divergence(student: Tensor, teacher: Tensor, top_k: int, temperature: float) -> Tensor:
    """Sums of probabilities, one row at a time."""
    losses = []
    for ours, theirs in zip(student, teacher, strict=True):
        p, q = (theirs / temperature).softmax(0), (ours / temperature).softmax(0)
        order = p.argsort(descending=True)
        outcomes = [[index] for index in order[:top_k].tolist()]
        if top_k < len(p):
            outcomes.append(order[top_k:].tolist())
        both = [(p[list(part)].sum(), q[list(part)].sum()) for part in outcomes]
        losses.append(temperature**2 * sum(one * (one / other).log() for one, other in both))
    return torch.stack(losses)


@pytest.mark.parametrize("top_k", [1, 3, 10, 11, 12, 1000])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_and_gradient(generator: Generator, top_k: int, temperature: float) -> None:
    student, teacher = (3 * torch.randn(7, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    ours = divergence(student, teacher, top_k, temperature)
    wanted = naive_divergence(student, teacher, top_k, temperature)
    torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-12)
    upstream = torch.randn(7, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(ours, student, upstream)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, student, upstream)[0], rtol=1e-9, atol=1e-12)
    assert torch.autograd.gradcheck(lambda s: divergence(s, teacher, top_k, temperature), student)


@pytest.mark.parametrize("top_k", [1, 4, 50])
def test_it_is_zero_for_equal_distributions_and_bounded_by_the_exact_one(generator: Generator, top_k: int) -> None:
    student, teacher = (torch.randn(20, 30, generator=generator, dtype=torch.float64) for _ in range(2))
    assert divergence(teacher + 3, teacher, top_k).abs().max() < 1e-14
    lumped, exact = (divergence(student, teacher, k) for k in (top_k, 30))
    assert (lumped > 0).all()
    assert (lumped <= exact + 1e-12).all()


def test_sure_distributions_stay_finite(generator: Generator) -> None:
    """The rest of the vocabulary has a probability that float32 does not hold."""
    student, teacher = (500 * torch.randn(20, 30, generator=generator) for _ in range(2))
    student.requires_grad_()
    loss = divergence(student, teacher, 3)
    assert loss.isfinite().all()
    assert torch.autograd.grad(loss.sum(), student)[0].isfinite().all()


def prompted(model: GenerativeAdapter, batch: WindowBatch, row: int, window: int) -> Tensor:
    """Logits (tokens, vocabulary) of a window's tokens by the plain base model behind the chunks that it has seen."""
    parts = [batch.input_ids[row, w][batch.mask[row, w]] for w in (*range(batch.seen[window]), window)]
    with torch.no_grad():
        logits = plain_copy(model)(input_ids=torch.cat(parts)[None], use_cache=False).logits[0]
    return logits[-len(parts[-1]) :]


def wanted_loss(model: GenerativeAdapter, batch: WindowBatch, distillation: Distillation, target: Tensor) -> Tensor:
    """The sum over all target tokens, differentiable in the generators' parameters."""
    hidden, _ = model(batch.input_ids, batch.mask, batch.chunks, batch.seen)
    total = hidden.new_zeros(())
    for row, window, token in target.nonzero().tolist():
        student = model.logits(hidden[row, window, token - 1])[None]
        teacher = prompted(model, batch, row, window)[None, token - 1]
        total = total + naive_divergence(student, teacher, distillation.top_k, distillation.temperature)[0]
    return total


@pytest.mark.parametrize("of", [("completion",), ("completion", "reconstruction"), ("answers",)])
@pytest.mark.parametrize(("top_k", "temperature"), [(6, 1.0), (VOCABULARY, 2.0)])
def test_a_batch_against_the_model_with_prompts(
    monkeypatch: pytest.MonkeyPatch, of: tuple[str, ...], top_k: int, temperature: float
) -> None:
    monkeypatch.setitem(token_loss.LOGITS_AT_ONCE, "cpu", 2 * 7 * VOCABULARY)  # in blocks
    monkeypatch.setattr(token_loss, "LEAST_TOKENS", 1)
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 3 * 16)
    model, distillation = double_model(), Distillation(of, top_k, temperature)
    plain = conversation_batch() if of == ("answers",) else pretraining_batch()
    batch = distillation.windows(plain)
    losses = distillation.losses(model, batch)
    target = torch.stack([plain.targets[name] for name in of]).any(0)
    wanted = wanted_loss(model, plain, distillation, target)
    ours = losses["distillation"]
    torch.testing.assert_close(ours.total, wanted, rtol=1e-9, atol=1e-9)
    assert ours.tokens == count_targets(batch)["distillation"] == target.sum()
    parameters = list(model.generators.parameters())
    gradients = torch.autograd.grad(ours.total, parameters)
    for mine, theirs in zip(gradients, torch.autograd.grad(wanted, parameters), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8 * float(theirs.abs().max()) + 1e-12)
    for name, loss in window_losses(model, plain).items():
        torch.testing.assert_close(losses[name].total, loss.total, rtol=1e-12, atol=1e-12)


def test_it_is_zero_where_nothing_has_been_seen() -> None:
    model, batch = double_model(), pretraining_batch()
    first = torch.zeros_like(batch.mask)
    first[:, 0, 1:] = True
    batch = Distillation(("first",)).windows(replace(batch, targets={"first": first}))
    loss = Distillation(("first",)).losses(model, batch)["distillation"]
    assert loss.tokens == 2 * (LENGTH - 1)
    assert abs(loss.total.item()) < 1e-12


def test_the_teacher_has_no_adapter_and_no_gradient() -> None:
    model, batch = double_model(static_rank=2), pretraining_batch()
    with torch.no_grad():
        for parameter in model.generators.parameters():
            parameter.add_(torch.randn_like(parameter))
    target = batch.targets["completion"]
    states = teacher_states(model, batch, target)
    assert not states.requires_grad
    wanted = [prompted(model, batch, row, window)[token - 1] for row, window, token in target.nonzero().tolist()]
    torch.testing.assert_close(model.logits(states), torch.stack(wanted), rtol=1e-9, atol=1e-9)


def test_no_target_at_all() -> None:
    model, batch = double_model(), pretraining_batch()
    nothing = replace(batch, targets={"none": torch.zeros_like(batch.mask)})
    loss = Distillation(("none",)).losses(model, Distillation(("none",)).windows(nothing))["distillation"]
    assert (loss.total, loss.tokens) == (0, 0)


def test_bad_input() -> None:
    for settings, message in (
        ({"of": ()}, "of must name"),
        ({"of": ("distillation",)}, "of must name"),
        ({"top_k": 0}, "top_k must be at least 1, but it is 0"),
        ({"temperature": 0.0}, "temperature must be finite and above 0"),
        ({"temperature": float("nan")}, "temperature must be finite and above 0"),
    ):
        with pytest.raises(InputError, match=message):
            Distillation(**settings)
    with pytest.raises(InputError, match="'answers', but there are reconstruction, completion"):
        Distillation(("answers",)).windows(pretraining_batch())
    model, batch = double_model(), Distillation().windows(pretraining_batch(chunks=30))
    with pytest.raises(InputError, match="up to 150 tokens in its prompt, but the base model reads 128"):
        Distillation().losses(model, batch)
