"""Low precision: as near to float64 as PEFT's own forward, with fp32 factors on a bf16 base, and under autocast."""

import pytest
import torch
from lora_models import D_IN, D_OUT, Calls, everything, lora_layer, one_layer
from torch import Tensor, nn

from gakernels.integrations.peft import restore, use_lowrank_linear

TOKENS = 200
CASES = {
    "one adapter": ([{"r": 8}], ["one"]),
    "two adapters": ([{"r": 8}, {"r": 3, "lora_alpha": 2}], ["one", "two"]),
    "lora_bias": ([{"r": 8, "lora_bias": True}], ["one"]),
}


def relative(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm()).item()


def run_three(
    model: nn.Module, x: Tensor, upstream: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """With the operation, PEFT's own, and PEFT's own in float64 on the same numbers. The model ends in float64."""
    use_lowrank_linear(model)
    ours = everything(model, model, x, upstream)
    restore(model)
    own = everything(model, model, x, upstream)
    exact = everything(model.double(), model, x.double(), upstream.double())
    return ours, own, exact


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(4, TOKENS, D_IN).to(dtype), torch.randn(4, TOKENS, D_OUT).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_as_good_as_peft_at_the_same_dtype(case: str, dtype: torch.dtype, calls: Calls) -> None:
    configs, active = CASES[case]
    model = one_layer(*configs, dtype=dtype, autocast_adapter_dtype=False)
    model.base_model.set_adapter(active)
    assert lora_layer(model).lora_A["one"].weight.dtype == dtype
    ours, own, exact = run_three(model, *inputs(dtype))
    assert calls.look() == 1
    for name, value in ours.items():
        assert value.dtype == own[name].dtype == dtype, name
        allowed = 2 * relative(own[name], exact[name]) + torch.finfo(dtype).eps
        assert relative(value, exact[name]) <= allowed, name


@pytest.mark.parametrize("case", CASES)
def test_float32_factors_on_a_bfloat16_base(case: str, calls: Calls) -> None:
    """PEFT's default. It computes the low-rank part in float32; here its error is that of bfloat16."""
    configs, active = CASES[case]
    model = one_layer(*configs, dtype=torch.bfloat16)
    model.base_model.set_adapter(active)
    assert lora_layer(model).lora_A["one"].weight.dtype == torch.float32
    ours, own, exact = run_three(model, *inputs(torch.bfloat16))
    assert calls.look() == 1
    for name, value in ours.items():
        assert value.dtype == own[name].dtype, name
        assert relative(value, exact[name]) <= 2 * torch.finfo(torch.bfloat16).eps, name
    assert ours["y"].dtype == ours["x"].dtype == torch.bfloat16


@pytest.mark.parametrize("bias", ["none", "lora_only"])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast(base: torch.dtype, bias: str, calls: Calls) -> None:
    model = one_layer({"bias": bias}, dtype=base)
    x, upstream = inputs(torch.float32)

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    use_lowrank_linear(model)
    ours = everything(model, run, x, upstream.bfloat16())
    assert calls.look() == 1
    restore(model)
    own = everything(model, run, x, upstream.bfloat16())
    exact = everything(model.double(), model, x.double(), upstream.double())
    for name, value in ours.items():
        assert value.dtype == own[name].dtype, name
        allowed = 2 * relative(own[name], exact[name]) + torch.finfo(torch.bfloat16).eps
        assert relative(value, exact[name]) <= allowed, name
    assert ours["y"].dtype == torch.bfloat16
