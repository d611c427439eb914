"""Generators whose state follows the delta rule: streams, files and every form of their adapters."""

from pathlib import Path

import pytest
import torch
from tiny import logits_of, make_model, random_context, random_ids

from gakernels import Adapter, ContextStream, GenerativeAdapter, GeneratorConfig, InputError


def test_streams_files_and_adapters(tmp_path: Path) -> None:
    model, context, ids = make_model(delta_rule=True), random_context(40), random_ids(1, 9)
    base = model.base
    stream = model.stream().append(context)
    stream.save(tmp_path / "state")
    stream.adapter().save(tmp_path / "adapter")
    loaded = ContextStream.load(model, tmp_path / "state").append(context[:7])
    torch.testing.assert_close(loaded.states(), stream.append(context[:7]).states())
    stream = ContextStream.load(model, tmp_path / "state")
    with model.adapted(stream.adapter()):
        wanted = logits_of(base, ids)
    assert (wanted - logits_of(base, ids)).abs().max() > 1e-2 * wanted.abs().max()  # it is not an adapter of zeros
    with model.adapted(model.expand(stream.compact())):
        torch.testing.assert_close(logits_of(base, ids), wanted, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "generator", "base")
    again = GenerativeAdapter.from_pretrained(tmp_path / "generator", base=model.detach())
    assert again.config == GeneratorConfig.from_dict(model.config.to_dict())
    assert again.config.delta_rule
    with again.adapted(Adapter.load(tmp_path / "adapter")):
        assert torch.equal(logits_of(base, ids), wanted)
    with again.adapted(again.adapt(context)):
        torch.testing.assert_close(logits_of(base, ids), wanted)


def test_settings_that_are_off_are_written_as_before() -> None:
    assert "delta_rule" not in GeneratorConfig().to_dict()
    assert GeneratorConfig(delta_rule=True).to_dict()["delta_rule"] is True
    with pytest.raises(InputError, match="token_weights must be false with delta_rule"):
        GeneratorConfig(delta_rule=True, token_weights=True)
