"""The embedded demo: invented people, their facts, and a word-level tokenizer for both."""
