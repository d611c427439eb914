"""GeneratorConfig: what is adapted and how large the generators are; stored with every generator."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from gakernels.errors import InputError
from gakernels.nn.adapter_generator import NORMS, SKETCH_SIDES
from gakernels.ops.low_rank_polar import DEFAULT_DAMPING


@dataclass(frozen=True)
class GeneratorConfig:
    """Settings of all generators of a model; the defaults are the paper's (section 3).

    Attributes:
        linears: names of the adapted linear layers inside a decoder layer, whole (`self_attn.o_proj`) or the last
            part (`o_proj`).
        layers: numbers of the adapted decoder layers, counted from 0; None for all.
        state_size: d_r.
        rank: r.
        scale: factor of the adapter; None for 64 / d_r (alpha 64: 1/16 at d_r = 1024, as for Mistral in the paper).
        chunk_size: largest number of tokens in a context chunk.
        norm: `polar` or `frobenius`.
        damping: tau of the polar factor (docs/numerics.md).
        power_iterations: of the polar factor.
        seed: of the start values and the sketches.
        sketch_side: `input`: the sketch multiplies S, or `output`: S^T, as in the authors' released generators.
        static_rank: rank of a learned term that is the same for every context (`AdapterGenerator`); 0 for none.

    Raises:
        InputError: a value is out of range.
    """

    linears: tuple[str, ...] = ("o_proj",)
    layers: tuple[int, ...] | None = None
    state_size: int = 1024
    rank: int = 128
    scale: float | None = None
    chunk_size: int = 1024
    norm: str = "polar"
    damping: float = DEFAULT_DAMPING
    power_iterations: int = 1
    seed: int = 0
    sketch_side: str = "input"
    static_rank: int = 0

    def __post_init__(self) -> None:
        self._check_types()
        if not self.linears:
            raise InputError("linears must be a tuple of at least one layer name, but it is empty")
        if self.layers is not None and (not self.layers or len(set(self.layers)) != len(self.layers)):
            raise InputError(f"layers must be different numbers, at least one, but it is {self.layers}")
        for name in ("chunk_size", "state_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, but it is {getattr(self, name)}")
        if not 1 <= self.rank <= self.state_size:
            raise InputError(f"rank must be between 1 and state_size ({self.state_size}), but it is {self.rank}")
        if self.norm not in NORMS:
            raise InputError(f"norm must be one of {', '.join(NORMS)}, but it is {self.norm!r}")
        if self.sketch_side not in SKETCH_SIDES:
            raise InputError(f"sketch_side must be one of {', '.join(SKETCH_SIDES)}, but it is {self.sketch_side!r}")
        for name in ("power_iterations", "static_rank"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be at least 0, but it is {getattr(self, name)}")
        if not 0 <= self.damping < math.inf:
            raise InputError(f"damping must be finite and at least 0, but it is {self.damping}")
        if not math.isfinite(self.adapter_scale):
            raise InputError(f"scale must be finite, but it is {self.scale}")

    def _check_types(self) -> None:
        if isinstance(self.linears, str) or not _all(self.linears, str):
            raise InputError(f"linears must be a tuple of at least one layer name, but it is {self.linears!r}")
        if self.layers is not None and not _all(self.layers, int):
            raise InputError(f"layers must be different numbers, at least one, but it is {self.layers!r}")
        for name in ("state_size", "rank", "chunk_size", "power_iterations", "seed", "static_rank"):
            if not _all([getattr(self, name)], int):
                raise InputError(f"{name} must be an integer, but it is {getattr(self, name)!r}")
        for name, value in (("damping", self.damping), ("scale", 1.0 if self.scale is None else self.scale)):
            if not _all([value], (int, float)):
                raise InputError(f"{name} must be a number, but it is {value!r}")

    @property
    def adapter_scale(self) -> float:
        """The factor in front of lora_B lora_A."""
        return 64 / self.state_size if self.scale is None else self.scale

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "GeneratorConfig":
        """The opposite of `to_dict`.

        Raises:
            InputError: a setting is unknown or out of range.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise InputError(f"unknown generator setting(s) {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **lists})


def _all(values: object, kind: type | tuple[type, ...]) -> bool:
    """Whether it is a list or tuple of values of that type."""
    if not isinstance(values, (list, tuple)):
        return False
    return all(isinstance(value, kind) and not isinstance(value, bool) for value in values)
