"""Experiments that are run once and described in docs/: study.md, numerics.md, formats.md, quantized_base.md."""
