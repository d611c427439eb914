"""Small models with random LoRA adapters, and what a pass over them gives."""

from collections.abc import Callable
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

D_IN, D_OUT = 12, 10


class Calls:
    """How often `lowrank_linear` was called since the last look."""

    def __init__(self) -> None:
        self.number = 0

    def look(self) -> int:
        number, self.number = self.number, 0
        return number


def randomise(model: nn.Module) -> None:
    """Random factors: as PEFT makes them, lora_B is zero and an adapter does nothing."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)


def with_adapters(base: nn.Module, *configs: dict[str, Any], **options: Any) -> peft.PeftModel:
    """A model with the adapters `one`, `two`, ... of these settings, all of them random; `one` is active."""
    names = ("one", "two", "three")
    model = peft.get_peft_model(base, peft.LoraConfig(**configs[0]), adapter_name=names[0], **options)
    for name, config in zip(names[1:], configs[1:], strict=False):
        model.add_adapter(name, peft.LoraConfig(**config), **options)
    randomise(model)
    return model.eval()


class OneLayer(nn.Module):
    """A model that is a single linear layer."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(D_IN, D_OUT, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def one_layer(
    *configs: dict[str, Any], dtype: torch.dtype = torch.float64, bias: bool = True, **options: Any
) -> peft.PeftModel:
    """LoRA on one linear layer; the base model and, unless PEFT casts them, the factors have this dtype."""
    configs = tuple({"r": 4, "lora_alpha": 6, "target_modules": ["linear"], **config} for config in configs)
    return with_adapters(OneLayer(bias).to(dtype), *configs, **options)


def lora_layer(model: nn.Module) -> Any:
    return next(module for module in model.modules() if isinstance(module, LoraLayer))


def everything(
    model: nn.Module, run: Callable[..., Tensor], x: Tensor, upstream: Tensor | None = None
) -> dict[str, Tensor]:
    """The output of run(x), and the gradients of <output, upstream> for x and every trainable parameter."""
    leaf = x.detach().clone().requires_grad_(x.is_floating_point())
    model.zero_grad(set_to_none=True)
    y = run(leaf)
    generator = torch.Generator().manual_seed(0)
    y.backward(torch.randn(y.shape, generator=generator).to(y) if upstream is None else upstream)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    if leaf.grad is not None:
        found["x"] = leaf.grad
    return {"y": y.detach(), **found}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """The same to a tolerance relative to the largest entry of each tensor."""
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert value.dtype == wanted[name].dtype, name
        largest = wanted[name].abs().max().item()
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=tolerance * max(largest, 1e-30), msg=name)
