"""The embedded demo: invented people, their facts, and a word-level tokenizer for both."""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
TINY_GENERATOR = ASSETS / "generator"
