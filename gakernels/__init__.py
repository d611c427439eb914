"""Turn contexts into low-rank adapters of a frozen language model, in one forward pass."""

from gakernels.adapters.adapter import Adapter
from gakernels.adapters.compact import CompactAdapter
from gakernels.errors import BackendError, FormatError, InputError
from gakernels.integrations.transformers import get_generative_model
from gakernels.model import GenerativeAdapter
from gakernels.model.config import GeneratorConfig
from gakernels.model.stream import ContextStream
from gakernels.nn import AdaptedLinear, AdapterGenerator, LowRankFactors
from gakernels.ops import context_state, delta_state, low_rank_polar, lowrank_linear
from gakernels.version import __version__

__all__ = [
    "AdaptedLinear",
    "Adapter",
    "AdapterGenerator",
    "BackendError",
    "CompactAdapter",
    "ContextStream",
    "FormatError",
    "GenerativeAdapter",
    "GeneratorConfig",
    "InputError",
    "LowRankFactors",
    "__version__",
    "context_state",
    "delta_state",
    "get_generative_model",
    "low_rank_polar",
    "lowrank_linear",
]
