"""AdaptedOpaqueLinear: an `AdaptedLinear` over a frozen linear layer whose weight is not a plain matrix."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gakernels.errors import InputError
from gakernels.nn.adapted_linear import AdaptedLinear
from gakernels.nn.low_rank_factors import LowRankFactors, add_low_rank_term, as_windows
from gakernels.nn.offloading import only_aligns


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """d_in and d_out of a module that maps (..., d_in) to (..., d_out); None for any other module."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    inputs, outputs = (getattr(module, name, None) for name in ("in_features", "out_features"))
    if isinstance(module, nn.Bilinear) or not isinstance(inputs, int) or not isinstance(outputs, int):
        return None
    return inputs, outputs


def is_linear(module: nn.Module) -> bool:
    """Whether a module maps (..., d_in) to (..., d_out) and contains no other such module."""
    return linear_sizes(module) is not None and not any(is_linear(part) for part in module.children())


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a layer computes x W^T + b from a plain floating-point weight, so that the weight can be used directly.

    False for other kinds of layers, and for an `nn.Linear` whose weight is a tensor subclass with packed numbers, or is
    computed or loaded for each forward pass.
    """
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        return False
    if "forward" in vars(module) and not only_aligns(module):
        return False
    weight = module._parameters.get("weight")  # a parametrised layer has none, but computes it
    if weight is None or type(weight) not in (nn.Parameter, Tensor):
        return False
    return weight.is_floating_point() and weight.element_size() > 1


def adapted(linear: Any) -> AdaptedLinear:
    """A linear layer of any kind, made to accept adapters."""
    return (AdaptedLinear if is_plain_linear(linear) else AdaptedOpaqueLinear).from_linear(linear)


class AdaptedOpaqueLinear(AdaptedLinear):
    """A frozen layer of any kind that maps (..., d_in) to (..., d_out), with an exchangeable adapter.

    The layer itself computes its product and the gradient of its input; the low-rank term is added in the dtype of that
    product. Parameters, buffers and their names are those of the layer, so state dicts don't change.
    """

    def __init__(self, original: Any) -> None:
        nn.Module.__init__(self)
        sizes = linear_sizes(original)
        assert sizes is not None
        self.in_features, self.out_features = sizes
        self._original = (original,)  # in a tuple: not a submodule
        # The same dictionaries: whoever moves or exchanges a parameter here does so there too.
        for shared in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[shared] = original.__dict__[shared]
        self.train(original.training)
        self.requires_grad_(False)

    @classmethod
    def from_linear(cls, linear: Any) -> "AdaptedOpaqueLinear":
        """Wrap a layer: its parameters are shared, not copied, and are frozen."""
        return cls(linear)

    @property
    def original(self) -> Any:
        """The layer that this one adapts."""
        return self._original[0]

    @property
    def mergeable(self) -> bool:
        """Whether a delta can be added to the weight: the layer keeps a plain one and computes x W (+ b) with it."""
        known = isinstance(self.original, Conv1D) or type(self.original).__name__ == "FalconLinear"
        return known and ("forward" not in vars(self.original) or only_aligns(self.original))

    def merged_weight(self, delta: Tensor) -> Tensor:
        """As in `AdaptedLinear`; GPT-2's `Conv1D` has its weight as (d_in, d_out)."""
        return super().merged_weight(delta.T if isinstance(self.original, Conv1D) else delta)

    def to_linear(self) -> Any:
        """The original layer."""
        return self.original.train(self.training)

    def base_product(self, x: Tensor) -> Tensor:
        """The output of the frozen layer alone."""
        y: Tensor = self.original(x)
        return y

    def adapted_product(self, x: Tensor, factors: LowRankFactors) -> Tensor:
        """The layer with its low-rank term."""
        windows, index = as_windows(x, factors)
        y = self.base_product(x)
        if not isinstance(y, Tensor):
            raise InputError(
                f"linears: {type(self.original).__name__} can't be adapted, it returns more than one tensor"
            )
        y = y.reshape(*windows.shape[:-1], self.out_features)
        return add_low_rank_term(y, windows, factors.lora_a, factors.lora_b, factors.scale, index).view(
            *x.shape[:-1], self.out_features
        )

    # The layer keeps its own ways of moving, casting and saving its tensors.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AdaptedOpaqueLinear":
        self.original._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.original._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.original._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """The layer that is adapted."""
        return repr(self.original)
