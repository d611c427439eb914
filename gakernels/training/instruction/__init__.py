"""Instruction tuning: conversations about contexts, with a loss on the answers (docs/instruction_tuning.md)."""
