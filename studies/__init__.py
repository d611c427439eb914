"""Experiments that are run once and told in docs/: study.md, numerics.md, formats.md, quantized_base.md."""
