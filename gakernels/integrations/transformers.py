"""Generators for transformers' Trainer and accelerate: their base model stays frozen and is not saved."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_NAME

from gakernels.errors import InputError
from gakernels.model import GenerativeAdapter
from gakernels.model.config import GeneratorConfig
from gakernels.model.pretrained import GENERATOR_FILE, save_generator
from gakernels.model.window_losses import Loss, WindowBatch, window_losses
from gakernels.training.instruction.answers import instruction_losses
from gakernels.training.instruction.batches import InstructionBatch

IGNORED = -100  # the label, in transformers, of a token whose prediction doesn't count
_PREFIX = "generative.generators."


class TrainableGenerator(PreTrainedModel):  # what Trainer saves by its `save_pretrained` is such a model
    """Generators as a model for `transformers.Trainer`, which returns the loss of a batch of `PretrainingCollator` or
    `InstructionCollator`.

    Args:
        model: the base model with its generators.
        loss_weights: factor of each loss by name; 1 for losses that are not named.

    Attributes:
        generative: the model; it makes adapters before, during and after training.
    """

    accepts_loss_kwargs = True  # Trainer passes `num_items_in_batch`

    def __init__(self, model: GenerativeAdapter, loss_weights: Mapping[str, float] | None = None) -> None:
        base = model.base.config
        settings = {"hidden_size": base.get_text_config().hidden_size}  # what DeepSpeed's "auto" settings follow
        super().__init__(PreTrainedConfig(**{"name_or_path": base.name_or_path, **settings}))
        self.generative, self.loss_weights = model, dict(loss_weights or {})
        self._no_split_modules = list(model.base._no_split_modules or ())  # what FSDP shards one by one
        # Both need the whole base model, which no process may hold later; the model keeps them.
        model.base_fingerprint(), model.base_layers_fingerprint()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        chunks: int,
        seen: Sequence[int],
        targets: Mapping[str, Tensor],
        conversations: Mapping[str, Any] | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """The loss of a batch: the weighted sum of the means of its losses.

        If the batch is one of several of an optimizer step, it counts by its share of the step's labels. So neither
        gradient accumulation nor the number of processes changes more than rounding, if all batches have the same
        losses in the same proportions, as in pretraining, or a single loss.

        Args:
            input_ids: (B, W, M), see `WindowBatch`.
            attention_mask: (B, W, M) bool, False for padding on the right.
            labels: any shape; as many entries other than -100 as there are tokens to predict.
            chunks: T.
            seen: W numbers, see `WindowBatch`.
            targets: (B, W, M) bool for each loss of the windows, by name.
            conversations: the fields of `InstructionBatch` for the windows of conversations, if there are any.
            num_items_in_batch: labels in all batches of the optimizer step, on all processes.

        Returns:
            `loss`, a scalar in nats per token.

        Raises:
            InputError: loss_weights names a loss that the batch does not have.
        """
        context = WindowBatch(input_ids, attention_mask, chunks, tuple(seen), targets)
        losses: Mapping[str, Loss]
        if conversations is None:
            losses = window_losses(self.generative, context)
        else:
            losses = instruction_losses(self.generative, InstructionBatch(context, **conversations))
        unknown = sorted(self.loss_weights.keys() - losses.keys())
        if unknown:
            raise InputError(f"loss_weights must name losses out of {', '.join(losses)}, but names {unknown[0]}")
        loss = torch.stack([self.loss_weights.get(name, 1.0) * losses[name].mean for name in losses]).sum()
        if num_items_in_batch is not None:
            loss = loss * ((labels != IGNORED).sum() / num_items_in_batch)
        return {"loss": loss}

    def get_input_embeddings(self) -> None:  # type: ignore[override]
        """None, so that FSDP does not make embeddings and head a unit of their own.

        The head runs several times per pass, so it must belong to the root, like the generators.
        """

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write the generators to a folder, see `GenerativeAdapter.save_pretrained`.

        `model.safetensors` is a copy of `generator.safetensors`, under the name that Trainer looks for when it resumes.

        Args:
            save_directory: the folder.
            is_main_process: whether this process writes.
            state_dict: of this module, gathered from its shards; by default its own.

        Raises:
            OSError: it could not be written.
        """
        if state_dict is None:
            tensors = self.generative.generator_tensors()
        else:
            found = {key.removeprefix(_PREFIX): tensor for key, tensor in state_dict.items() if key.startswith(_PREFIX)}
            tensors = {key.replace("/", "."): tensor for key, tensor in found.items()}
        if is_main_process:
            folder = Path(save_directory)
            save_generator(self.generative, folder, None, tensors)
            shutil.copyfile(folder / GENERATOR_FILE, folder / SAFE_WEIGHTS_NAME)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: str | Path, loss_weights: Mapping[str, float] | None = None, **options: Any
    ) -> "TrainableGenerator":
        """Saved generators, to train them further; `options` are those of `GenerativeAdapter.from_pretrained`."""
        return cls(GenerativeAdapter.from_pretrained(folder, **options), loss_weights)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load like any module, or from the tensors of a Trainer checkpoint, which are only those of the generators.

        Raises:
            FormatError: the checkpoint belongs to other generators.
        """
        if any(key.startswith("generative.") for key in state_dict):
            return super().load_state_dict(state_dict, strict, assign)
        self.generative.load_generator_tensors(dict(state_dict), "the checkpoint")
        return torch.nn.modules.module._IncompatibleKeys([], [])

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise InputError(
            "several GPUs need a process each (torchrun or accelerate launch), or CUDA_VISIBLE_DEVICES must name one: "
            "nn.DataParallel copies the base model without its generators"
        )


def get_generative_model(
    base: PreTrainedModel,
    config: GeneratorConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    loss_weights: Mapping[str, float] | None = None,
) -> TrainableGenerator:
    """Attach untrained generators to a base model, for `transformers.Trainer`, as `peft.get_peft_model` attaches LoRA.

    Args:
        base: see `GenerativeAdapter`; it is frozen.
        config: which layers are adapted, and how.
        tokenizer: needed only for text input or output.
        loss_weights: see `TrainableGenerator`.

    Raises:
        InputError: see `GenerativeAdapter`.
    """
    return TrainableGenerator(GenerativeAdapter(base, config, tokenizer), loss_weights)
