"""AdapterGenerator: turns the hidden states of a context into a low-rank adapter of one linear layer."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gakernels.errors import InputError
from gakernels.nn.frozen_rms_norm import rms_norm
from gakernels.ops import autocast, context_state, delta_state, low_rank_polar
from gakernels.ops.low_rank_polar import DEFAULT_DAMPING

NORMS = ("polar", "frobenius")
SKETCH_SIDES = ("input", "output")


class AdapterGenerator(nn.Module):
    """The bilinear generator of one linear layer: Delta W = scale A1 norm(S) B2, S = A2 (sum h h^T) B1 (section 2.2).

    Initially the adapter is zero, because A1 is; the other maps are initialised as in the released code, normal with
    standard deviation sqrt(1/3) / sqrt(fan_in).

    A static term, scale B_s A_s with `static_rank` > 0, is learned in addition to the generated one and is part of
    every adapter, even that of a zero state. It captures what all contexts have in common, as in Doc-to-LoRA.

    Args:
        hidden_size: d_h, size of the context's hidden states.
        in_features: d_in of the adapted linear layer.
        out_features: d_out of the adapted linear layer.
        state_size: d_r.
        rank: r, at most d_r. Not used with `norm="frobenius"`, where the adapter has rank d_r.
        norm: `polar` (equations 6-9, see `low_rank_polar`) or `frobenius` (S / ||S||_F, the paper's ablation).
        damping: tau of the polar factor.
        power_iterations: of the polar factor.
        sketch_seed: seed of the fixed Gaussian sketch Omega, a buffer that is stored with the generator.
        sketch_side: what the sketch multiplies: S (`input`), or S^T (`output`), as in the authors' released code.
        static_rank: of the static term; 0 for none, as in the paper.
        token_weights: whether each token has a learned weight: S = A2 (sum w h h^T) B1 with w = sigmoid(g . h); all are
            equal at the start.
        delta_rule: whether a token replaces what the state says about its key, by the same weight, instead of adding to
            it (`gakernels.ops.delta_state`).
        eps: of the RMSNorm before the projections.

    Raises:
        InputError: rank > state_size, a size below 1, a negative static_rank, an unknown norm or sketch side, or both
            token_weights and delta_rule.
    """

    sketch: Tensor
    static_lora_a: nn.Parameter | None
    static_lora_b: nn.Parameter | None
    token_gate: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        in_features: int,
        out_features: int,
        *,
        state_size: int,
        rank: int,
        norm: str = "polar",
        damping: float = DEFAULT_DAMPING,
        power_iterations: int = 1,
        sketch_seed: int = 0,
        sketch_side: str = "input",
        static_rank: int = 0,
        token_weights: bool = False,
        delta_rule: bool = False,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(hidden_size, in_features, out_features, state_size, rank, norm)
        if sketch_side not in SKETCH_SIDES:
            raise InputError(f"sketch_side must be one of {', '.join(SKETCH_SIDES)}, but it is {sketch_side!r}")
        self.norm, self.damping, self.power_iterations, self.eps = norm, damping, power_iterations, eps
        if static_rank < 0:
            raise InputError(f"static_rank must be at least 0, but it is {static_rank}")
        if token_weights and delta_rule:
            raise InputError("token_weights must be false with delta_rule, under which tokens have weights anyway")
        self.sketch_side, self.static_rank, self.delta_rule = sketch_side, static_rank, delta_rule

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.norm_weight = empty(hidden_size)
        self.output_map = empty(out_features, state_size)  # A1
        self.value_projection = empty(state_size, hidden_size)  # A2
        self.key_projection = empty(hidden_size, state_size)  # B1
        self.input_map = empty(state_size, in_features)  # B2
        self.static_lora_a = empty(static_rank, in_features) if static_rank else None  # A_s
        self.static_lora_b = empty(out_features, static_rank) if static_rank else None  # B_s
        self.token_gate = empty(hidden_size) if token_weights or delta_rule else None  # g
        self.register_buffer("sketch", _gaussian(state_size, rank, sketch_seed).to(self.norm_weight))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all maps; the sketch stays."""
        with torch.no_grad():
            self.norm_weight.fill_(1)
            self.output_map.zero_()
            if self.token_gate is not None:
                self.token_gate.zero_()  # all tokens weigh the same
            maps = [
                (self.value_projection, self.value_projection.shape[1]),
                (self.key_projection, self.key_projection.shape[0]),
                (self.input_map, self.input_map.shape[1]),
            ]
            if self.static_lora_a is not None and self.static_lora_b is not None:
                self.static_lora_b.zero_()
                maps.append((self.static_lora_a, self.static_lora_a.shape[1]))
            for parameter, fan_in in maps:
                parameter.normal_(std=math.sqrt(1 / 3 / fan_in))

    def states(self, hidden: Tensor, mask: Tensor | None = None, initial_state: Tensor | None = None) -> Tensor:
        """S_1..S_T (B, T, d_r, d_r) of the hidden states (B, T, M, d_h), from the state (B, d_r, d_r) before them.

        Computed in the dtype of the parameters; accumulated in float32 or wider. See `gakernels.ops.context_state`.
        """
        normed = self._normalize(hidden)
        # The weight of the norm goes into the projections: they are much smaller than the hidden states.
        value_projection, key_projection = (
            self.value_projection * self.norm_weight,
            self.key_projection * self.norm_weight[:, None],
        )
        if self.token_gate is not None:
            logits = normed @ self.token_gate.to(normed.dtype)
            weight = torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))
            if self.delta_rule:
                return delta_state(normed, value_projection, key_projection, weight, mask, initial_state)
            normed = normed * weight.sqrt().to(normed.dtype)[..., None]  # the state is of second degree in them
        return context_state(normed, value_projection, key_projection, mask, initial_state)

    def _normalize(self, hidden: Tensor) -> Tensor:
        dtype = self.value_projection.dtype
        if autocast.is_enabled(hidden.device) and hidden.dtype == torch.get_autocast_dtype(hidden.device.type):
            return rms_norm(hidden, None, self.eps)  # the same as autocasting the wide result, without keeping it
        if hidden.dtype != dtype:  # else rms_norm itself computes in float32 and rounds once
            hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        return F.rms_norm(hidden, self.norm_weight.shape, eps=self.eps).to(dtype)

    def factors(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """lora_A = V^T B2 (..., r, d_in) and lora_B = A1 U (..., d_out, r) of states (..., d_r, d_r).

        With a static term [V^T B2; A_s] and [A1 U, B_s], of rank r + static_rank.
        """
        return self.expand(*self.norm_factors(states))

    def expand(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """lora_A and lora_B, as `factors`, of U and V (..., d_r, r)."""
        dtype = self.output_map.dtype
        lora_a, lora_b = right.to(dtype).mT @ self.input_map, self.output_map @ left.to(dtype)
        if self.static_lora_a is None or self.static_lora_b is None:
            return lora_a, lora_b
        front = lora_a.shape[:-2]
        static_a, static_b = (static.expand(*front, -1, -1) for static in (self.static_lora_a, self.static_lora_b))
        return torch.cat([lora_a, static_a], dim=-2), torch.cat([lora_b, static_b], dim=-1)

    def empty_factors(self) -> tuple[Tensor, Tensor]:
        """lora_A (r + k, d_in) and lora_B (d_out, r + k) of a zero state, whose norm is zero: the static term alone.

        Raises:
            InputError: there is no static term.
        """
        if self.static_lora_a is None or self.static_lora_b is None:
            raise InputError("the generator has no static term, so a zero state has no adapter")
        rank = self.sketch.shape[0 if self.norm == "frobenius" else 1]
        return F.pad(self.static_lora_a, (0, 0, rank, 0)), F.pad(self.static_lora_b, (rank, 0))

    def shared_maps(self) -> tuple[Tensor, Tensor]:
        """The part that the adapters of all contexts share: [A1, B_s] (d_out, d_r + k) and [B2; A_s] (d_r + k, d_in).

        k is the static rank. With U and V as one diagonal block and the identity of size k as the other, they form
        the adapter.
        """
        if self.static_lora_a is None or self.static_lora_b is None:
            return self.output_map, self.input_map
        return torch.cat([self.output_map, self.static_lora_b], 1), torch.cat([self.input_map, self.static_lora_a])

    def norm_factors(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """U, V (..., d_r, r) of norm(S) = U V^T, in the dtype of the states; only their product is meaningful."""
        if self.norm == "frobenius":
            return _frobenius(states)
        sketch = self.sketch.to(states.dtype)
        if self.sketch_side == "input":
            return low_rank_polar(states, sketch, self.power_iterations, self.damping)
        right, left = low_rank_polar(states.mT, sketch, self.power_iterations, self.damping)
        return left, right

    def forward(
        self, hidden: Tensor, mask: Tensor | None = None, initial_state: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns lora_A (B, T, r, d_in), lora_B (B, T, d_out, r) and the states they come from."""
        states = self.states(hidden, mask, initial_state)
        return *self.factors(states), states

    def extra_repr(self) -> str:
        sizes = f"hidden={self.norm_weight.shape[0]}, in={self.input_map.shape[1]}, out={self.output_map.shape[0]}"
        static = f", static_rank={self.static_rank}" if self.static_rank else ""
        weights = "" if self.token_gate is None else ", delta_rule" if self.delta_rule else ", token_weights"
        return f"{sizes}, state={self.sketch.shape[0]}, rank={self.sketch.shape[1]}, norm={self.norm}{static}{weights}"


def _frobenius(states: Tensor) -> tuple[Tensor, Tensor]:
    """S / ||S||_F = left right^T with right = I; zero for a zero state."""
    size = states.square().sum((-2, -1), keepdim=True)
    scale = torch.where(size == 0, 0.0, torch.where(size == 0, 1.0, size).rsqrt())
    identity = torch.eye(states.shape[-1], dtype=states.dtype, device=states.device)
    return states * scale, identity.expand_as(states)


def _gaussian(rows: int, columns: int, seed: int) -> Tensor:
    """The same matrix on every device: drawn on the CPU in float32."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), device="cpu", dtype=torch.float32)


def _check_sizes(hidden: int, inputs: int, outputs: int, state_size: int, rank: int, norm: str) -> None:
    sizes = {"hidden_size": hidden, "in_features": inputs, "out_features": outputs, "state_size": state_size}
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"{name} must be at least 1, but it is {size}")
    if not 1 <= rank <= state_size:
        raise InputError(f"rank must be between 1 and state_size ({state_size}), but it is {rank}")
    if norm not in NORMS:
        raise InputError(f"norm must be one of {', '.join(NORMS)}, but it is {norm!r}")
