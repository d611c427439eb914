"""Pretraining a generator: from a recipe to the trained generator and the report on held-out contexts."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gakernels.cost.shapes import ModelShape
from gakernels.cost.step_flops import pretraining_flops
from gakernels.distributed import Parallel, Ranks, Replicas
from gakernels.errors import InputError
from gakernels.model import GenerativeAdapter
from gakernels.model.config import GeneratorConfig
from gakernels.model.positions import check_chunk_size
from gakernels.model.static_lora import STATIC_LORA_FILE, StaticLora, static_adapter
from gakernels.model.window_losses import WindowBatch, joined_windows, pretraining_windows, window_losses
from gakernels.nn import LowRankFactors
from gakernels.training.base_model import load_base_model
from gakernels.training.distillation import NAME as DISTILLATION
from gakernels.training.generator_run import GeneratorRun, generator_on
from gakernels.training.objective import WindowObjective
from gakernels.training.perplexity import HeldOutContexts, PerplexityReport, context_perplexity
from gakernels.training.pretraining_data import HeldOutSize, PretrainingData, few, load_data
from gakernels.training.pretraining_recipe import PretrainingRecipe, WindowsConfig
from gakernels.training.run_folder import only_run
from gakernels.training.run_log import StepCost
from gakernels.training.trainer import Trainer


def make_model(recipe: PretrainingRecipe, device: torch.device | str) -> GenerativeAdapter:
    """The base model of a recipe with the generators that it starts from, or untrained ones.

    Raises:
        InputError: a model can't be loaded, the base model does not have the layers that the recipe adapts, or the
            recipe has other settings than the generator that it starts from.
        FormatError: that generator is damaged or belongs to another base model.
        BackendError: the device can't compute with weights of the recipe's quantization.
    """
    if recipe.start is None:
        base, tokenizer = load_base_model(recipe.model, device)
        return GenerativeAdapter(base, recipe.generator, tokenizer)
    model = generator_on(recipe.start, recipe.model, device)
    model.config = _continued(model.config, recipe)
    return model


def _continued(config: GeneratorConfig, recipe: PretrainingRecipe) -> GeneratorConfig:
    """The settings of a saved generator with the recipe's chunk size."""
    config = replace(config, chunk_size=recipe.generator.chunk_size)
    found, wanted = asdict(config), asdict(replace(recipe.generator, seed=config.seed))
    different = [name for name in found if found[name] != wanted[name]]
    if different:
        name = different[0]
        raise InputError(
            f"generator.{name} must be {found[name]!r}, as in the generator to start from ({recipe.start}), but it is "
            f"{wanted[name]!r}"
        )
    return config


def pretrain(
    model: GenerativeAdapter, recipe: PretrainingRecipe, folder: Path, progress: bool = True, ranks: Ranks | None = None
) -> PerplexityReport:
    """Train the generators of a model; resume where an earlier call in the same folder stopped.

    Writes to the folder: `recipe.yaml`, `log.jsonl`, `checkpoints/`, the trained generator (see
    `GenerativeAdapter.save_pretrained`) and `report.json`; with `evaluation.static_lora` the control as an adapter in
    `static_lora.safetensors`, and its log and checkpoints in `static_lora/`. With several processes every one calls
    this, and the first one writes.

    Args:
        model: see `make_model`.
        recipe: everything else.
        folder: of the run.
        progress: show progress bars.
        ranks: of a running process group; one process if not given.

    Returns:
        Perplexities of the held-out contexts.

    Raises:
        InputError: the data can't be used, settings of the recipe contradict each other, or another run is in the
            folder.
        FormatError: the folder holds a run with other settings.
        FloatingPointError: the run diverged.
    """
    ranks = ranks or Ranks()
    if model.tokenizer is None:
        raise InputError(
            f"tokenizer is needed to pretrain on text, but {recipe.model.name} has none; "
            "put its files into the folder of the model, or pass one to GenerativeAdapter"
        )
    with only_run(folder, ranks):
        data = _read(model, recipe, ranks, progress)
        run = _Pretraining(model, recipe, folder, progress and ranks.rank == 0, ranks, data)
        run.train()
        has_control = recipe.evaluation.static_lora
        report = run.evaluate(data.held_out, {"static_lora": run.train_control()} if has_control else {}, run.progress)
        run.write_report(report.to_dict())
    return report


def _read(model: GenerativeAdapter, recipe: PretrainingRecipe, ranks: Ranks, progress: bool) -> PretrainingData:
    assert model.tokenizer is not None
    recipe.windows.at_once(ranks.world)  # raises before anything is read
    check_chunk_size(model.base.config, model.config.chunk_size)
    vocabulary = model.base.get_input_embeddings().num_embeddings
    shown = progress and ranks.rank == 0
    held_out = HeldOutSize(recipe.evaluation.contexts, recipe.context_chunks * recipe.generator.chunk_size)
    return load_data(recipe.data, model.tokenizer, vocabulary, recipe.segment_tokens, held_out, shown)


@dataclass(frozen=True)
class _Pretraining(GeneratorRun[PretrainingRecipe]):
    data: PretrainingData

    def train(self) -> None:
        """Train the generators and write them."""
        recipe, cost = self.recipe, self._cost()
        self.train_generators(
            recipe.trainer,
            self._objective(),
            self.settings(),
            self._evaluate_some,
            cost,
            lambda: recipe.micro_batches(self.ranks.world),
        )

    def train_control(self) -> dict[str, LowRankFactors]:
        """The static LoRA, trained as the generators were, on the losses of the text itself."""
        control, config = StaticLora(self.model), self.recipe.trainer
        config = replace(
            config,
            label="static LoRA (control)",
            learning_rate_factors=(),
            loss_weights=tuple(pair for pair in config.loss_weights if pair[0] != DISTILLATION),
            evaluate_every=None,
        )
        objective = WindowObjective(self.windows, lambda batch: control.window_losses(self.model, batch))
        Trainer(
            config,
            dict(control.named_parameters()),
            objective,
            self.folder / "static_lora",
            self.settings(),
            self.progress,
            Parallel() if self.ranks.world == 1 else Replicas(self.ranks),
            cost=self._cost(),
        ).run()
        if self.leads:
            static_adapter(self.model, control.factors()).save(self.folder / STATIC_LORA_FILE)
        return control.factors()

    def evaluate(
        self,
        held_out: HeldOutContexts,
        controls: Mapping[str, Mapping[str, LowRankFactors]] | None = None,
        progress: bool = False,
    ) -> PerplexityReport:
        """The perplexities of contexts, in the precision of the run."""
        chunks, size = self.recipe.context_chunks, self.recipe.evaluation.batch_size
        with self.recipe.trainer.autocast(self.model.device):
            return context_perplexity(self.model, held_out, chunks, controls, size, progress)

    def settings(self) -> dict[str, Any]:
        """Everything that a run depends on, for its checkpoints. Data is identified by its tokens, not its path."""
        windows, distillation = asdict(self.recipe.windows), self.recipe.distillation
        del windows["segments_at_once"]  # changes only rounding
        dtype = str(self.model.base.dtype).removeprefix("torch.")
        base = {"fingerprint": self.model.base_fingerprint(), "dtype": dtype}
        return {
            "seed": self.recipe.seed,
            "windows": windows,
            "data": {
                "segments": self.data.segments.fingerprint,
                "weights": [source.weight for source in self.recipe.data.all_sources().values()],
            },
            "generator": self.model.config.to_dict(),
            **({} if self.recipe.start is None else {"start": self.model.generator_fingerprint()}),
            "distillation": distillation and asdict(distillation),
            "base": {**base, "quantization": self.recipe.model.quantization},
        }

    def windows(self, step: int) -> list[WindowBatch]:
        """The micro-batches of this process. The slices of a segment depend only on its place in the run."""
        windows, ranks = self.recipe.windows, self.ranks
        indices = self.data.order.indices(step, windows.batch_size, self.recipe.seed, ranks.rank, ranks.world)
        first = step * windows.batch_size + ranks.rank * len(indices)
        single = step < windows.single_share * self.recipe.trainer.steps
        made = []
        for place, segment in enumerate(self.data.segments.take(indices)):
            random = torch.Generator().manual_seed(self.recipe.seed * 1_000_000_007 + first + place)
            made.append(segment_windows(segment, windows, single, random))
        size = windows.at_once(ranks.world)
        return [joined_windows(made[start : start + size]) for start in range(0, len(made), size)]

    def _objective(self) -> WindowObjective:
        distillation = self.recipe.distillation
        if distillation is None:
            return WindowObjective(self.windows, lambda batch: window_losses(self.model, batch))
        return WindowObjective(
            lambda step: [distillation.windows(batch) for batch in self.windows(step)],
            lambda batch: distillation.losses(self.model, batch),
        )

    def _evaluate_some(self) -> dict[str, object]:
        held_out = few(self.data.held_out, self.recipe.evaluation.contexts_at_intervals)
        return self.evaluate(held_out).to_dict()

    def _cost(self) -> StepCost:
        windows, segments = self.recipe.windows, self.recipe.windows.batch_size
        try:
            shape = ModelShape.from_config(self.model.base.config)
        except InputError:  # experts, recurrent layers: the operations don't follow from the shapes
            return StepCost(tokens=segments * self.recipe.segment_tokens)
        size = self.model.config.chunk_size
        one = pretraining_flops(shape, self.model.config, windows.chunks, size, windows.plain, windows.slices)
        return StepCost(segments * self.recipe.segment_tokens, segments * one.total)


def segment_windows(segment: Tensor, windows: WindowsConfig, single: bool, generator: torch.Generator) -> WindowBatch:
    """The windows of a segment (T * M,), or of each chunk as a segment if `single`, under the losses of the recipe.

    Every step has the same losses; a loss without targets in a step contributes nothing.
    """
    rows, chunks = (segment.view(windows.chunks, -1), 1) if single else (segment[None], windows.chunks)
    batch = pretraining_windows(rows, chunks, generator, windows.reconstruction, windows.slices)
    targets = dict(batch.targets)
    if windows.chunks == 1:
        del targets["completion"]
    if windows.plain:
        targets["plain"] = torch.zeros_like(batch.mask)
        targets["plain"][:, 0, 1:] = True
    return replace(batch, targets=targets)
