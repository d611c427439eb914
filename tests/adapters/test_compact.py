"""The compact form: U and V of a context, from which its generator makes the adapter again."""

from pathlib import Path

import pytest
import torch
from tiny import logits_of, make_config, make_model, make_trained, plain_copy, random_context, random_ids

from gakernels import Adapter, CompactAdapter, FormatError, GenerativeAdapter, InputError


def close(left: Adapter, right: Adapter, tolerance: float) -> bool:
    """Whether the deltas agree, relative to their size; and the descriptions exactly."""
    errors = [(left.delta(name) - right.delta(name)).norm() / right.delta(name).norm() for name in right.lora_a]
    return max(errors) <= tolerance and left._description() == right._description()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox"])
def test_expanded_it_is_the_adapter(family: str) -> None:
    model, ids = make_model(family), random_ids(3, 8)
    stream = model.stream().append(random_context(20))
    adapter, compact = stream.adapter(), stream.compact()
    assert close(model.expand(compact), adapter, 1e-5)
    with model.adapted(adapter):
        expected = logits_of(model.base, ids)
    with model.adapted(model.expand(compact)):
        assert (logits_of(model.base, ids) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_its_product_is_the_norm_of_the_state() -> None:
    model = make_model(dtype=torch.float64, base_dtype=torch.float64, damping=0.0)
    stream = model.stream().append(random_context(60))
    compact = stream.compact()
    for name, state in stream.states().items():
        product = compact.left[name] @ compact.right[name].mT
        # rank r, all singular values one, within the range of the state
        assert torch.allclose(torch.linalg.svdvals(product)[:5], torch.tensor([1.0, 1, 1, 1, 0]).double(), atol=1e-6)
        assert (product * state[0]).sum() > 0


def test_its_size_is_that_of_two_thin_matrices_a_layer() -> None:
    model = make_model(state_size=24, rank=3)
    compact = model.stream().append(random_context(20)).compact()
    assert compact.rank == 3
    assert compact.numbers() == len(model.adapted_names) * 2 * 24 * 3
    assert compact.nbytes == 4 * compact.numbers()
    half = compact.to(dtype=torch.bfloat16)
    assert half.nbytes == 2 * compact.numbers()
    assert half._description() == compact._description()
    direct = model.stream().append(random_context(9)).compact(torch.bfloat16)
    assert {factor.dtype for factor in [*direct.left.values(), *direct.right.values()]} == {torch.bfloat16}


@pytest.mark.parametrize("norm_dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_one_is_the_same_bit_by_bit(tmp_path: Path, norm_dtype: torch.dtype) -> None:
    model = make_model()
    compact = model.stream().append(random_context(20)).compact(norm_dtype)
    compact.save(tmp_path / "compact.safetensors")
    loaded = CompactAdapter.load(tmp_path / "compact.safetensors")
    assert loaded._description() == compact._description()
    for side in ("left", "right"):
        saved, found = getattr(compact, side), getattr(loaded, side)
        assert saved.keys() == found.keys()
        assert all(torch.equal(saved[name], found[name]) and saved[name].dtype == found[name].dtype for name in saved)
    assert model.expand(loaded).tokens_seen == 20


def test_bfloat16_costs_little() -> None:
    model = make_model()
    stream = model.stream().append(random_context(40))
    assert close(model.expand(stream.compact(torch.bfloat16)), stream.adapter(), 1e-2)


def test_those_of_a_batch_are_those_of_each_alone_and_do_not_share_memory() -> None:
    model, contexts = make_model(), [random_context(length) for length in (20, 6, 33)]
    states = model.states(contexts)
    for row, compact in enumerate(model.compact_adapters(states, [20, 6, 33])):
        adapter = model.adapters({name: state[row : row + 1] for name, state in states.items()}, [len(contexts[row])])
        assert close(model.expand(compact), adapter[0], 1e-4)
        for factor in [*compact.left.values(), *compact.right.values()]:
            assert factor.untyped_storage().nbytes() == factor.numel() * factor.element_size()


def test_frobenius_has_no_compact_form() -> None:
    stream = make_model(norm="frobenius").stream().append(random_context(9))
    with pytest.raises(InputError, match='norm="frobenius" has no compact form'):
        stream.compact()


def test_an_empty_stream_has_none() -> None:
    with pytest.raises(InputError, match="append a context first"):
        make_model().stream().compact()


def test_only_the_generator_that_made_it_expands_it() -> None:
    model = make_model()
    compact = model.stream().append(random_context(9)).compact()
    with pytest.raises(FormatError, match="belongs to a base model with fingerprint"):
        make_model().expand(compact)
    with pytest.raises(FormatError, match="belongs to a generator with fingerprint"):
        make_trained(GenerativeAdapter(plain_copy(model), make_config(seed=1))).expand(compact)
    settings = vars(compact)
    for changed in (
        CompactAdapter(**{**settings, "left": {"model.layers.0.mlp.up_proj": torch.zeros(16, 4)}}),
        CompactAdapter(**{**settings, "left": {name: left[:5] for name, left in compact.left.items()}}),
        CompactAdapter(**{**settings, "right": {name: right[:, :3] for name, right in compact.right.items()}}),
    ):
        with pytest.raises(FormatError, match="other linear layers or another size"):
            model.expand(changed)


def test_the_side_of_the_sketch_is_part_of_the_generator(tmp_path: Path) -> None:
    base = make_model().detach()
    settings = make_config(sketch_side="output").to_dict()
    model = make_trained(GenerativeAdapter(base, make_config(sketch_side="output")))
    assert model.config.to_dict() == settings
    model.save_pretrained(tmp_path)
    context, tensors = random_context(30), {name: t.clone() for name, t in model.generator_tensors().items()}
    expected, fingerprint = model.adapt([context])[0], model.generator_fingerprint()
    model.detach()
    other = GenerativeAdapter(base, make_config())
    other.load_generator_tensors(tensors, "the model")
    assert other.generator_fingerprint() != fingerprint
    different = other.adapt([context])[0]
    name = other.adapted_names[0]
    assert (different.delta(name) - expected.delta(name)).norm() > 1e-3 * expected.delta(name).norm()
    other.detach()
    loaded = GenerativeAdapter.from_pretrained(tmp_path, base)
    assert loaded.config.sketch_side == "output"
    assert close(loaded.adapt([context])[0], expected, 0)
