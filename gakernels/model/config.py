"""GeneratorConfig: which layers are adapted and how large the generators are; stored with every generator."""

from dataclasses import asdict
from typing import Annotated, Any

from pydantic import Field

from gakernels.errors import InputError
from gakernels.nn.adapter_generator import NORMS, SKETCH_SIDES
from gakernels.ops.low_rank_polar import DEFAULT_DAMPING
from gakernels.settings import AtLeastZero, Count, Finite, Flag, Int, Weight, one_of, settings


@settings
class GeneratorConfig:
    """Settings of all generators of a model; the defaults are the paper's (section 3).

    Attributes:
        linears: names of the adapted linear layers inside a decoder layer, in full (`self_attn.o_proj`) or only the
            last part (`o_proj`).
        layers: indices of the adapted decoder layers, from 0; None for all.
        state_size: d_r.
        rank: r.
        scale: factor of the adapter; None for 64 / d_r (alpha 64: 1/16 at d_r = 1024, as for Mistral in the paper).
        chunk_size: largest number of tokens in a context chunk.
        norm: `polar` or `frobenius`.
        damping: tau of the polar factor (docs/numerics.md).
        power_iterations: number of power iterations of the polar factor.
        seed: seed of the initial parameters and the sketches.
        sketch_side: the sketch multiplies S (`input`) or S^T (`output`, as in the authors' released generators).
        static_rank: rank of a learned term that is the same for every context (`AdapterGenerator`); 0 for none.
        token_weights: whether the tokens of a context have learned weights (`AdapterGenerator`).
        delta_rule: whether a token replaces what the state says about its key, instead of adding to it
            (`gakernels.ops.delta_state`); not with token_weights.

    Raises:
        InputError: a value is out of range, or both token_weights and delta_rule are true.
    """

    linears: Annotated[tuple[str, ...], Field(min_length=1)] = ("o_proj",)
    layers: tuple[Int, ...] | None = None
    state_size: Count = 1024
    rank: Int = 128
    scale: Finite | None = None
    chunk_size: Count = 1024
    norm: Annotated[str, one_of(NORMS)] = "polar"
    damping: Weight = DEFAULT_DAMPING
    power_iterations: AtLeastZero = 1
    seed: Int = 0
    sketch_side: Annotated[str, one_of(SKETCH_SIDES)] = "input"
    static_rank: AtLeastZero = 0
    token_weights: Flag = False
    delta_rule: Flag = False

    def __post_init__(self) -> None:
        if self.layers is not None and (not self.layers or len(set(self.layers)) != len(self.layers)):
            raise InputError(f"layers must be different numbers, at least one, but it is {self.layers}")
        if not 1 <= self.rank <= self.state_size:
            raise InputError(f"rank must be between 1 and state_size ({self.state_size}), but it is {self.rank}")
        if self.token_weights and self.delta_rule:
            raise InputError("token_weights must be false with delta_rule, under which tokens have weights anyway")

    @property
    def adapter_scale(self) -> float:
        """The factor in front of lora_B lora_A."""
        return 64 / self.state_size if self.scale is None else self.scale

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON types."""
        # Without what is off, as earlier versions wrote it.
        return {
            name: value for name, value in asdict(self).items() if name not in ("token_weights", "delta_rule") or value
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "GeneratorConfig":
        """The opposite of `to_dict`.

        Raises:
            InputError: a setting is unknown or out of range.
        """
        return cls(**values)
