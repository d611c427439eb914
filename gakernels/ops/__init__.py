"""The operations of the method, and `gated_product` of the frozen base.

Each is one public function, defined in plain PyTorch in its `reference.py`.
"""

from gakernels.ops.context_state import context_state
from gakernels.ops.delta_state import delta_state
from gakernels.ops.gated_product import gated_product
from gakernels.ops.low_rank_polar import low_rank_polar
from gakernels.ops.lowrank_linear import lowrank_linear

__all__ = ["context_state", "delta_state", "gated_product", "low_rank_polar", "lowrank_linear"]
