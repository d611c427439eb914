"""Generators under transformers' Trainer: the losses and parameters of our own, and what it saves and resumes.

In float64, where two orders of the same sums differ by about 1e-16: AdamW divides by the size of the gradient, so what
is rounding in it moves a parameter by that over its `eps` of 1e-8, times the learning rate.
"""

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_process
from invented import make_tokenizer
from safetensors.torch import load_file
from tiny import make_base, make_config, random_ids
from trainer_process import BATCH, CHUNK, CHUNKS, RATE, STEPS, Observed, settings

from gakernels import GenerativeAdapter, InputError, get_generative_model
from gakernels.integrations.collators import InstructionCollator, PretrainingCollator
from gakernels.integrations.transformers import TrainableGenerator
from gakernels.model.window_losses import Loss, WindowBatch, count_targets, window_losses
from gakernels.training.instruction.answers import instruction_losses
from gakernels.training.instruction.batches import InstructionBatch, count_answers
from gakernels.training.trainer import Trainer, TrainerConfig

SAME = {"rtol": 0, "atol": 1e-8 * RATE * STEPS}
WEIGHTS = {"completion": 0.5}
Batch = Mapping[str, Any]


class Steps:
    """The objective of our own trainer on the same rows: a batch is what the collator makes of them."""

    def __init__(
        self, model: GenerativeAdapter, collator: Callable[[Sequence[Any]], Batch], data: Sequence[Any]
    ) -> None:
        self._model, self._collator, self._data = model, collator, data

    def batches(self, step: int) -> list[Batch]:
        return [self._collator(self._data[step * BATCH : (step + 1) * BATCH])]

    def target_counts(self, batch: Batch) -> Mapping[str, Any]:
        windows = as_windows(batch)
        return count_targets(windows) if "conversations" not in batch else count_answers(as_conversations(batch))

    def losses(self, batch: Batch) -> Mapping[str, Loss]:
        if "conversations" in batch:
            return instruction_losses(self._model, as_conversations(batch))
        return window_losses(self._model, as_windows(batch))


def as_windows(batch: Batch) -> WindowBatch:
    names = ("input_ids", "attention_mask", "chunks", "seen", "targets")
    return WindowBatch(*(batch[name] for name in names))


def as_conversations(batch: Batch) -> InstructionBatch:
    return InstructionBatch(as_windows(batch), **batch["conversations"])


def segments() -> list[dict[str, list[int]]]:
    return [{"input_ids": random_ids(CHUNKS * CHUNK).tolist()} for _ in range(STEPS * BATCH)]


def questions() -> list[dict[str, Any]]:
    def words(count: int) -> str:
        return " ".join(f"w{token}" for token in random_ids(count).tolist())

    return [
        {"context": words(5 + number % 9), "qas": [{"question": words(1), "answers": [words(1 + number % 2)]}]}
        for number in range(STEPS * BATCH)
    ]


def twins(weights: Mapping[str, float] | None = None) -> tuple[TrainableGenerator, GenerativeAdapter]:
    """The same untrained generators twice, each on a base of its own."""
    base, config, tokenizer = make_base(dtype=torch.float64), make_config(chunk_size=20), make_tokenizer()
    one, two = (GenerativeAdapter(part, config, tokenizer, torch.float64) for part in (copy.deepcopy(base), base))
    return TrainableGenerator(one, weights), two


def theirs(
    model: TrainableGenerator, collator: Any, data: Sequence[Any], folder: Path, resume: Any = None, **changes: Any
) -> Observed:
    args = settings(folder, **changes)
    trainer = Observed(model=model, args=args, data_collator=collator, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def ours(model: GenerativeAdapter, objective: Steps, folder: Path, weights: Mapping[str, float]) -> list[float]:
    """The loss of every step of our own trainer, with the same settings."""
    optimiser = {"learning_rate": RATE, "warmup_steps": 0, "weight_decay": 0.0, "log_every": 1}
    config = TrainerConfig(steps=STEPS, loss_weights=tuple(weights.items()), **optimiser)
    Trainer(config, dict(model.generators.named_parameters()), objective, folder, progress=False).run()
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [sum(weights.get(name, 1.0) * value for name, value in line["loss"].items()) for line in lines]


def parameters(model: GenerativeAdapter) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.generators.named_parameters()}


@pytest.mark.parametrize("accumulated", [1, 2, 4])
def test_pretraining_equals_our_own_trainer(tmp_path: Path, accumulated: int) -> None:
    one, two = twins(WEIGHTS)
    data, collator = segments(), PretrainingCollator(CHUNKS, seed=int(random_ids(1)))
    base, start = copy.deepcopy(two.base.state_dict()), parameters(two)
    losses = ours(two, Steps(two, collator, data), tmp_path / "ours", WEIGHTS)
    sizes = {"per_device_train_batch_size": BATCH // accumulated, "gradient_accumulation_steps": accumulated}
    trainer = theirs(one, collator, data, tmp_path / "theirs", **sizes)
    torch.testing.assert_close([*trainer.losses.values()], losses, rtol=0, atol=1e-10)
    found, wanted = parameters(one.generative), parameters(two)
    torch.testing.assert_close(found, wanted, **SAME)
    assert all((wanted[name] - start[name]).abs().max() > RATE for name in start)
    assert all(torch.equal(tensor, base[name]) for name, tensor in one.generative.base.state_dict().items())
    trained = {name for name, parameter in one.named_parameters() if parameter.requires_grad}
    assert trained == {f"generative.generators.{name}" for name in found}


@pytest.mark.parametrize("accumulated", [1, 2])
def test_instruction_tuning_equals_our_own_trainer(tmp_path: Path, accumulated: int) -> None:
    one, two = twins()
    data = questions()
    losses = ours(two, Steps(two, InstructionCollator(two), data), tmp_path / "ours", {})
    sizes = {"per_device_train_batch_size": BATCH // accumulated, "gradient_accumulation_steps": accumulated}
    collator = InstructionCollator(one.generative)
    trainer = theirs(one, collator, data, tmp_path / "theirs", remove_unused_columns=False, **sizes)
    torch.testing.assert_close([*trainer.losses.values()], losses, rtol=0, atol=1e-10)
    torch.testing.assert_close(parameters(one.generative), parameters(two), **SAME)
    template = one.generative.chat_template
    one.save_pretrained(tmp_path / "generator")
    again = GenerativeAdapter.from_pretrained(tmp_path / "generator", base=one.generative.detach())
    assert again.chat_template == template is not None


def test_only_the_generators_are_saved_and_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path: Path) -> None:
    one, two = twins()
    data, collator = segments(), PretrainingCollator(CHUNKS)
    options = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "no"}
    whole = theirs(one, collator, data, tmp_path / "whole", **options)
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    resumed = theirs(TrainableGenerator(two), collator, data, tmp_path / "rest", str(checkpoint))
    assert [*resumed.losses.items()] == [*whole.losses.items()][4:]
    wanted = parameters(one.generative)
    torch.testing.assert_close(parameters(two), wanted, rtol=0, atol=0)

    whole.save_model(str(tmp_path / "saved"))
    size = sum(tensor.nbytes for tensor in one.generative.generator_tensors().values())
    for folder in (checkpoint, tmp_path / "saved"):
        for name in ("generator.safetensors", "model.safetensors"):
            assert size < (folder / name).stat().st_size < size + 20_000
    base = one.generative.detach()
    again = GenerativeAdapter.from_pretrained(tmp_path / "saved", base=base, dtype=torch.float64)
    torch.testing.assert_close(parameters(again), wanted, rtol=0, atol=0)
    again.detach()
    further = TrainableGenerator.from_pretrained(checkpoint, base=base, dtype=torch.float64)
    theirs(further, collator, data[:BATCH], tmp_path / "further", max_steps=1)


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    model, _ = twins()
    data = segments()[:BATCH]
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    saved = {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps", "eval_steps": 5}
    args = settings(tmp_path, **best, **saved)
    trainer = Observed(
        model=model, args=args, data_collator=PretrainingCollator(CHUNKS), train_dataset=data, eval_dataset=data
    )
    trainer.train()
    first, last = (load_file(tmp_path / f"checkpoint-{step}" / "generator.safetensors") for step in (5, STEPS))
    found = model.generative.generator_tensors()
    assert all(torch.equal(found[name], first[name]) for name in found)  # learned by heart, the rows have less loss
    assert not all(torch.equal(first[name], last[name]) for name in found)


def test_what_trainer_decays_and_refuses(tmp_path: Path) -> None:
    model, _ = twins()
    args = settings(tmp_path, gradient_checkpointing=True)
    trainer = Observed(model=model, args=args, data_collator=PretrainingCollator(CHUNKS), train_dataset=segments())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(name.endswith(".norm_weight") for name in trained)
    assert trained <= set(trainer.get_decay_parameter_names(model))
    with pytest.raises(ValueError, match=r"does not support (gradient|activation) checkpointing"):
        trainer.train()


def test_evaluation_is_the_loss_on_all_rows(tmp_path: Path) -> None:
    one, two = twins(WEIGHTS)
    data, collator = segments()[:10], PretrainingCollator(CHUNKS)
    args = settings(tmp_path, per_device_eval_batch_size=5)
    found = Observed(model=one, args=args, data_collator=collator, eval_dataset=data).evaluate()["eval_loss"]
    losses = window_losses(two, as_windows(collator(data)))
    wanted = sum(WEIGHTS.get(name, 1.0) * float(loss.mean.detach()) for name, loss in losses.items())
    assert found == pytest.approx(wanted, rel=1e-5)  # Trainer averages in float32


@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_train_what_one_does(tmp_path: Path, fsdp: bool) -> None:
    base = make_base(dtype=torch.float64)
    base.save_pretrained(tmp_path / "base")
    model = GenerativeAdapter(base, make_config(), dtype=torch.float64)
    start = parameters(model)
    model.save_pretrained(tmp_path / "generator", str(tmp_path / "base"))
    data = segments()
    (tmp_path / "rows.json").write_text(json.dumps(data))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [trainer_process.__file__, str(tmp_path), str(tmp_path / "two"), *(["fsdp"] if fsdp else [])]
    result = subprocess.run([*torchrun, *script], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    theirs(TrainableGenerator(model), PretrainingCollator(CHUNKS), data, tmp_path / "one")
    wanted, base = parameters(model), model.detach()
    found = parameters(GenerativeAdapter.from_pretrained(tmp_path / "two", base=base, dtype=torch.float64))
    torch.testing.assert_close(found, wanted, **SAME)
    assert all((found[name] - start[name]).abs().max() > RATE for name in start)


def test_the_entry_point_attaches_untrained_generators() -> None:
    base, ids = make_base(), random_ids(2, 7)
    before = base(ids).logits
    model = get_generative_model(base, make_config(), make_tokenizer(), {"completion": 0.5})
    assert isinstance(model, TrainableGenerator)
    assert model.loss_weights == {"completion": 0.5}
    with model.generative.adapted(model.generative.adapt(random_ids(9))):
        assert torch.equal(base(ids).logits, before)  # untrained generators change nothing


def test_what_cannot_be_trained_is_refused() -> None:
    model = get_generative_model(make_base(), make_config(), loss_weights={"answers": 2.0})
    collator = PretrainingCollator(CHUNKS)
    with pytest.raises(InputError, match="must name losses out of reconstruction, completion, but names answers"):
        model(**collator(segments()[:2]))
    with pytest.raises(InputError, match="several GPUs need a process each"):
        model._replicate_for_data_parallel()
    with pytest.raises(InputError, match="reconstruction must be one of random_slice, copy, final, but it is 'all'"):
        PretrainingCollator(CHUNKS, reconstruction="all")
    with pytest.raises(InputError, match=r"the same length in all rows, but they have \[4, 6\]"):
        collator([{"input_ids": [3] * 4}, {"input_ids": [3] * 6}])
    with pytest.raises(InputError, match="tokenizer is needed to tune"):
        InstructionCollator(model.generative)
    tuned = get_generative_model(make_base(), make_config(), make_tokenizer()).generative
    with pytest.raises(InputError, match="losses must be answers and others of"):
        InstructionCollator(tuned, losses=("completion",))
    with pytest.raises(InputError, match="remove_unused_columns=False"):
        InstructionCollator(tuned)([{}])
    with pytest.raises(InputError, match="record without context"):
        InstructionCollator(tuned)([{"question": "w3", "answers": ["w4"]}])


def test_a_collator_draws_the_same_slices_of_a_segment_wherever_it_is() -> None:
    rows, seed = segments(), int(random_ids(1))
    collator = PretrainingCollator(CHUNKS, seed=seed)
    one, two = collator(rows[:3]), collator(rows[2:5])
    assert torch.equal(one["input_ids"][2], two["input_ids"][0])
    other = PretrainingCollator(CHUNKS, seed=seed + 1)(rows)
    assert not torch.equal(other["input_ids"], collator(rows)["input_ids"])


def test_all_losses_of_tuning_reach_the_batch() -> None:
    model = get_generative_model(make_base(), make_config(chunk_size=20), make_tokenizer())
    collator = InstructionCollator(model.generative, ("answers", "reconstruction", "completion"))
    batch = collator(questions()[:3])
    names = set(instruction_losses(model.generative, as_conversations(batch)))
    assert names == {"answers", "reconstruction", "completion"}
    assert (batch["labels"] >= 0).sum() == batch["conversations"]["answers"].sum()
    assert model(**batch)["loss"].isfinite()
