"""Fingerprints tell models and generators apart, and nothing else."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, make_base, make_config, make_model, plain_copy

from gakernels import GenerativeAdapter, fingerprint
from gakernels.fingerprint import tensor_fingerprint
from gakernels.model.base_model import model_fingerprint


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_has_the_same_fingerprint_in_every_precision_and_with_generators(family: str) -> None:
    base = make_base(family)
    expected = model_fingerprint(base)
    model = GenerativeAdapter(base, make_config(family))
    assert model.base_fingerprint() == expected == model_fingerprint(plain_copy(model))
    half = plain_copy(model).bfloat16()
    assert model_fingerprint(half) == expected
    assert model_fingerprint(half.half()) == expected
    assert model_fingerprint(half.double()) == expected


def test_tiny_weights_keep_the_fingerprint_in_float16() -> None:
    base = make_base()
    with torch.no_grad():
        base.get_input_embeddings().weight.mul_(2.0**-14)
    half = base.bfloat16()
    expected = model_fingerprint(half)
    before = half.get_input_embeddings().weight.clone()
    assert model_fingerprint(half.half()) == expected
    assert not torch.equal(half.get_input_embeddings().weight.bfloat16(), before)  # numbers were lost


def test_another_base_has_another_fingerprint() -> None:
    base = make_base()
    before = model_fingerprint(base)
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight.mul_(1.1)
    assert model_fingerprint(base) != before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8])
def test_every_bit_and_its_place_count(dtype: torch.dtype) -> None:
    values = torch.randn(3 * 2**20 // 2).mul(50).to(dtype)  # more than one block
    expected = tensor_fingerprint([("a", values)])
    assert tensor_fingerprint([("a", values.clone())]) == expected
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[values.element_size()]
    for place in torch.randint(len(values), (3,)).tolist():
        changed = values.clone()
        changed.view(integers)[place] ^= 1
        assert tensor_fingerprint([("a", changed)]) != expected
        changed = values.clone()
        other = (place + 1 + int(torch.randint(len(values) - 1, ()))) % len(values)
        changed[[place, other]] = values[[other, place]]
        same = torch.equal(changed, values)
        assert (tensor_fingerprint([("a", changed)]) == expected) == same


def test_numbers_that_change_places_count_however_far_apart() -> None:
    values = torch.randn(2**21)
    expected = tensor_fingerprint([("a", values)])
    place = int(torch.randint(2**20 - 1, ()))
    for other in (place + 1, place + 2**10, place + 2**16, place + 2**20):
        changed = values.clone()
        changed[[place, other]] = values[[other, place]]
        assert tensor_fingerprint([("a", changed)]) != expected


def test_names_shapes_dtypes_and_settings_count() -> None:
    x = torch.zeros(4, 6)
    others = [[("b", x)], [("a", x.view(6, 4))], [("a", x.double())], [("a", x), ("b", x)], []]
    found = {tensor_fingerprint(tensors) for tensors in others}
    found |= {tensor_fingerprint([("a", x)]), tensor_fingerprint([("a", x)], "settings")}
    assert len(found) == 7


def test_order_and_memory_layout_do_not_count() -> None:
    x, y = torch.randn(4, 6), torch.randn(3)
    expected = tensor_fingerprint([("x", x), ("y", y)])
    assert tensor_fingerprint([("y", y), ("x", x.mT.contiguous().mT)]) == expected
    assert tensor_fingerprint([("x", torch.randn(0))]) == tensor_fingerprint([("x", torch.randn(0))])


def test_a_training_step_changes_the_fingerprint_of_the_generator() -> None:
    model = make_model()
    before = model.generator_fingerprint()
    name = model.adapted_names[0]
    with torch.no_grad():
        model.generator(name).key_projection[0, 0] += 1e-6
    assert model.generator_fingerprint() != before


def test_the_fingerprint_of_a_generator_is_computed_again_only_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other, computed = make_model(), make_model(), []
    plain = fingerprint._bit_sums
    monkeypatch.setattr(fingerprint, "_bit_sums", lambda tensor: (computed.append(1), plain(tensor))[1])

    def unchanged() -> bool:
        """Whether the fingerprint was taken from before; it must be right anyway."""
        computed.clear()
        found = model.generator_fingerprint()
        fresh = not computed
        assert found == model.fingerprint_of(model.generator_tensors())
        return fresh

    assert not unchanged()
    model.adapt([[5, 6], [7]])
    model.stream().append([5, 6]).compact()
    assert unchanged()
    parameters = list(model.generators.parameters())
    optimizer = torch.optim.AdamW(parameters, fused=True)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    generator = model.generator(model.adapted_names[1])
    changes = {
        "a step": optimizer.step,
        "a step of another optimizer": torch.optim.SGD(parameters, lr=1e-3).step,
        "data behind PyTorch's back": lambda: parameters[2].data.mul_(1.01),
        "one number": lambda: parameters[0].detach()[:1].add_(1),
        "the sketch": lambda: generator.sketch.mul_(2),
        "loading": lambda: model.load_generator_tensors(other.generator_tensors(), "the other"),
        "a state dict": lambda: model.load_state_dict(make_model().state_dict()),
        "another dtype": lambda: model.generators.double(),
        "another parameter": lambda: setattr(
            generator, "output_map", torch.nn.Parameter(generator.output_map.detach())
        ),
    }
    for what, change in changes.items():
        assert unchanged(), what
        with torch.no_grad():
            change()
        assert not unchanged(), what
    assert unchanged()


def test_the_generator_in_the_package_has_the_fingerprint_that_it_was_saved_with() -> None:
    """Files that belong to a generator name its fingerprint, so later versions must find the same."""
    folder = Path(str(files("gakernels.demo") / "assets" / "generator"))
    saved = json.loads((folder / "generator.json").read_text())
    model = GenerativeAdapter.from_pretrained(folder)
    assert model.generator_fingerprint() == saved["generator_fingerprint"]
    assert model.base_fingerprint() == saved["base_fingerprint"]
    assert model.config.sketch_side == "input"


class PackedTensor(torch.Tensor):
    """As the tensors of quantisation libraries: it holds others, and few operations know it."""

    inside: torch.Tensor

    @staticmethod
    def __new__(cls, inside: torch.Tensor) -> "PackedTensor":
        packed = torch.Tensor._make_wrapper_subclass(cls, inside.shape, dtype=torch.float32)
        packed.inside = inside
        return packed

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inside"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inside)
        raise NotImplementedError(func)


def test_packed_weights_count_by_what_they_hold() -> None:
    def fingerprint(codes: torch.Tensor) -> str:
        base = make_base()
        for parameter in base.parameters():
            parameter.data.zero_()
        base.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(PackedTensor(codes), requires_grad=False)
        return model_fingerprint(base)

    codes = torch.randint(-128, 128, (48, 32), dtype=torch.int8)
    other = codes.clone()
    other[0, 0] += 1
    assert fingerprint(codes) == fingerprint(codes.clone()) != fingerprint(other)
