"""Pretraining a generator on text files, from reading them to the report on held-out windows."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gakernels.errors import InputError
from gakernels.evaluation.perplexity import PerplexityReport, context_perplexity
from gakernels.files import write_text
from gakernels.fingerprint import tensor_fingerprint
from gakernels.model import GenerativeAdapter
from gakernels.training.data import batch_of, cut_segments, find_files, tokenize_files
from gakernels.training.objectives import RECONSTRUCTIONS, Loss, WindowBatch, pretraining_windows, window_losses
from gakernels.training.static_lora import StaticLora
from gakernels.training.trainer import Trainer, TrainerConfig


@dataclass(frozen=True)
class PretrainingConfig:
    """What to train on; how to optimise is in `TrainerConfig`.

    Attributes:
        data: a folder of text or JSON-lines files, or one file.
        chunks: T, context chunks in a segment (8 in the paper).
        batch_size: segments in one step.
        reconstruction: see `objectives.pretraining_windows`.
        held_out: segments kept back for the report; they come from the end of the data.
        static_lora: also train the control that knows no context, with the same budget.
        seed: of the order of the segments and of the slices.

    Raises:
        InputError: a value is out of range.
    """

    data: Path
    chunks: int = 8
    batch_size: int = 8
    reconstruction: str = "random_slice"
    held_out: int = 32
    static_lora: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("chunks", 1), ("batch_size", 1), ("held_out", 2)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, but it is {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed must be between 0 and 2^32 - 1, but it is {self.seed}")
        if self.reconstruction not in RECONSTRUCTIONS:
            raise InputError(
                f"reconstruction must be one of {', '.join(RECONSTRUCTIONS)}, but it is {self.reconstruction!r}"
            )


@dataclass(frozen=True)
class PretrainingData:
    """Token segments (n, T * M)."""

    training: Tensor
    held_out: Tensor


def load_data(model: GenerativeAdapter, config: PretrainingConfig, progress: bool = True) -> PretrainingData:
    """Read, tokenise and cut the data.

    Raises:
        InputError: there is too little of it, a file can't be read, or a chunk has no token to predict.
    """
    if model.config.chunk_size < 2:
        raise InputError(f"chunk_size must be at least 2 to train on next tokens, but it is {model.config.chunk_size}")
    if model.tokenizer is None:
        raise InputError("tokenizer is needed to pretrain on text; pass one to GenerativeAdapter")
    tokens = tokenize_files(find_files(config.data), model.tokenizer, progress)
    segments = cut_segments(tokens, config.chunks * model.config.chunk_size)
    if len(segments) <= config.held_out:
        raise InputError(
            f"data: {config.data} gives {len(segments)} segments of {segments.shape[1]} tokens, and {config.held_out} "
            "are held out; more text, a shorter segment (chunks x chunk size) or a smaller held_out is needed"
        )
    return PretrainingData(segments[: -config.held_out], segments[-config.held_out :])


def pretrain(
    model: GenerativeAdapter,
    config: PretrainingConfig,
    trainer: TrainerConfig,
    folder: Path,
    progress: bool = True,
) -> PerplexityReport:
    """Train the generators of a model; resumes where an earlier call in the same folder stopped.

    Writes to the folder: `log.jsonl`, `checkpoints/`, the trained generator (see `GenerativeAdapter.save_pretrained`)
    and `report.json`; with `static_lora` the control's log and checkpoints in `static_lora/`.

    Returns:
        Perplexities of the held-out windows.

    Raises:
        InputError: the data can't be used.
        FormatError: the folder holds a run with other settings.
    """
    data = load_data(model, config, progress)
    settings = _settings(model, config, data)

    def batch(step: int) -> WindowBatch:
        segments = batch_of(data.training, config.batch_size, step, config.seed)
        random = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        return pretraining_windows(segments, config.chunks, random, config.reconstruction)

    def objective(step: int) -> dict[str, Loss]:
        return window_losses(model, batch(step))

    parameters = dict(model.generators.named_parameters())
    Trainer(trainer, parameters, objective, folder, settings, progress).run()
    model.save_pretrained(folder)
    controls = {}
    if config.static_lora:
        control = StaticLora(model)
        control_trainer = TrainerConfig(**{**asdict(trainer), "label": "static LoRA (control)"})
        Trainer(
            control_trainer,
            dict(control.named_parameters()),
            lambda step: control.window_losses(model, batch(step)),
            folder / "static_lora",
            settings,
            progress,
        ).run()
        controls["static_lora"] = control.factors()
    report = context_perplexity(model, data.held_out, config.chunks, controls)
    write_text(folder / "report.json", json.dumps(report.to_dict(), indent=2) + "\n")
    return report


def _settings(model: GenerativeAdapter, config: PretrainingConfig, data: PretrainingData) -> Mapping[str, Any]:
    """What a run depends on. The data counts by its tokens, not by its path."""
    values = {**asdict(config), "data": tensor_fingerprint([("training", data.training)])}
    del values["static_lora"]
    base = {"fingerprint": model.base_fingerprint(), "dtype": str(model.base.dtype)}
    return {"pretraining": values, "generator": model.config.to_dict(), "base": base}
