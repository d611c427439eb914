"""Compact adapters in 8 and 4 bits a number: the loss is what it says, and the file gives the same again."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import make_model, random_context

from gakernels import CompactAdapter, InputError
from gakernels.adapters.quantized_compact import QuantizedCompactAdapter


def make_compact(rows: int = 100, rank: int = 6, layers: int = 2) -> CompactAdapter:
    left, right = (
        {f"layer.{number}": torch.linalg.qr(torch.randn(rows, rank))[0] for number in range(layers)} for _ in range(2)
    )
    return CompactAdapter(left, right, "a base", "a generator", 17)


def product(compact: CompactAdapter, name: str) -> torch.Tensor:
    return compact.left[name].double() @ compact.right[name].double().mT


@pytest.mark.parametrize("rows", [100, 96, 7])
@pytest.mark.parametrize("bits", [8, 4])
def test_each_number_is_within_half_a_step_or_cut_at_the_highest_code(rows: int, bits: int) -> None:
    compact = make_compact(rows)
    quantized = QuantizedCompactAdapter.quantize(compact, bits)
    after = quantized.dequantize()
    highest = 2 ** (bits - 1) - 1
    for name, exact in compact.left.items():
        scales = quantized.scales[f"{name}.left"].float().repeat_interleave(32, 0)[:rows]
        error, inside = (after.left[name] - exact).abs(), exact.abs() <= highest * scales
        assert (error <= scales / 2 * (1 + 1e-3)).logical_or(~inside).all()
        cut = exact.sign() * highest * scales
        assert torch.where(inside, 0, after.left[name] - cut).abs().max() < 1e-6


@pytest.mark.parametrize(("bits", "least", "most"), [(8, 1e-4, 0.012), (4, 0.03, 0.2)])
def test_the_loss_is_that_of_the_norm_of_the_state(bits: int, least: float, most: float) -> None:
    compact = make_compact(256, 16)
    quantized = QuantizedCompactAdapter.quantize(compact, bits)
    after = quantized.dequantize()
    for name in compact.left:
        loss = float((product(after, name) - product(compact, name)).norm() / product(compact, name).norm())
        assert quantized.loss[name] == pytest.approx(loss, rel=1e-6)
        assert least < loss < most


def test_no_scale_that_is_tried_is_worse_than_the_largest_number() -> None:
    compact = make_compact(32, 40)
    quantized = QuantizedCompactAdapter.quantize(compact, 4)
    for name, exact in compact.right.items():
        scale = (exact.abs().amax(0) / 7).half().float()
        plain = (exact / scale).round().clamp(-7, 7) * scale
        error = (quantized.dequantize().right[name] - exact).square().sum(0)
        assert (error <= (plain - exact).square().sum(0) * (1 + 1e-4)).all()
        assert error.sum() < (plain - exact).square().sum()


@pytest.mark.parametrize(("bits", "bits_a_number"), [(8, 8.5), (4, 4.5)])
def test_the_size_is_as_promised(bits: int, bits_a_number: float) -> None:
    compact = make_compact(128, 6)
    assert QuantizedCompactAdapter.quantize(compact, bits).nbytes == compact.numbers() * bits_a_number / 8


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [100, 7])
def test_a_loaded_one_is_the_same(tmp_path: Path, bits: int, rows: int) -> None:
    quantized = QuantizedCompactAdapter.quantize(make_compact(rows), bits)
    quantized.save(tmp_path / "small.safetensors")
    loaded = QuantizedCompactAdapter.load(tmp_path / "small.safetensors")
    assert (loaded.bits, loaded.state_size, loaded.loss, loaded.tokens_seen) == (bits, rows, quantized.loss, 17)
    before, after = quantized.dequantize(), loaded.dequantize()
    assert before._description() == after._description() == make_compact()._description()
    assert all(torch.equal(before.left[name], after.left[name]) for name in before.left)
    assert all(torch.equal(before.right[name], after.right[name]) for name in before.left)


def test_quantising_again_changes_nothing_much() -> None:
    once = QuantizedCompactAdapter.quantize(make_compact(), 8).dequantize()
    twice = QuantizedCompactAdapter.quantize(once, 8).dequantize()
    assert all((product(twice, name) - product(once, name)).norm() < 0.012 for name in once.left)


def test_zeros_stay_zeros() -> None:
    compact = make_compact()
    name = "layer.0"
    compact.left[name].zero_()
    compact.right[name].zero_()
    quantized = QuantizedCompactAdapter.quantize(compact, 4)
    assert quantized.loss[name] == 0
    assert not quantized.dequantize().left[name].any()


def test_bad_input_is_refused() -> None:
    compact = make_compact()
    with pytest.raises(InputError, match="bits must be 8 or 4, but it is 5"):
        QuantizedCompactAdapter.quantize(compact, 5)
    bad = replace(compact, right={name: right / 0 for name, right in compact.right.items()})
    with pytest.raises(InputError, match=r"layer\.0\.right of the compact adapter has numbers that are not finite"):
        QuantizedCompactAdapter.quantize(bad)


def test_a_generator_expands_it() -> None:
    model = make_model()
    stream = model.stream().append(random_context(30))
    expected = stream.adapter()
    found = model.expand(QuantizedCompactAdapter.quantize(stream.compact(), 8).dequantize())
    for name in expected.lora_a:
        assert (found.delta(name) - expected.delta(name)).norm() < 0.05 * expected.delta(name).norm()
