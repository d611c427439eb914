"""Make the demo's models: `python -m gakernels.demo.train --output FOLDER`.

Trains the base model, freezes it, trains the generator on it, and writes `base/`, `generator/` and the logs. If it is
interrupted and started again, it resumes.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from gakernels.demo.base_training import BaseRecipe, base_losses, build_base
from gakernels.demo.experiment import DemoResult
from gakernels.demo.experiment import run as run_experiment
from gakernels.demo.generator_training import GeneratorRecipe, generator_losses
from gakernels.demo.tokenizer import build_tokenizer
from gakernels.files import replacing_folder, write_text
from gakernels.model import GenerativeAdapter
from gakernels.model.config import GeneratorConfig
from gakernels.model.window_losses import Loss
from gakernels.paths import user_path
from gakernels.training.trainer import Trainer, TrainerConfig


def train_base(folder: Path, recipe: BaseRecipe) -> LlamaForCausalLM:
    """Train the base model and write it to `folder/base`; its log is `folder/base_training/log.jsonl`."""
    tokenizer = build_tokenizer()
    model = build_base(recipe, tokenizer)
    config = TrainerConfig(
        steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        warmup_steps=60,
        betas=(0.9, 0.98),
        log_every=50,
        checkpoint_every=200,
        label="base model",
    )

    def objective(step: int) -> dict[str, Loss]:
        return base_losses(model, tokenizer, recipe, step)

    settings = {"recipe": asdict(recipe)}
    Trainer(config, dict(model.named_parameters()), objective, folder / "base_training", settings).run()
    with replacing_folder(folder / "base") as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return model


def train_generator(folder: Path, base: LlamaForCausalLM, recipe: GeneratorRecipe) -> GenerativeAdapter:
    """Train the generator and write it to `folder/generator`; its log is in `folder/generator_training`."""
    config = GeneratorConfig(
        linears=("o_proj", "down_proj"),
        state_size=recipe.state_size,
        rank=recipe.rank,
        scale=1.0,
        chunk_size=128,
        seed=recipe.seed,
    )
    model = GenerativeAdapter(base, config, build_tokenizer())
    trainer = TrainerConfig(
        steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        warmup_steps=30,
        betas=(0.9, 0.98),
        loss_weights=recipe.loss_weights,
        log_every=50,
        checkpoint_every=200,
        label="generator",
    )

    def objective(step: int) -> dict[str, Loss]:
        return generator_losses(model, recipe, step)

    settings = {"recipe": asdict(recipe), "base": model.base_fingerprint()}
    parameters = dict(model.generators.named_parameters())
    Trainer(trainer, parameters, objective, folder / "generator_training", settings).run()
    model.save_pretrained(folder / "generator", base_name="../base")
    return model


def main(arguments: Sequence[str] | None = None) -> None:
    """Train both and print the accuracies on new people."""
    parser = argparse.ArgumentParser(prog="python -m gakernels.demo.train", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=user_path, required=True, help="folder for models and logs")
    parser.add_argument("--base-steps", type=int, default=BaseRecipe.steps, help="default: %(default)s")
    parser.add_argument("--generator-steps", type=int, default=GeneratorRecipe.steps, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    base = train_base(options.output, BaseRecipe(steps=options.base_steps, seed=options.seed))
    recipe = GeneratorRecipe(steps=options.generator_steps, seed=options.seed)
    model = train_generator(options.output, base, recipe)
    result: DemoResult = run_experiment(model, seed=1_000_000, questions=1000)
    text = json.dumps(result.to_dict(), indent=2) + "\n"
    write_text(options.output / "accuracy.json", text)
    print(text)


if __name__ == "__main__":
    main()
