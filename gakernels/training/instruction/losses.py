"""The losses of a batch: contexts become adapters, and conversations are read under them."""

from collections.abc import Mapping

from torch import Tensor

from gakernels.model import GenerativeAdapter
from gakernels.model.window_losses import Loss, token_losses
from gakernels.nn import LowRankFactors
from gakernels.training.instruction.batches import InstructionBatch

PACKED_ATTENTION = ("sdpa", "eager")
"""Attention of transformers that keeps the conversations of a window apart by their positions."""


def instruction_losses(model: GenerativeAdapter, batch: InstructionBatch) -> dict[str, Loss]:
    """Encode the contexts, then the conversations under the adapters of the contexts, and take each loss."""
    batch = batch.to(model.device)
    hidden, states = model(batch.context.input_ids, batch.context.mask, batch.context.chunks, batch.context.seen)
    targets = batch.context.targets
    losses = token_losses(model, hidden, batch.context.input_ids, targets) if targets else {}
    return {**conversation_losses(model, batch, adapters(model, states, batch.owner)), **losses}


def adapters(model: GenerativeAdapter, states: Mapping[str, Tensor], owner: Tensor) -> dict[str, LowRankFactors]:
    """The adapters of states (B, d_r, d_r) by adapted layer, for windows (N,) that belong to them."""
    factors = {}
    for name, state in states.items():
        lora_a, lora_b = model.generator(name).factors(state)
        factors[name] = LowRankFactors(lora_a, lora_b, model.config.adapter_scale, owner.to(lora_a.device))
    return factors


def conversation_losses(
    model: GenerativeAdapter, batch: InstructionBatch, factors: Mapping[str, LowRankFactors]
) -> dict[str, Loss]:
    """The loss of the answers of a batch, under the given adapters (none at all for the base model)."""
    batch = batch.to(model.device)
    return token_losses(model, encode_windows(model, batch, factors), batch.input_ids, {"answers": batch.answers})


def encode_windows(model: GenerativeAdapter, batch: InstructionBatch, factors: Mapping[str, LowRankFactors]) -> Tensor:
    """The last hidden states (N, M, d_h) of the windows of conversations, each under its adapter."""
    batch = batch.to(model.device)
    with model.using(factors):
        # No attention mask: padding is on the right, and positions that start anew tell conversations apart.
        output = model.base.get_decoder()(input_ids=batch.input_ids, position_ids=batch.positions, use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden


def can_pack(model: GenerativeAdapter) -> bool:
    """Whether several conversations in one window stay apart: not with every kind of attention."""
    return model.base.config.get_text_config()._attn_implementation in PACKED_ATTENTION
