"""Chat templates of the usual kinds, tokenizers for them, and drawn conversations."""

import tokenizers
import torch
from tiny import VOCABULARY
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from gakernels.data.conversations import Message

ROLES = ("user", "assistant")
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA_2 = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token }}[INST] {{ (system if loop.first else '') + m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's: an empty thought in front of the last answer alone, which is no part of the prompt.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"mistral": MISTRAL, "llama-2": LLAMA_2, "llama-3": LLAMA_3, "chatml": CHATML, "thinking": THINKING}
MARKERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>")


def word_tokenizer(template: str | None = None, eos: bool = True) -> PreTrainedTokenizerFast:
    """Words w3..w33, and what templates are made of; each special token is one token."""
    words = ["INST", "/", "[", "]", "user", "assistant", "system", "<<", ">>", "SYS", "think", "<", ">", "User", ":"]
    words += ["</", "Assistant", "System", "<</", "[/"]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for word in [*[f"w{n}" for n in range(3, 34)], *MARKERS, *words]:
        vocabulary[word] = len(vocabulary)
    assert len(vocabulary) <= VOCABULARY
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _with(tokenizer, template, eos)


def byte_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as Llama 3's, learned from drawn texts."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([sentence() for _ in range(50)], trainer)
    return _with(tokenizer, template)


def piece_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """BPE of words with a space in front, as Llama 2's: `▁word`."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    alphabet = [chr(code) for code in range(33, 127)] + ["\n", "▁", *"äéλ中🙂"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([sentence() for _ in range(50)], trainer)
    return _with(tokenizer, template)


def _with(tokenizer: tokenizers.Tokenizer, template: str | None, eos: bool = True) -> PreTrainedTokenizerFast:
    names = {"bos_token": "<s>", "unk_token": "<unk>"} | ({"eos_token": "</s>"} if eos else {})
    special = [AddedToken(name, special=True, normalized=False) for name in ("<s>", "</s>")[: 1 + eos] + MARKERS]
    tokenizer.add_special_tokens(special)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    wrapped.chat_template = template
    return wrapped


def drawn(low: int, high: int) -> int:
    return int(torch.randint(low, high, ()))


def words(count: int) -> str:
    return " ".join(f"w{drawn(3, 34)}" for _ in range(count))


def sentence() -> str:
    """Letters, digits, marks and characters of several bytes."""
    alphabet = list("abcde etaoin  0123456789.,'(\"-") + list("äéλ中🙂")
    return " ".join("".join(alphabet[drawn(0, len(alphabet))] for _ in range(40)).split()) or "a"


def conversation(exchanges: int, system: bool = False, text: bool = False) -> list[Message]:
    """A drawn conversation of words, or of sentences."""
    said = [Message(ROLES[n % 2], sentence() if text else words(drawn(1, 8))) for n in range(2 * exchanges)]
    return [Message("system", words(4)), *said] if system else said
