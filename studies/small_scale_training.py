"""Training of the small-scale study: generators on the demo's base, on the paper's two objectives alone.

A text tells facts about one invented person, then repeats some of them among new ones; so a part of what follows can be
predicted from what precedes it, as in any text. No questions are trained on.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from random import Random

import torch

from gakernels.data.people import ATTRIBUTES, Document, Fact, Split, draw_people
from gakernels.files import replacing_folder
from gakernels.model import GenerativeAdapter, load_base
from gakernels.model.config import GeneratorConfig
from gakernels.model.static_lora import STATIC_LORA_FILE, StaticLora, static_adapter
from gakernels.model.window_losses import Loss, WindowBatch, window_losses
from gakernels.model.windows import pad_windows, split_evenly
from gakernels.training.objective import WindowObjective
from gakernels.training.trainer import Trainer, TrainerConfig

BASE = Path(str(files("gakernels.demo") / "assets" / "base"))
STATIC = "static_lora"
BOTH = (("reconstruction", 1.0), ("completion", 1.0))
MOST_FACTS = 16
STATE_SIZE, RANK = 128, 32


@dataclass(frozen=True)
class Variant:
    """A row of the ablation.

    Attributes:
        loss_weights: of the two objectives.
        norm: of the generated adapter.
        scale: of the generated adapter.
        linears: adapted layers.
        token_weights: whether the tokens of a context have learned weights.
        delta_rule: whether a token replaces what the state says about its key.
        rank: r.
    """

    loss_weights: tuple[tuple[str, float], ...] = BOTH
    norm: str = "polar"
    scale: float = 1.0
    linears: tuple[str, ...] = ("o_proj", "down_proj")
    token_weights: bool = False
    delta_rule: bool = False
    rank: int = RANK


VARIANTS = {
    "default": Variant(),
    "reconstruction_only": Variant((("reconstruction", 1.0), ("completion", 0.0))),
    "completion_only": Variant((("reconstruction", 0.0), ("completion", 1.0))),
    "frobenius": Variant(norm="frobenius"),
    "frobenius_equal_norm": Variant(norm="frobenius", scale=RANK**0.5),
    "attention_only": Variant(linears=("o_proj",)),
    "token_weights": Variant(token_weights=True),
    "delta_rule": Variant(delta_rule=True),
    "rank_64": Variant(rank=64),
    "rank_128": Variant(rank=128),
    "delta_rule_rank_64": Variant(delta_rule=True, rank=64),
    "delta_rule_rank_128": Variant(delta_rule=True, rank=128),
}


def draw_texts(rng: Random, facts: int, split: Split) -> tuple[Document, Document]:
    """Facts about a person, and the continuation: a third of them again, among as many new ones."""
    (person,) = draw_people(rng, 1, split)
    repeated = max(1, facts // 3)
    drawn = [  # one attribute each
        Fact(person, attribute, rng.choice(attribute.values)) for attribute in rng.sample(ATTRIBUTES, facts + repeated)
    ]
    told, new = drawn[:facts], drawn[facts:]
    following = rng.sample(told, repeated) + new
    rng.shuffle(following)
    return Document((person,), tuple(told)), Document((person,), tuple(following))


def step_windows(model: GenerativeAdapter, steps: int, seed: int, documents: int, step: int) -> Sequence[WindowBatch]:
    """The windows of a step; texts grow from 3 facts to 16 over the first 60% of the steps."""
    rng = Random(seed * 1_000_003 + step)
    facts = 3 + round((MOST_FACTS - 3) * min(1.0, step / steps / 0.6))
    return [text_windows(model, [draw_texts(rng, facts, "train") for _ in range(documents)])]


def text_windows(model: GenerativeAdapter, texts: Sequence[tuple[Document, Document]]) -> WindowBatch:
    """For each text: T chunks of context, the same again to reconstruct, and the continuation to complete.

    The copies and the continuation are read with the adapter of the whole context.
    """
    told = [split_evenly(_tokens(model, text), model.config.chunk_size) for text, _ in texts]
    chunks = max(len(context) for context in told)
    padded = [[*context, *[[] for _ in range(chunks - len(context))]] for context in told]
    rows = [[*row, *row, _tokens(model, after)] for row, (_, after) in zip(padded, texts, strict=True)]
    input_ids, mask = pad_windows(rows, pad=0)
    reconstruction, completion = torch.zeros_like(mask), mask.clone()
    reconstruction[:, chunks : 2 * chunks] = mask[:, chunks : 2 * chunks]
    completion[:, 0] = False
    completion[:, chunks : 2 * chunks] = False
    targets = {"reconstruction": reconstruction, "completion": completion}
    return WindowBatch(input_ids, mask, chunks, (*range(chunks), *[chunks] * (chunks + 1)), targets)


def _tokens(model: GenerativeAdapter, document: Document) -> list[int]:
    assert model.tokenizer is not None
    return list(model.tokenizer(document.text())["input_ids"])


def trainer_config(variant: Variant, steps: int, label: str) -> TrainerConfig:
    """The trainer settings of the demo's generator."""
    return TrainerConfig(
        steps=steps,
        learning_rate=3e-3,
        warmup_steps=min(30, steps),
        betas=(0.9, 0.98),
        loss_weights=variant.loss_weights,
        log_every=25,
        checkpoint_every=100,
        keep_checkpoints=1,
        label=label,
    )


def build(base: Path, variant: Variant, seed: int) -> GenerativeAdapter:
    """The base model with untrained generators."""
    config = GeneratorConfig(
        linears=variant.linears,
        state_size=STATE_SIZE,
        rank=variant.rank,
        scale=variant.scale,
        chunk_size=128,
        norm=variant.norm,
        seed=seed,
        token_weights=variant.token_weights,
        delta_rule=variant.delta_rule,
    )
    language_model, tokenizer = load_base(str(base), dtype=torch.float32)
    return GenerativeAdapter(language_model, config, tokenizer)


def train(folder: Path, base: Path, name: str, seed: int, steps: int, documents: int = 4) -> None:
    """Train a variant, or `static_lora` in place of the default's generators, and write it to `folder/NAME-SEED`.

    An interrupted run resumes; a finished one is left as it is.
    """
    target = folder / f"{name}-{seed}"
    static = name == STATIC
    variant = VARIANTS["default" if static else name]
    if target.exists():
        return
    model = build(base, variant, seed)
    lora = StaticLora(model)
    trained = lora if static else model.generators

    def losses(batch: WindowBatch) -> dict[str, Loss]:
        return lora.window_losses(model, batch) if static else window_losses(model, batch)

    objective = WindowObjective(lambda step: step_windows(model, steps, seed, documents, step), losses)
    config = trainer_config(variant, steps, target.name)
    settings = {"variant": asdict(variant), "static": static, "seed": seed, "documents": documents}
    parameters = dict(trained.named_parameters())
    Trainer(config, parameters, objective, folder / "runs" / target.name, settings, progress=False).run()
    if static:
        with replacing_folder(target) as temporary:
            static_adapter(model, lora.factors()).save(temporary / STATIC_LORA_FILE)
    else:
        model.save_pretrained(target, base_name=str(base))


def main() -> None:
    """Train what the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for generators and logs")
    parser.add_argument("--variants", nargs="+", choices=[*VARIANTS, STATIC], default=[*VARIANTS, STATIC])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for seed in arguments.seeds:
        for name in arguments.variants:
            train(arguments.output, BASE, name, seed, arguments.steps)


if __name__ == "__main__":
    main()
