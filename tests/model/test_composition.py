"""The algebra of states: sums of contexts, taking one out, weights, forgetting."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny import make_config, make_model, make_trained, plain_copy, random_context, same_adapters
from torch import Tensor

from gakernels import ContextStream, GenerativeAdapter, InputError
from gakernels.model.state_arithmetic import scale_states, state_fingerprint, subtract_states, sum_states

ROUNDOFF = 2.0**-24  # of float32


def random_states(*shape: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: torch.randn(*shape, 6, 6, dtype=dtype) * 10.0 ** torch.randint(-3, 4, ()) for name in ("a", "b")}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def defined_state(model: GenerativeAdapter, pieces: Sequence[Sequence[int]], weights: Sequence[float]) -> Tensor:
    """sum of w A2 (sum h h^T) B1 over pieces (equation 3), float64, of the first adapted layer of the first decoder
    layer: its input is the embeddings, which no adapter changes, so pieces count the same in any order."""
    generator = model.generator(model.adapted_names[0])
    total = torch.zeros(16, 16, dtype=torch.float64)
    for piece, weight in zip(pieces, weights, strict=True):
        hidden = model.base.get_input_embeddings().weight[torch.tensor(piece)].double()
        hidden = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6) * generator.norm_weight.double()
        total += weight * generator.value_projection.double() @ (hidden.mT @ hidden) @ generator.key_projection.double()
    return total


def first(stream: ContextStream) -> Tensor:
    return next(iter(stream.states().values()))[0].double()


# Plain functions


def test_a_sum_is_linear_and_rounded_once() -> None:
    parts, weights = [random_states(2) for _ in range(4)], torch.randn(4).tolist()
    total = sum_states(parts, weights)
    for name in ("a", "b"):
        exact = sum(weight * part[name].double() for part, weight in zip(parts, weights, strict=True))
        assert total[name].dtype == torch.float32
        assert ((total[name] - exact).abs() <= ROUNDOFF * exact.abs() * (1 + 1e-6)).all()
    assert same(sum_states(parts), sum_states(parts, [1, 1, 1, 1]))
    assert same(scale_states(parts[0], 0.25), {name: 0.25 * state for name, state in parts[0].items()})


def test_the_order_of_parts_does_not_matter_beyond_one_rounding() -> None:
    parts = [random_states() for _ in range(6)]
    forward, backward = sum_states(parts), sum_states(parts[::-1])
    for name in forward:
        difference = (forward[name].double() - backward[name].double()).abs()
        assert (difference <= 2 * ROUNDOFF * forward[name].double().abs() * (1 + 1e-6)).all()


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_subtraction_takes_a_part_out_up_to_the_stated_rounding(weight: float) -> None:
    rest, part = random_states(), random_states()
    whole = sum_states([rest, part], [1.0, weight])
    left = subtract_states(whole, part, weight)
    for name in rest:
        bound = ROUNDOFF * (whole[name].double().abs() + left[name].double().abs()) * (1 + 1e-6)
        assert ((left[name].double() - rest[name].double()).abs() <= bound).all()


def test_wrong_states_are_refused() -> None:
    states = random_states()
    for parts, weights, message in (
        ([], None, "at least one set of states"),
        ([states, states], [1.0], "weights must be 2 finite numbers"),
        ([states], [float("nan")], "weights must be 1 finite numbers"),
        ([states, {"a": states["a"]}], None, "of the same adapted layers"),
        ([states, random_states(2)], None, "the states of a must have the same shape and dtype"),
        ([states, random_states(dtype=torch.float64)], None, "must have the same shape and dtype"),
    ):
        with pytest.raises(InputError, match=message):
            sum_states(parts, weights)


# Streams


def test_documents_indexed_once_add_up_to_the_sum_of_their_own_states() -> None:
    model, documents = make_model(), [random_context(length) for length in (20, 7, 33)]
    indexed = [model.stream().append(document) for document in documents]
    weights = [1.0, 0.5, 2.0]
    combined = model.stream()
    for stream, weight in zip(indexed, weights, strict=True):
        combined.add(stream, weight)
    together = model.states(documents)  # the same documents as rows of one batch, each on its own
    for name, state in combined.states().items():
        expected = sum(weight * row.double() for row, weight in zip(together[name], weights, strict=True))
        assert (state[0] - expected).norm() < 1e-5 * expected.norm()
    expected = defined_state(model, documents, weights)
    assert (first(combined) - expected).norm() < 1e-5 * expected.norm()
    assert combined.tokens_seen == 60
    assert [part.weight for part in combined.parts] == weights
    assert combined.adapter().tokens_seen == 60


def test_a_sum_of_documents_is_not_the_document_of_all_of_them() -> None:
    model, one, other = make_model(), random_context(12), random_context(12)
    combined = model.stream().add(model.stream().append(one)).add(model.stream().append(other))
    read = model.stream().append(one).append(other)
    states, others = list(combined.states().values()), list(read.states().values())
    assert (states[0] - others[0]).norm() < 1e-5 * states[0].norm()  # the input of the first layer has no adapter
    assert (states[-1] - others[-1]).norm() > 1e-4 * states[-1].norm()  # each chunk was read with those before it


def test_a_sum_of_the_other_documents_is_exactly_what_never_had_the_one() -> None:
    model = make_model()
    indexed = [model.stream().append(random_context(15)) for _ in range(3)]
    expected = model.stream().add(indexed[0]).add(indexed[2])
    everything = model.stream().add(indexed[0]).add(indexed[1]).add(indexed[2])
    replayed = model.stream()
    for stream, part in zip(indexed, everything.parts, strict=True):
        if part.fingerprint != state_fingerprint(indexed[1].states()):
            replayed.add(stream, part.weight)
    assert same(replayed.states(), expected.states())
    assert same_adapters(replayed.adapter(), expected.adapter())


@pytest.mark.parametrize("weight", [1.0, 0.7])
def test_removal_leaves_what_was_there_up_to_rounding(weight: float) -> None:
    model = make_model()
    own, other = model.stream().append(random_context(25)), model.stream().append(random_context(18))
    before, states = own.states(), other.states()
    own.add(other, weight)
    whole = own.states()
    assert own.remove(other) is own
    assert (own.tokens_seen, own.parts) == (25, ())
    for name, state in own.states().items():
        bound = ROUNDOFF * (whole[name].double().abs() + state.double().abs()) * (1 + 1e-6)
        assert ((state.double() - before[name].double()).abs() <= bound).all()
    assert same(other.states(), states)
    deltas = [(own.adapter().delta(name), model.adapters(before, [25])[0].delta(name)) for name in before]
    assert all((found - expected).norm() < 1e-2 * expected.norm() for found, expected in deltas)


def test_removing_everything_leaves_an_empty_stream_and_no_rounding_noise() -> None:
    model = make_model()
    parts = [model.stream().append(random_context(9)) for _ in range(2)]
    stream = model.stream().add(parts[0]).add(parts[1], 0.3)
    stream.remove(parts[0]).remove(parts[1])
    assert (stream.tokens_seen, stream.parts) == (0, ())
    with pytest.raises(InputError, match="append a context first"):
        stream.adapter()


def test_of_two_equal_parts_the_later_one_is_removed() -> None:
    model = make_model()
    part = model.stream().append(random_context(9))
    stream = model.stream().add(part, 1.0).add(part, 2.0).remove(part)
    assert [part.weight for part in stream.parts] == [1.0]
    for name, state in stream.states().items():
        assert torch.allclose(state, part.states()[name], rtol=1e-5, atol=1e-5)


def test_only_what_was_added_can_be_removed() -> None:
    model = make_model()
    part = model.stream().append(random_context(9))
    stream = model.stream().append(random_context(9)).add(part)
    before = stream.states()
    part.append(random_context(3))  # no longer the same state
    for other in (part, model.stream().append(random_context(9))):
        with pytest.raises(InputError, match="must have been added in exactly this state"):
            stream.remove(other)
    assert same(stream.states(), before)
    assert stream.tokens_seen == 18


def test_what_can_not_be_added_is_refused_and_changes_nothing() -> None:
    model = make_model()
    stream = model.stream().append(random_context(9))
    before, other = stream.states(), model.stream().append(random_context(9))
    foreign = make_trained(GenerativeAdapter(plain_copy(model), make_config())).stream().append(random_context(9))
    for wrong, weight, message in (
        (foreign, 1.0, "only contexts of the same generator"),
        (model.stream(), 1.0, "append a context first"),
        (other, 0.0, "weight must not be 0"),
        (other, float("inf"), "finite"),
    ):
        with pytest.raises(InputError, match=message):
            stream.add(wrong, weight)
    assert same(stream.states(), before)
    assert (stream.tokens_seen, stream.parts) == (9, ())


def test_the_same_generator_in_another_object_is_no_other_generator() -> None:
    model = make_model()
    twin = GenerativeAdapter(plain_copy(model), make_config())
    twin.load_generator_tensors(model.generator_tensors(), "the model")
    context = random_context(9)
    stream = model.stream().add(twin.stream().append(context))
    assert same(stream.states(), model.stream().append(context).states())


def test_forgetting_follows_its_formula() -> None:
    """S_n = sum_i a^(n-i) (S_i - S_(i-1))."""
    model, factor = make_model(), 0.6
    pieces = [random_context(11) for _ in range(4)]
    stream = model.stream()
    for number, piece in enumerate(pieces):
        if number:
            stream.decay(factor)
        stream.append(piece)
    weights = [factor ** (len(pieces) - 1 - number) for number in range(len(pieces))]
    expected = defined_state(model, pieces, weights)
    assert (first(stream) - expected).norm() < 1e-5 * expected.norm()
    assert stream.tokens_seen == 44


def test_forgetting_alone_does_not_change_the_adapter() -> None:
    model = make_model()
    stream = model.stream().append(random_context(30))
    before = stream.adapter()
    assert same_adapters(stream.decay(0.25).adapter(), before)  # a power of two: bit by bit
    faded = stream.decay(0.3).adapter()
    for name in before.lora_a:
        assert (faded.delta(name) - before.delta(name)).norm() < 1e-3 * before.delta(name).norm()


def test_a_faded_part_is_removed_with_its_weight_of_now() -> None:
    model = make_model()
    own, part = model.stream().append(random_context(20)), model.stream().append(random_context(20))
    expected = scale_states(own.states(), 0.5)
    own.add(part, 0.8).decay(0.5)
    assert own.parts[0].weight == 0.4
    for name, state in own.remove(part).states().items():
        assert (state - expected[name]).norm() < 1e-5 * expected[name].norm()


@pytest.mark.parametrize("factor", [0.0, -0.5, 1.5, float("nan")])
def test_a_wrong_factor_of_forgetting_is_refused(factor: float) -> None:
    with pytest.raises(InputError, match="factor must be above 0 and at most 1"):
        make_model().stream().append(random_context(9)).decay(factor)


def test_parts_are_in_the_file(tmp_path: Path) -> None:
    model = make_model()
    part = model.stream().append(random_context(13))
    stream = model.stream().append(random_context(20)).add(part, 0.25).append(random_context(5))
    stream.save(tmp_path / "state.safetensors")
    loaded = ContextStream.load(model, tmp_path / "state.safetensors")
    assert (loaded.parts, loaded.tokens_seen) == (stream.parts, 38)
    assert same(loaded.remove(part).states(), stream.remove(part).states())


def test_a_scaled_adapter_has_a_scaled_delta() -> None:
    adapter = make_model().adapt([random_context(20)])[0]
    half = adapter.scaled(0.5)
    for name in adapter.lora_a:
        assert torch.equal(half.delta(name), 0.5 * adapter.delta(name))
        assert half.lora_a[name] is adapter.lora_a[name]
    assert not any(adapter.scaled(0.0).delta(name).any() for name in adapter.lora_a)
    with pytest.raises(InputError, match="factor must be finite, but it is nan"):
        adapter.scaled(float("nan"))
