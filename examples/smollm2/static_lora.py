"""The control that sees no context: one LoRA of the generator's layers and rank, tuned on the same questions.

    python static_lora.py --data data/long/squad.jsonl --data data/long/nq_swap.jsonl --output static-lora.safetensors

`gakernels eval --static-lora static-lora.safetensors` evaluates it. What it gains over the base model is what any
tuning on such questions gives.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import torch

from gakernels import GenerativeAdapter
from gakernels.demo import smollm2
from gakernels.evaluation.datasets import Question, read_flat_qa
from gakernels.evaluation.tuned_methods import TuningExample, TuningSettings, tune_lora
from gakernels.model.static_lora import static_adapter


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, action="append", required=True, help="rows {context, qas}; repeat")
    parser.add_argument("--questions", type=int, default=20_000, help="drawn by --seed (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    model = smollm2.load(torch.bfloat16)
    questions = [question for path in options.data for question in read_flat_qa(str(path)).questions]
    drawn = Random(options.seed).sample(questions, min(options.questions, len(questions)))
    settings = TuningSettings(options.learning_rate, epochs=1, batch_size=64, seed=options.seed)
    torch.manual_seed(options.seed)
    with torch.autocast("cpu", torch.bfloat16):
        factors = tune_lora(model, list(examples(model, drawn)), settings)
    static_adapter(model, factors).save(options.output)
    print(f"tuned on {len(drawn)} questions: {options.output}")


def examples(model: GenerativeAdapter, questions: Sequence[Question]) -> Iterator[TuningExample]:
    """Each question as the generator's tuning asks it; the first answer and the end of text are learned."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    for question in questions:
        said = [{"role": "user", "content": question.text}]
        prompt = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
        answer = tokenizer(f" {question.answers[0]}", add_special_tokens=False)["input_ids"]
        yield TuningExample((*prompt, *answer, tokenizer.eos_token_id), len(prompt))


if __name__ == "__main__":
    main()
