"""The control: a plain LoRA, trained and scored on the same windows."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import logits_of, make_model, plain_copy, random_ids
from torch import nn

from gakernels import GenerativeAdapter
from gakernels.model.static_lora import StaticLora
from gakernels.model.window_losses import WindowBatch, pretraining_windows
from gakernels.training.trainer import Trainer, TrainerConfig


def double_model(**settings: object) -> GenerativeAdapter:
    return make_model(base_dtype=torch.float64, dtype=torch.float64, chunk_size=5, **settings)


def make_windows() -> WindowBatch:
    return pretraining_windows(random_ids(2, 15), 3, torch.Generator().manual_seed(int(torch.randint(10**6, ()))))


def trained(lora: StaticLora) -> StaticLora:
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.normal_(std=0.3)
    return lora.double()


def test_it_starts_as_the_base_model() -> None:
    model, ids = make_model(), random_ids(3, 8)
    plain = logits_of(model.base, ids)
    with model.using(StaticLora(model).factors()):
        assert logits_of(model.base, ids).equal(plain)


@pytest.mark.parametrize(("norm", "rank"), [("polar", 4), ("frobenius", 16)])
def test_it_has_the_shape_of_a_generated_adapter(norm: str, rank: int) -> None:
    model = make_model(norm=norm)
    adapter, factors = model.adapt([random_ids(9).tolist()])[0], StaticLora(model).factors()
    assert adapter.rank == rank
    assert factors.keys() == adapter.lora_a.keys()
    for name, pair in factors.items():
        assert pair.lora_a.shape == (1, *adapter.lora_a[name].shape)
        assert pair.lora_b.shape == (1, *adapter.lora_b[name].shape)
        assert pair.scale == adapter.scale


def test_its_losses_equal_those_of_merged_weights() -> None:
    model, batch = double_model(), make_windows()
    lora, merged = trained(StaticLora(model)), plain_copy(model)
    for name, pair in lora.factors().items():
        merged.get_submodule(name).weight += pair.scale * (pair.lora_b[0] @ pair.lora_a[0]).detach()
    logits = logits_of(merged, batch.input_ids.flatten(0, 1)).unflatten(0, batch.input_ids.shape[:2])
    losses = lora.window_losses(model, batch)
    for name, windows in (("completion", slice(1, 3)), ("reconstruction", slice(3, 6))):
        found, ids = logits[:, windows, :-1], batch.input_ids[:, windows, 1:]
        expected = F.cross_entropy(found.flatten(0, 2), ids.flatten(), reduction="sum")
        assert losses[name].tokens == ids.numel()
        assert losses[name].total.item() == pytest.approx(expected.item(), rel=1e-9)


def test_training_it_equals_training_plain_factors(tmp_path: Path) -> None:
    """Against factors multiplied into the weights through `functional_call`, without this library's layers."""
    model = make_model(chunk_size=5)
    lora, batches = StaticLora(model), [make_windows() for _ in range(4)]
    start = {name: value.detach().clone().requires_grad_() for name, value in lora.named_parameters()}
    config = TrainerConfig(steps=4, learning_rate=0.01, warmup_steps=0, clip=1e9, weight_decay=0.1)
    Trainer(
        config, dict(lora.named_parameters()), lambda step: lora.window_losses(model, batches[step]), progress=False
    ).run()
    base = plain_copy(model)
    optimizer = torch.optim.AdamW(start.values(), weight_decay=0.1)
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 0.01 * (4 - step) / 4
        optimizer.zero_grad()
        plain_loss(base, start, batch, model.config.adapter_scale).backward()
        optimizer.step()
    for name, value in lora.named_parameters():
        # At most 0.01 a step; rounding noise may turn the sign of a gradient that is nearly zero.
        assert (value - start[name]).abs().mean() < 1e-4
        assert (value - start[name]).abs().max() < 5e-3
        assert value.abs().max() > 5e-3


def plain_loss(base: nn.Module, factors: dict[str, torch.Tensor], batch: WindowBatch, scale: float) -> torch.Tensor:
    weights = {}
    for key in (name.removeprefix("lora_a.") for name in factors if name.startswith("lora_a.")):
        name = key.replace("/", ".") + ".weight"
        weights[name] = base.get_parameter(name) + scale * factors[f"lora_b.{key}"] @ factors[f"lora_a.{key}"]
    output = torch.func.functional_call(base, weights, kwargs={"input_ids": batch.input_ids.flatten(0, 1)})
    logits = output.logits.unflatten(0, batch.input_ids.shape[:2])
    losses = [
        F.cross_entropy(logits[:, windows, :-1].flatten(0, 2), batch.input_ids[:, windows, 1:].flatten())
        for windows in (slice(1, 3), slice(3, 6))
    ]
    return sum(losses)
