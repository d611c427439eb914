"""Calls of the operation are counted."""

import pytest
import torch
from lora_models import Calls

from gakernels.integrations import lora_linear


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Counts the calls of `lowrank_linear` by LoRA layers, so that a test can't pass on PEFT's own forward alone."""
    counter, operation = Calls(), lora_linear.lowrank_linear

    def counting(*arguments: object) -> torch.Tensor:
        counter.number += 1
        return operation(*arguments)

    monkeypatch.setattr(lora_linear, "lowrank_linear", counting)
    return counter
