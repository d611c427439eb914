"""The learned term that is the same for every context: part of every adapter, in every form that an adapter has."""

from pathlib import Path

import pytest
import torch
from tiny import logits_of, make_base, make_config, make_model, plain_copy, random_context, random_ids

from gakernels import GenerativeAdapter, InputError
from gakernels.generation.row_adapters import RowAdapters, SharedMaps
from gakernels.model.window_losses import pretraining_windows, window_losses

RANK, STATIC = 4, 3


def zero_states(model: GenerativeAdapter) -> dict[str, torch.Tensor]:
    size = model.config.state_size
    return {name: torch.zeros(1, size, size) for name in model.adapted_names}


def test_the_adapter_of_a_zero_state_is_the_static_term() -> None:
    model = make_model(static_rank=STATIC)
    (adapter,) = model.adapters(zero_states(model), [0])
    for name in model.adapted_names:
        generator = model.generator(name)
        assert generator.static_lora_a is not None
        assert generator.static_lora_b is not None
        wanted = 0.5 * generator.static_lora_b @ generator.static_lora_a
        torch.testing.assert_close(adapter.delta(name), wanted)
        assert wanted.abs().max() > 0


def test_an_adapter_is_the_generated_term_and_the_static_one() -> None:
    model, context = make_model(static_rank=STATIC), random_context(15)
    states = model.states([context])
    (adapter,), (static,) = model.adapters(states, [15]), model.adapters(zero_states(model), [0])
    assert adapter.rank == RANK + STATIC
    for name in model.adapted_names:
        generator = model.generator(name)
        left, right = generator.norm_factors(states[name])
        generated = 0.5 * generator.output_map @ left[0] @ right[0].mT @ generator.input_map
        torch.testing.assert_close(adapter.delta(name), generated + static.delta(name), rtol=1e-4, atol=1e-5)


def test_the_rows_of_a_served_batch_have_it_too() -> None:
    model, ids = make_model(static_rank=STATIC), random_ids(3, 7)
    contexts = [random_context(13), random_context(8)]
    compact = [model.stream().append(context).compact() for context in contexts]
    rows = RowAdapters.of(SharedMaps(model), [compact[0], None, compact[1]])
    with model.using(rows.factors()):
        together = logits_of(model.base, ids)
    for row, adapter in ((0, model.expand(compact[0])), (2, model.expand(compact[1]))):
        with model.adapted(adapter):
            alone = logits_of(model.base, ids[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together[1:2], logits_of(plain_copy(model), ids[1:2]), rtol=1e-4, atol=1e-4)


def test_it_is_saved_and_loaded_and_belongs_to_the_fingerprint(tmp_path: Path) -> None:
    model = make_model(static_rank=STATIC)
    model.save_pretrained(tmp_path, "base")
    loaded = GenerativeAdapter.from_pretrained(tmp_path, plain_copy(model))
    assert loaded.generator_fingerprint() == model.generator_fingerprint()
    assert loaded.config.static_rank == STATIC
    with torch.no_grad():
        loaded.generator(loaded.adapted_names[0]).static_lora_b.add_(1)
    assert loaded.generator_fingerprint() != model.generator_fingerprint()


def test_training_reaches_it_through_every_window() -> None:
    model = make_model(static_rank=STATIC)
    batch = pretraining_windows(random_ids(2, 24), 4, torch.Generator().manual_seed(0))
    window_losses(model, batch)["completion"].mean.backward()
    for name in model.adapted_names:
        generator = model.generator(name)
        for parameter in (generator.static_lora_a, generator.static_lora_b, generator.output_map):
            assert parameter is not None
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 0


def test_it_starts_at_zero() -> None:
    model, ids = make_model(static_rank=STATIC, trained=False), random_ids(1, 9)
    with model.adapted(model.adapters(zero_states(model), [0])):
        assert torch.equal(logits_of(model.base, ids), logits_of(plain_copy(model), ids))


def test_a_negative_rank_is_refused() -> None:
    with pytest.raises(InputError, match="static_rank must be at least 0, but it is -1"):
        GenerativeAdapter(make_base(), make_config(static_rank=-1))
