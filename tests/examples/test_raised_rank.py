"""A generator with a higher rank and token weights, as examples/smollm2 makes one."""

import importlib.util
from pathlib import Path

import torch
from tiny import make_model, random_context

from gakernels import GenerativeAdapter

SCRIPT = Path(__file__).parents[2] / "examples" / "smollm2" / "raise_rank.py"


def raised(model: GenerativeAdapter, rank: int) -> GenerativeAdapter:
    spec = importlib.util.spec_from_file_location("raise_rank", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.raised(model, rank)


def test_only_the_rank_differs_at_first() -> None:
    model, context = make_model(base_dtype=torch.float64, dtype=torch.float64, static_rank=2), random_context(20)
    with torch.no_grad():
        for parameter in model.generators.parameters():  # none as it is at first
            parameter.normal_(std=0.3)
    before, rank = model.adapt(context), model.config.rank
    same = raised(model, rank)
    after = same.adapt(context)
    assert same.config.token_weights
    for name in before.lora_a:
        torch.testing.assert_close(after.delta(name), before.delta(name), rtol=1e-9, atol=1e-9)
    higher = raised(same, 2 * rank).adapt(context)
    for name, lora_a in before.lora_a.items():
        assert len(higher.lora_a[name]) == len(lora_a) + rank
        assert torch.linalg.matrix_norm(higher.delta(name)) > torch.linalg.matrix_norm(before.delta(name))
