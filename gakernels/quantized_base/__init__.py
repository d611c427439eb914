"""A frozen base model in 8 or 4 bits: see docs/quantized_base.md."""

from gakernels.quantized_base.conversion import QUANTIZATIONS, quantize_base
from gakernels.quantized_base.float8_linear import Float8Linear

__all__ = ["QUANTIZATIONS", "Float8Linear", "quantize_base"]
