"""AdaptedLinear: a frozen linear layer that takes a low-rank adapter, or a different one per row of the batch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gakernels.nn.factors_in_force import HandedOver, factors_in_force
from gakernels.nn.low_rank_factors import CompactFactors, Factors, LowRankFactors, as_windows
from gakernels.nn.offloading import execution_device
from gakernels.nn.side_stream import Later
from gakernels.ops import lowrank_linear


class AdaptedLinear(nn.Linear):
    """A linear layer with frozen weight and bias and an exchangeable adapter.

    It is an `nn.Linear` with the same parameter names, so state dicts and tools that look for linear layers see no
    difference. Without factors it computes exactly what the linear layer does.

    Attributes:
        factors: of the layer itself. Those in force in the current thread or task (`factors_in_force`) take precedence.
        handed_over: set by `compile_layers`: the same factors where torch.compile can read them.
    """

    factors: Factors | Later[LowRankFactors | None] = None
    handed_over: HandedOver | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "AdaptedLinear":
        """Wrap a layer: the parameters are shared, not copied, and are frozen."""
        bias = linear.bias is not None
        adapted = cls(linear.in_features, linear.out_features, bias=bias, device="meta")
        adapted.weight, adapted.bias = linear.weight, linear.bias
        _share_hooks(linear, adapted)
        adapted.train(linear.training)
        return adapted.requires_grad_(False)

    def to_linear(self) -> nn.Linear:
        """The plain layer again, with the same parameters."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        _share_hooks(self, linear)
        return linear.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """y (rows, ..., d_out) of x (rows, ..., d_in), each row with its adapter.

        OPT and layers with experts flatten the batch: x may also be (rows tokens, d_in).

        Raises:
            InputError: the rows of the batch can't be divided among the adapters.
        """
        return self.product(input, self.current_factors())

    def current_factors(self) -> Factors:
        """The factors in use; waits for pending ones."""
        if self.handed_over is not None and torch.compiler.is_compiling():  # which can't trace a context variable
            factors = self.handed_over.factors
        else:
            factors = self.factors_now()
        return factors.result() if isinstance(factors, Later) else factors

    def factors_now(self) -> Factors | Later[LowRankFactors | None]:
        """The factors in use, which may be pending."""
        return factors_in_force(self, self.factors)

    @property
    def mergeable(self) -> bool:
        """Whether a delta can be added to the weight."""
        return True

    def merged_weight(self, delta: Tensor) -> Tensor:
        """The weight with an adapter's delta (d_out, d_in) added, rounded once."""
        weight = self.weight.detach()
        return (weight.to(delta.dtype) + delta.to(weight.device)).to(weight.dtype)

    @property
    def device(self) -> torch.device:
        """Where the layer computes, also if its weight is brought there only for each forward pass."""
        return execution_device(self)

    def product(self, x: Tensor, factors: Factors) -> Tensor:
        """As `forward`, with given factors."""
        if factors is None:
            return self.base_product(x)
        if isinstance(factors, CompactFactors):
            return factors.add_to(self.base_product(x), x)
        return self.adapted_product(x, factors)

    def base_product(self, x: Tensor) -> Tensor:
        """The output of the frozen layer alone."""
        return F.linear(x, self.weight, self.bias)

    def adapted_product(self, x: Tensor, factors: LowRankFactors) -> Tensor:
        """The layer with its low-rank term."""
        windows, index = as_windows(x, factors)
        lora_a, lora_b = factors.lora_a.to(x.dtype), factors.lora_b.to(x.dtype)
        y = lowrank_linear(windows, self.weight, lora_a, lora_b, factors.scale, index, self.bias)
        return y.view(*x.shape[:-1], self.out_features)


_HOOKS = tuple(name for name in vars(nn.Module()) if "hook" in name)


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks around its calls, or an overridden forward."""
    return "forward" in vars(module) or any(getattr(module, name) for name in _HOOKS)


def _share_hooks(source: nn.Module, target: nn.Module) -> None:
    """Share the hook dictionaries: a hook added to one layer also runs on the other, and can be removed from either."""
    for name in _HOOKS:
        target.__dict__[name] = source.__dict__[name]
