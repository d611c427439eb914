"""Fine-tuning on each context by itself."""

import torch
from worlds import make

from gakernels import Adapter, GenerativeAdapter
from gakernels.demo.experiment import document_loss
from gakernels.evaluation.datasets import Dataset, EvaluationContext, Question
from gakernels.evaluation.methods import MethodSettings
from gakernels.evaluation.runner import METHODS
from gakernels.evaluation.scenarios import docqa


def texts(generator: torch.Generator, count: int) -> list[str]:
    """Each of words of its own, so that what is learned of one is no help with another."""
    words = torch.randint(0, 15, (count, 14), generator=generator) + 3 + 20 * torch.arange(count)[:, None]
    return [" ".join(f"w{word}" for word in row.tolist()) for row in words]


def adapters(model: GenerativeAdapter, texts: list[str]) -> list[Adapter]:
    contexts = tuple(EvaluationContext(text, (Question("w3", ("w4",)),)) for text in texts)
    scenario = docqa(Dataset(contexts), len, [1])
    method = METHODS["context_lora"](model, scenario, MethodSettings(learning_rate=1e-1, epochs=30))
    prepared = method.prepare([*scenario.cases, scenario.cases[0]])
    assert prepared.weights is None
    made = [adapter for adapter in prepared.adapters if adapter is not None]
    assert made[-1] is made[0]  # the same text is learned once
    return made[:-1]


def test_each_context_is_learned_by_a_lora_of_its_own(generator: torch.Generator) -> None:
    model = make()
    before = {name: tensor.clone() for name, tensor in model.base.state_dict().items()}
    told = texts(generator, 3)
    made = adapters(model, told)
    own, *others = [
        sum(document_loss(model, text, made[(number + shift) % 3])[0] for number, text in enumerate(told))
        for shift in range(3)
    ]
    assert own < sum(document_loss(model, text, None)[0] for text in told)
    assert own < min(others)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.base.state_dict().items())
