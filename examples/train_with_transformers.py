"""transformers' Trainer trains generators: its arguments, callbacks, logs and accelerate's processes serve as usual.

    python examples/train_with_transformers.py FOLDER

A few steps on texts about invented people, for the small base model of the package; needs the package accelerate.
"""

import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from random import Random

from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from gakernels import GenerativeAdapter, GeneratorConfig, get_generative_model
from gakernels.data.people import draw_document
from gakernels.integrations.collators import PretrainingCollator

BASE = Path(str(files("gakernels.demo") / "assets" / "base"))
CHUNKS, CHUNK = 4, 64


def main(folder: Path, steps: int = 40) -> tuple[float, float]:
    """Train, save, load; returns the loss on held-out texts before and after."""
    base, tokenizer = AutoModelForCausalLM.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)
    config = GeneratorConfig(linears=("o_proj", "down_proj"), state_size=64, rank=16, scale=1.0, chunk_size=CHUNK)
    model = get_generative_model(base, config, tokenizer)
    documents = (draw_document(Random(seed), people=3).text() for seed in range(200))
    tokens = [token for text in documents for token in tokenizer(text)["input_ids"]]
    size = CHUNKS * CHUNK
    rows = [{"input_ids": tokens[start : start + size]} for start in range(0, len(tokens) - size, size)]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(folder),
            max_steps=steps,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
        ),
        data_collator=PretrainingCollator(CHUNKS),
        train_dataset=rows[16:],
        eval_dataset=rows[:16],
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()  # generator.safetensors, without the base model
    adapter = GenerativeAdapter.from_pretrained(folder).adapt("The pet of Mira Branden is grey hamster.")
    print(f"loss {before:.3f} -> {after:.3f}; an adapter has {adapter.numbers():,} numbers")
    return before, after


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
