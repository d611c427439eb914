"""A static LoRA of the same layers, trained on the same windows: the control that sees no context."""

import math
from collections.abc import Mapping

import torch
from torch import nn

from gakernels.adapters.adapter import Adapter
from gakernels.model.generative_adapter import GenerativeAdapter
from gakernels.model.packing import rows_packed
from gakernels.model.window_losses import Loss, WindowBatch, to_device, token_losses
from gakernels.nn import LowRankFactors

STATIC_LORA_FILE = "static_lora.safetensors"  # in the folder of a generator, as an `Adapter`


class StaticLora(nn.Module):
    """One trainable pair of factors per adapted layer, of the generated adapters' rank, the same for every window.

    Its gain over the base model is what any training on such text gives; the generator's further gain comes from the
    context.
    """

    def __init__(self, model: GenerativeAdapter) -> None:
        super().__init__()
        self._scale = model.config.adapter_scale
        self.lora_a, self.lora_b = nn.ParameterDict(), nn.ParameterDict()
        config, random = model.config, torch.Generator().manual_seed(model.config.seed)
        rank = (config.state_size if config.norm == "frobenius" else config.rank) + config.static_rank
        for name in model.adapted_names:
            generator, key = model.generator(name), name.replace(".", "/")
            inputs, outputs = generator.input_map.shape[1], generator.output_map.shape[0]
            start = torch.randn(rank, inputs, generator=random) * math.sqrt(1 / 3 / inputs)
            self.lora_a[key] = nn.Parameter(start.to(model.device))
            self.lora_b[key] = nn.Parameter(torch.zeros(outputs, rank, device=model.device))

    def factors(self) -> dict[str, LowRankFactors]:
        """The factors by adapted layer, for `GenerativeAdapter.using`."""
        return {
            key.replace("/", "."): LowRankFactors(a[None], self.lora_b[key][None], self._scale)
            for key, a in self.lora_a.items()
        }

    def window_losses(self, model: GenerativeAdapter, batch: WindowBatch) -> dict[str, Loss]:
        """The same losses as `model.window_losses.window_losses`, but every window uses this adapter."""
        batch = to_device(batch, model.device)
        shape = batch.input_ids.shape
        with model.using(self.factors()), rows_packed(False):
            output = model.decoder(input_ids=batch.input_ids.flatten(0, 1), use_cache=False)
        hidden = output.last_hidden_state.view(*shape, -1)
        return token_losses(model, hidden, batch.input_ids, batch.targets)


def static_adapter(model: GenerativeAdapter, factors: Mapping[str, LowRankFactors]) -> Adapter:
    """Trained factors that serve all contexts, as an adapter that can be saved.

    Args:
        model: the model whose layers they adapt.
        factors: one pair per adapted layer (as `StaticLora.factors` returns them).
    """
    return Adapter(
        lora_a={name: pair.lora_a[0].detach().clone() for name, pair in factors.items()},
        lora_b={name: pair.lora_b[0].detach().clone() for name, pair in factors.items()},
        scale=next(iter(factors.values())).scale,
        base_fingerprint=model.base_fingerprint(),
        generator_fingerprint="",
        base_name=model.base.config.name_or_path,
    )
