"""The word-level tokenizer of the demo: every word is one token."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from gakernels.data.people import vocabulary

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the tokenizer: words and punctuation marks, with `<bos>` prepended."""
    words = [PAD, BOS, EOS, UNK, *vocabulary()]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), behavior="removed", invert=True)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, words.index(BOS))]
    )
    # The word-piece decoder joins with spaces, except before "." and "?"; no word starts with its prefix.
    backend.decoder = decoders.Sequence([decoders.WordPiece(prefix="##"), decoders.Replace(" :", ":")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNK)
