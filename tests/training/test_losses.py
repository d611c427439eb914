"""The losses of a pretraining step equal those of the base model, window by window, with adapters merged by hand."""

import pytest
import torch
import torch.nn.functional as F
from tiny import make_model, plain_copy, random_ids
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from gakernels import AdapterGenerator, GenerativeAdapter
from gakernels.model.window_losses import (
    RECONSTRUCTIONS,
    WindowBatch,
    pretraining_windows,
    token_losses,
    window_losses,
)
from gakernels.model.windows import pad_windows

LENGTH = 5


def make_windows(reconstruction: str, chunks: int = 3, rows: int = 2) -> WindowBatch:
    random = torch.Generator().manual_seed(int(torch.randint(10**6, ())))
    return pretraining_windows(random_ids(rows, chunks * LENGTH), chunks, random, reconstruction)


def double_model(**settings: object) -> GenerativeAdapter:
    return make_model(base_dtype=torch.float64, dtype=torch.float64, chunk_size=LENGTH, **settings)


def merged_loss(model: GenerativeAdapter, context: list[list[int]], window: Tensor) -> float:
    """Transformers' own loss of a window, on a plain model with the adapter of the chunks merged in."""
    base = plain_copy(model)
    if context:
        stream = model.stream()
        for chunk in context:
            stream.append(chunk)
        adapter = stream.adapter()
        for name in adapter.lora_a:
            base.get_submodule(name).weight += adapter.delta(name)
    with torch.no_grad():
        logits = base(input_ids=window[None], use_cache=False).logits[0]
    return float(F.cross_entropy(logits[:-1], window[1:], reduction="sum"))


@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
def test_they_equal_the_merged_model_window_by_window(reconstruction: str) -> None:
    model, batch = double_model(), make_windows(reconstruction)
    expected = {"completion": 0.0, "reconstruction": 0.0}
    for row in batch.input_ids:
        chunks = row[:3].tolist()
        for number in (1, 2):
            expected["completion"] += merged_loss(model, chunks[:number], row[number])
        for number in range(3):
            after = 3 if reconstruction == "final" else number + 1
            expected["reconstruction"] += merged_loss(model, chunks[:after], row[3 + number])
    losses = window_losses(model, batch)
    assert set(losses) == set(expected)
    for name, count in (("completion", 2 * 2 * (LENGTH - 1)), ("reconstruction", 2 * 3 * (LENGTH - 1))):
        assert losses[name].tokens == count
        assert losses[name].total.item() == pytest.approx(expected[name], rel=1e-9)
        assert losses[name].mean.item() == pytest.approx(expected[name] / count, rel=1e-9)


def test_the_adapters_matter() -> None:
    model, batch = double_model(), make_windows("copy")
    plain = sum(merged_loss(model, [], row[number]) for row in batch.input_ids for number in (3, 4, 5))
    assert window_losses(model, batch)["reconstruction"].total.item() != pytest.approx(plain, rel=1e-4)


def double_norm(self: LlamaRMSNorm, hidden: Tensor) -> Tensor:
    return F.rms_norm(hidden, self.weight.shape, self.weight, self.variance_epsilon)


def test_gradients_equal_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaRMSNorm, "forward", double_norm)  # transformers' own rounds to float32
    model, batch = double_model(damping=0.1), make_windows("random_slice")

    def total() -> Tensor:
        losses = window_losses(model, batch)
        return losses["completion"].mean + losses["reconstruction"].mean

    total().backward()
    step = 1e-6
    for name, parameter in model.generators.named_parameters():
        assert parameter.grad is not None
        direction = torch.randn_like(parameter)
        direction /= direction.norm()
        with torch.no_grad():
            parameter += step * direction
            above = total()
            parameter -= 2 * step * direction
            below = total()
            parameter += step * direction
        difference = float((above - below) / (2 * step))
        # Rounding costs 1e-15 / step; what the third derivative costs is about step^2 / tau^2, with tau = 0.1.
        assert float((parameter.grad * direction).sum()) == pytest.approx(difference, rel=1e-5, abs=1e-8), name
    assert all(parameter.grad is None for parameter in model.base.parameters())


@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
def test_only_as_many_adapters_are_formed_as_there_are_prefixes(
    monkeypatch: pytest.MonkeyPatch, reconstruction: str
) -> None:
    model, formed = make_model(chunk_size=LENGTH), []
    plain = AdapterGenerator.factors

    def spy(self: AdapterGenerator, states: Tensor) -> tuple[Tensor, Tensor]:
        formed.append(tuple(states.shape[:-2]))
        return plain(self, states)

    monkeypatch.setattr(AdapterGenerator, "factors", spy)
    batch = make_windows(reconstruction, chunks=8)
    assert batch.input_ids.shape[1] == 16
    window_losses(model, batch)
    assert formed == [(2, 8)] * len(model.adapted_names)


def test_padding_counts_in_no_loss() -> None:
    model = double_model()
    tokens = [random_ids(length).tolist() for length in (5, 2, 4, 1)]
    ids, mask = pad_windows([[window] for window in tokens], pad=7)
    target = mask.clone()
    target[..., 0] = False
    with torch.no_grad():
        hidden = model.base.get_decoder()(input_ids=ids[:, 0], use_cache=False).last_hidden_state[:, None]
        losses = token_losses(model, hidden, ids, {"all": target, "none": torch.zeros_like(mask)})
    expected = sum(merged_loss(model, [], torch.tensor(window)) for window in tokens if len(window) > 1)
    assert float(losses["all"].total) == pytest.approx(expected, rel=1e-9)
    assert losses["all"].tokens == 4 + 1 + 3
    assert losses["none"].tokens == 0
    assert float(losses["none"].mean) == 0


def test_logits_are_formed_only_for_what_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make_model(chunk_size=LENGTH), make_windows("copy")
    shapes = []
    plain = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: shapes.append(hidden.shape) or plain(hidden))
    window_losses(model, batch)
    assert shapes == [(2 * (2 + 3) * (LENGTH - 1), 32)]


def test_a_single_chunk_has_a_reconstruction_loss_only() -> None:
    model = double_model()
    losses = window_losses(model, make_windows("random_slice", chunks=1))
    assert losses["completion"].tokens == 0
    assert losses["completion"].mean.item() == 0
    losses["reconstruction"].mean.backward()
    assert model.generator(model.adapted_names[0]).output_map.grad.abs().max() > 0
