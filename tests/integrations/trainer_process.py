"""Trains under transformers' Trainer, alone or as one of the processes that torchrun starts.

    torchrun --nproc-per-node 2 tests/integrations/trainer_process.py FOLDER OUTPUT [FSDP]

reads the base, the untrained generators and the rows of FOLDER and writes the trained generators to OUTPUT.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from torch.distributed.tensor import DTensor
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from gakernels.integrations.collators import PretrainingCollator
from gakernels.integrations.transformers import TrainableGenerator

STEPS, BATCH, CHUNKS, CHUNK, RATE = 10, 4, 3, 6, 0.001


class Observed(Trainer):
    """Takes the rows in their order, and notes the loss of every step."""

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses: dict[int, float] = getattr(self, "losses", {})
        step = self.state.global_step
        self.losses[step] = self.losses.get(step, 0.0) + float(loss)
        return loss


def settings(folder: Path, **changes: Any) -> TrainingArguments:
    given = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": RATE,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**given, **changes})


def close(trainer: Trainer) -> None:
    """Closes the process group, whose threads may outlive a rank that just exits.

    DDP's wrapper goes first. If it held the last reference to the group, it would join Gloo's threads under Python's
    lock, which they need to release their tensors.
    """
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    trainer.accelerator.end_training()


def main(folder: Path, output: Path, fsdp: bool) -> None:
    torch.set_num_threads(1)
    options: dict[str, Any] = {"per_device_train_batch_size": BATCH // int(os.environ.get("WORLD_SIZE", 1))}
    if fsdp:
        options |= {"fsdp": "full_shard", "fsdp_config": {"version": 2}}
    model = TrainableGenerator.from_pretrained(folder / "generator", dtype=torch.float64)
    data = json.loads((folder / "rows.json").read_text())
    args = settings(output, **options)
    if fsdp:  # accelerate shards on GPUs only; PyTorch can on a CPU too
        PartialState().distributed_type = DistributedType.MULTI_GPU
    trainer = Observed(model=model, args=args, data_collator=PretrainingCollator(CHUNKS), train_dataset=data)
    trainer.train()
    assert any(isinstance(parameter, DTensor) for parameter in trainer.model.parameters()) == fsdp
    assert trainer.args.world_size == int(os.environ.get("WORLD_SIZE", 1))
    if fsdp:  # the default of newer transformers
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()
    close(trainer)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), len(sys.argv) > 3)
