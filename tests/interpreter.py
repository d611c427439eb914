"""Triton's interpreter on a CPU, with bfloat16 and loop bounds put right.

The interpreter keeps bfloat16 numbers as 16-bit integers, multiplies those in `tl.dot`, and cuts float32 off to
bfloat16. The kernels of the library use bfloat16 only where it is loaded, stored, cast, selected and multiplied by
`tl.dot`; here the last two go through float32, rounded to nearest even as on a GPU.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def correct_bfloat16() -> None:
    """Exchange the two methods of the interpreter's builder."""
    builder = interpreter.InterpreterBuilder
    plain_dot, plain_cast = builder.create_dot, builder.cast_impl

    def wide(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain_dot(self, wide(a), wide(b), *rest)

    def cast(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == tl.bfloat16 and target.scalar != tl.bfloat16:
            return plain_cast(self, wide(source), target) if target.scalar != tl.float32 else wide(source)
        if target.scalar == tl.bfloat16 and source.dtype.scalar != tl.bfloat16:
            return interpreter.TensorHandle(_round(source.data.astype(np.float32)), tl.bfloat16)
        return plain_cast(self, source, target)

    builder.create_dot, builder.cast_impl = create_dot, cast


def correct_loop_bounds() -> None:
    """Numbers known at run time alone become integers: Triton 3.6 leaves that to a conversion that NumPy 2.5 lacks."""
    plain = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        plain(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch


def _round(values: np.ndarray) -> np.ndarray:
    """The upper halves of float32 numbers, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)
