"""Instruction tuning: from a recipe to the tuned generator and the report on held-out answers."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from gakernels.data.chat import EncodedRecord, shows_time, template_of
from gakernels.data.instruction_sources import changes
from gakernels.distributed import Parallel, Ranks
from gakernels.errors import FormatError, InputError
from gakernels.model import GenerativeAdapter
from gakernels.model.config import GeneratorConfig
from gakernels.training.base_model import check_tokenizer, load_base_model
from gakernels.training.checkpoint import find_checkpoints, saved_settings
from gakernels.training.generator_run import RECIPE_FILE, GeneratorRun, generator_on
from gakernels.training.instruction.answers import AnswerReport, InstructionObjective, can_pack, score_answers
from gakernels.training.instruction.recipe import FinetuningRecipe
from gakernels.training.instruction.steps import InstructionSteps
from gakernels.training.instruction.tuning_data import TuningData, load_tuning_data
from gakernels.training.recipes import load_recipe
from gakernels.training.run_folder import only_run
from gakernels.training.run_log import StepCost

_NOT_SAID = (
    "its tokens are others, and this run of an earlier version does not say why. If the chat template shows the date, "
    "name the day on which the run began (--set clock=2026-01-31)"
)


def make_tuned_model(recipe: FinetuningRecipe, device: torch.device | str) -> GenerativeAdapter:
    """The base model of a recipe with the generators that it starts from, or untrained ones.

    Raises:
        InputError: a model can't be loaded, or does not have the layers that the recipe adapts.
        FormatError: the generator is damaged or belongs to another base model.
        BackendError: the device can't compute with weights of the recipe's quantization.
    """
    if recipe.start is None:
        assert recipe.model is not None
        base, tokenizer = load_base_model(recipe.model, device)
        return GenerativeAdapter(base, recipe.generator or GeneratorConfig(), tokenizer)
    if recipe.model is None:
        model = GenerativeAdapter.from_pretrained(recipe.start)
        if model.tokenizer is not None:
            check_tokenizer(model.base, model.tokenizer)
        model.base.to(device)
    else:
        model = generator_on(recipe.start, recipe.model, device)
    model.generators.to(device)
    return model


def finetune(
    model: GenerativeAdapter, recipe: FinetuningRecipe, folder: Path, progress: bool = True, ranks: Ranks | None = None
) -> AnswerReport:
    """Tune the generators of a model; resume where an earlier call in the same folder stopped.

    Writes to the folder: `recipe.yaml`, `log.jsonl`, `checkpoints/`, the tuned generator (see
    `GenerativeAdapter.save_pretrained`) and `report.json`. With several processes every one calls this, and the first
    one writes.

    Args:
        model: see `make_tuned_model`.
        recipe: everything else.
        folder: of the run.
        progress: show progress bars.
        ranks: of a process group that is running; one process if not given.

    Returns:
        Scores of held-out answers.

    Raises:
        InputError: the data can't be used, or too much of it can't, settings of the recipe contradict each other, or
            another run is in the folder.
        FormatError: the folder holds a run with other settings.
        FloatingPointError: the run diverged.
        TrainingStopped: a signal came; the same call resumes.
    """
    ranks = ranks or Ranks()
    if model.tokenizer is None:
        raise InputError("tokenizer is needed to tune on conversations; pass one to GenerativeAdapter")
    model.use_chat_template(recipe.data.chat_template or model.chat_template or template_of(model.tokenizer))
    recipe = _with_clock(recipe, model.tokenizer, folder, ranks)
    data = load_tuning_data(
        recipe.data,
        model.tokenizer,
        model.base.get_input_embeddings().num_embeddings,
        recipe.batches.window or model.config.chunk_size,
        recipe.evaluation.contexts,
        recipe.seed,
        progress and ranks.rank == 0,
        recipe.moment,
    )
    if data.refusal is not None:
        raise InputError(f"data: {data.refusal}")
    run = _Finetuning(model, recipe, folder, progress and ranks.rank == 0, ranks, data)
    if run.progress and data.skipped.total:
        tqdm.write(f"left out: {data.skipped}", file=sys.stderr)
    with only_run(folder, ranks):
        run.train()
        report = run.evaluate(data.held_out, run.progress)
        run.write_report({"answers": report.to_dict(), "data": data.to_dict()})
    return report


def _with_clock(
    recipe: FinetuningRecipe, tokenizer: PreTrainedTokenizerBase, folder: Path, ranks: Ranks
) -> FinetuningRecipe:
    """The recipe with the time for the chat template: its own, else when the run began, else now."""
    if recipe.clock is not None or not shows_time(template_of(tokenizer)):
        return recipe
    clock = datetime.now().isoformat(timespec="seconds")
    path = folder / RECIPE_FILE
    if ranks.rank == 0 and find_checkpoints(folder / "checkpoints") and path.is_file():
        # Runs of earlier versions stored no clock, but wrote their recipe just after reading their data.
        written = datetime.fromtimestamp(path.stat().st_mtime).isoformat(timespec="seconds")
        clock = load_recipe(FinetuningRecipe, path).clock or written
    return replace(recipe, clock=Parallel(ranks).broadcast(clock))


@dataclass(frozen=True)
class _Finetuning(GeneratorRun[FinetuningRecipe]):
    data: TuningData

    def train(self) -> None:
        """Train the generators and write them."""
        recipe, data, chunk_size = self.recipe, self.data, self.model.config.chunk_size
        steps = InstructionSteps(
            data.sources,
            data.weights,
            recipe.batches,
            chunk_size,
            can_pack(self.model),
            recipe.seed,
            self.ranks,
            rounded=recipe.compile,
        )
        config = replace(recipe.trainer, steps=recipe.steps(data.contexts))
        cost = StepCost(tokens=steps.load(min(8, config.steps)).tokens)
        objective = InstructionObjective(self.model, steps)
        self.train_generators(
            config,
            objective,
            self._settings_to_resume(),
            self._evaluate_some,
            cost,
            lambda: steps.micro_batches(config.steps),
        )

    def evaluate(self, examples: Sequence[EncodedRecord], progress: bool = False) -> AnswerReport:
        """The scores of examples, in the precision of the run."""
        with self.recipe.trainer.autocast(self.model.device):
            return score_answers(self.model, examples, self.recipe.evaluation.batch_size, progress)

    def settings(self) -> dict[str, Any]:
        """Everything that a run depends on, for its checkpoints."""
        batches, base = asdict(self.recipe.batches), self.recipe.model
        del batches["positions"]  # changes only rounding
        return {
            "seed": self.recipe.seed,
            "batches": batches,
            "data": {
                "tokens": self.data.fingerprint(),
                "given": self.data.given,
                "weights": list(self.data.weights),
            },
            "start": self.model.generator_fingerprint(),
            "generator": self.model.config.to_dict(),
            "base": {
                "fingerprint": self.model.base_fingerprint(),
                "dtype": str(self.model.base.dtype),
                "quantization": base and base.quantization,
            },
        }

    def _settings_to_resume(self) -> dict[str, Any]:
        """The settings, with the data described as in the checkpoints of the folder if it is the same data.

        Data with the same tokens is the same, whatever its origin; so is data made from the same things, even if other
        versions of the libraries tokenise it differently.

        Raises:
            FormatError: it is not the same; the message says what changed.
        """
        settings, refusal = self.settings(), None
        saved = saved_settings(self.folder / "checkpoints") if self.leads else None
        before, now = (saved or {}).get("data", {}), settings["data"]
        if "tokens" in before:
            changed = changes(before["given"], now["given"]) if "given" in before else [_NOT_SAID]
            if before["tokens"] == now["tokens"] or not changed:
                settings["data"] = {**before, "weights": now["weights"]}
            else:
                refusal = f"{self.folder} holds a run with other data: {'; '.join(changed)}. Use another folder"
        if refusal := Parallel(self.ranks).broadcast(refusal):
            raise FormatError(refusal)
        return settings

    def _evaluate_some(self) -> dict[str, object]:
        with torch.compiler.set_stance("force_eager"):  # the windows of a report have other shapes
            return self.evaluate(self.data.held_out[: self.recipe.evaluation.contexts_at_intervals]).to_dict()
