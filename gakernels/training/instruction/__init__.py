"""Instruction tuning: conversations about contexts, with a loss on the answers (docs/training.md)."""
