"""Runs on one process or, started by torchrun, on several: the same model, the same global batches.

    torchrun --nproc-per-node 2 tests/training/processes.py FOLDER SEED

writes what every process found to FOLDER/found-RANK.json.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from tiny import make_model

from gakernels import GenerativeAdapter, InputError
from gakernels.distributed import Parallel, Ranks, Replicas, process_group
from gakernels.model.window_losses import WindowBatch, pretraining_windows, window_losses
from gakernels.training.objective import WindowObjective
from gakernels.training.sharding import Shards
from gakernels.training.trainer import Trainer, TrainerConfig, TrainingStopped

BATCH, CHUNKS, LENGTH, STEPS = 4, 3, 5, 6


def make(seed: int, dtype: torch.dtype = torch.float32) -> GenerativeAdapter:
    torch.manual_seed(seed)
    return make_model(base_dtype=dtype, dtype=dtype, chunk_size=LENGTH, damping=0.1)


def windows_of(ranks: Ranks, seed: int, per_batch: int) -> Callable[[int], list[WindowBatch]]:
    """The micro-batches of a process; every segment has another number of targets."""

    def windows(step: int) -> list[WindowBatch]:
        random = torch.Generator().manual_seed(seed + step)
        segments = torch.randint(3, 64, (BATCH, CHUNKS * LENGTH), generator=random)
        counted = torch.rand(BATCH, 2 * CHUNKS, LENGTH, generator=random) < torch.rand(BATCH, 1, 1, generator=random)
        size = BATCH // ranks.world
        own = range(ranks.rank * size, (ranks.rank + 1) * size)
        batches = []
        for start in range(own.start, own.stop, per_batch):
            part = slice(start, min(start + per_batch, own.stop))
            batch = pretraining_windows(segments[part], CHUNKS, random, "copy")
            targets = {name: target & counted[part] for name, target in batch.targets.items()}
            batches.append(replace(batch, targets=targets))
        return batches

    return windows


def make_trainer(
    seed: int,
    folder: Path | None = None,
    parallel: Parallel | None = None,
    sharded: Ranks | None = None,
    dtype: torch.dtype = torch.float32,
    per_batch: int = BATCH,
    windows: Any = None,
    **settings: Any,
) -> Trainer:
    model = make(seed, dtype)
    parallel = Shards(sharded, model) if sharded else parallel or Parallel()
    objective = WindowObjective(
        windows or windows_of(parallel.ranks, seed, per_batch), lambda batch: window_losses(model, batch)
    )
    config = TrainerConfig(
        **{"steps": STEPS, "learning_rate": 1e-3, "warmup_steps": 2, "log_every": 1, "checkpoint_every": 3, **settings}
    )
    parameters = dict(model.generators.named_parameters())
    return Trainer(config, parameters, objective, folder, {"seed": seed}, progress=False, parallel=parallel)


def losses_of(lines: list[dict[str, Any]]) -> list[list[float]]:
    return [[line["step"], *line["loss"].values(), line["gradient_norm"]] for line in lines]


def scenarios(ranks: Ranks, folder: Path, seed: int) -> dict[str, Any]:
    """Everything that several processes do, under the names that the tests ask for."""
    found: dict[str, Any] = {}

    def run(name: str, **options: Any) -> None:
        found[name] = losses_of(make_trainer(seed, **options).run())

    def replicas() -> Replicas:
        return Replicas(ranks, bucket_bytes=3000)  # several buckets

    double = {"dtype": torch.float64}
    run("replicas", parallel=replicas(), folder=folder / "replicas")
    run("replicas accumulating", parallel=replicas(), per_batch=1)
    run("replicas double", parallel=replicas(), per_batch=1, **double)
    run("shards", sharded=ranks, folder=folder / "shards")
    run("shards double", sharded=ranks, per_batch=1, **double)
    run("replicas from one", parallel=replicas(), folder=folder / "one_to_replicas")
    run("shards from one", sharded=ranks, folder=folder / "one_to_shards")
    run("shards from replicas", sharded=ranks, folder=stopped_after(ranks, folder / "a", seed, parallel=replicas()))
    run("replicas from shards", parallel=replicas(), folder=stopped_after(ranks, folder / "b", seed, sharded=ranks))
    found["stopped"] = stop_at(ranks, folder / "stopped", seed, parallel=replicas())
    run("resumed", parallel=replicas(), folder=folder / "stopped")
    found["skipped"] = skipped(ranks, seed, replicas())
    found["unused"] = unused(ranks)
    found["stale"] = stale(ranks, seed)
    return found


def stopped_after(ranks: Ranks, folder: Path, seed: int, **options: Any) -> Path:
    stop_at(ranks, folder, seed, **options)
    return folder


def stop_at(ranks: Ranks, folder: Path, seed: int, **options: Any) -> list[Any]:
    """Only the last process hears of a signal, in step 3; every one must stop there."""
    trainer, plain = make_trainer(seed, folder=folder, **options), windows_of(ranks, seed, BATCH)

    def windows(step: int) -> list[WindowBatch]:
        if step == 2 and ranks.rank == ranks.world - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(step)

    trainer.step.objective = replace(trainer.step.objective, windows=windows)  # type: ignore[type-var]
    try:
        trainer.run()
    except TrainingStopped as stopped:
        return [stopped.code, str(stopped)]
    return []


def skipped(ranks: Ranks, seed: int, parallel: Parallel) -> list[Any]:
    """Only the last process has a loss that is no number, in step 2."""
    trainer = make_trainer(seed, parallel=parallel)
    objective: Any = trainer.step.objective
    steps = iter(range(STEPS))

    def take(batch: WindowBatch) -> Any:
        losses = objective.take(batch)
        bad = next(steps) == 1 and ranks.rank == ranks.world - 1
        return {
            name: replace(loss, total=loss.total * torch.nan if bad else loss.total) for name, loss in losses.items()
        }

    trainer.step.objective = replace(objective, take=take)
    lines = trainer.run()
    same = parallel.gather([parameter.detach() for parameter in trainer.parameters.values()])
    equal = all(a.equal(b) for others in same for a, b in zip(same[0], others, strict=True))
    return [[line["step"] for line in lines if line.get("skipped")], equal]


def unused(ranks: Ranks) -> list[list[float]]:
    """Gradients where every process uses parameters of its own, in its own order, in two steps."""
    parameters = {name: nn.Parameter(torch.ones(3)) for name in "abcd"}
    parallel = Replicas(ranks, bucket_bytes=1)
    parallel.prepare(parameters)
    first, second, both, none = parameters.values()
    for _ in range(2):
        for parameter in parameters.values():
            parameter.grad = None
        loss = (first + 2 * both).sum() if ranks.rank == 0 else (3 * both).sum() + (5 * second).sum()
        parallel.backward(loss, last=True)
        parallel.finish()
    return [parameter.grad.tolist() for parameter in (first, second, both, none) if parameter.grad is not None]


def stale(ranks: Ranks, seed: int) -> str:
    """What is said of parameters that were taken before the model was sharded."""
    model = make(seed)
    before = dict(model.generators.named_parameters())
    try:
        Shards(ranks, model, "cpu").prepare(before)
    except InputError as error:
        return str(error)
    return ""


def main(folder: Path, seed: int) -> None:
    torch.set_num_threads(1)
    with process_group("cpu") as ranks:
        found = scenarios(ranks, folder, seed)
    (folder / f"found-{ranks.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
