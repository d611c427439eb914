"""Products in 8 bits by a GPU's matrix units against the definition; not part of the tests without one."""

import pytest
import torch
from emulation import EmulatedProduct
from torch import Generator, nn

from gakernels import InputError
from gakernels.nn.float8_linear import Float8Linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with FP8"
    ),
]


@pytest.mark.parametrize("sizes", [(4096, 1024), (256, 2048), (16, 16)])
@pytest.mark.parametrize("tokens", [1, 77, 512])
def test_value_and_gradient(generator: Generator, sizes: tuple[int, int], tokens: int) -> None:
    """To 1%: bfloat16 results, of sums in registers that hold fewer bits than float32. Rounding to 8 bits loses 4%."""
    plain = nn.Linear(*sizes, bias=False).requires_grad_(False)
    plain.weight.copy_(torch.randn(plain.weight.shape, generator=generator) / sizes[0] ** 0.5)
    plain = plain.to("cuda", torch.bfloat16)
    x = torch.randn(1, tokens, sizes[0], generator=generator).to("cuda", torch.bfloat16).requires_grad_()
    upstream = torch.randn(1, tokens, sizes[1], generator=generator).to("cuda", torch.bfloat16)
    y = Float8Linear(plain)(x)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    wide = x.detach().cpu().double().requires_grad_()
    wanted = EmulatedProduct.apply(wide, plain.weight.cpu())
    (wanted_gradient,) = torch.autograd.grad(wanted, wide, upstream.cpu().double())
    for found, exact in ((y, wanted), (gradient, wanted_gradient)):
        assert (found.cpu().double() - exact).norm() <= 0.01 * exact.norm()


def test_sizes_that_the_matrix_units_do_not_take() -> None:
    with pytest.raises(InputError, match="multiples of 16"):
        Float8Linear(nn.Linear(24, 32, device="cuda"))
