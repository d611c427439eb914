"""A word-level tokenizer and invented text, for the tests that read text."""

import tokenizers
import torch
from tiny import VOCABULARY
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast


def make_tokenizer(bos: bool = True, eos: bool = True, longest: int | None = None) -> PreTrainedTokenizerFast:
    """Words w3..w63, and the special tokens of Llama."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"unk_token": "<unk>"}
    if bos:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        special["bos_token"] = "<s>"
    if eos:
        special["eos_token"] = "</s>"
    lengths = {} if longest is None else {"model_max_length": longest}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **lengths)


def random_text(words: int, per_line: int = 10) -> str:
    """Lines of words of which few are frequent, as in language."""
    ranks = torch.arange(1, VOCABULARY - 2).float()
    drawn = torch.multinomial(ranks**-1.5, words, replacement=True) + 3
    lines = [drawn[start : start + per_line].tolist() for start in range(0, words, per_line)]
    return "".join(" ".join(f"w{token}" for token in line) + "\n" for line in lines)
