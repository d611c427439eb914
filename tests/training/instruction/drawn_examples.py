"""Examples of drawn lengths, for tests that look at batches."""

import math

import numpy as np
import torch
from tiny import VOCABULARY

from gakernels.data.chat import EncodedConversation, EncodedRecord


def drawn_conversation(asked: int, answered: int) -> EncodedConversation:
    tokens = torch.randint(3, VOCABULARY, (asked + answered,)).numpy().astype(np.int32)
    return EncodedConversation(tokens, np.arange(asked + answered) >= asked)


def drawn_example(context: int, conversations: int, asked: int = 5, answered: int = 3) -> EncodedRecord:
    """A context, and conversations of up to the given lengths."""
    said = [drawn_conversation(_up_to(asked), _up_to(answered)) for _ in range(conversations)]
    return EncodedRecord(torch.randint(3, VOCABULARY, (context,)).numpy().astype(np.int32), tuple(said))


def realistic_examples(count: int) -> list[EncodedRecord]:
    """Contexts of 200 to 8,000 tokens, log-normal about 1,300; questions and answers as long as those of SQuAD."""
    examples = []
    for _ in range(count):
        context = int(min(8000, max(200, _log_normal(1300, 0.9))))
        questions = 1 + _up_to(24)
        said = [
            drawn_conversation(15 + int(min(60, _log_normal(13, 0.4))), 1 + int(min(60, _log_normal(4, 0.8))))
            for _ in range(questions)
        ]
        examples.append(EncodedRecord(np.full(context, 3, dtype=np.int32), tuple(said)))
    return examples


def _up_to(most: int) -> int:
    return int(torch.randint(1, most + 1, ()))


def _log_normal(median: float, sigma: float) -> float:
    return math.exp(math.log(median) + sigma * float(torch.randn(())))
