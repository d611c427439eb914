"""What no way of generating adapters can beat: the same model with less work, and the operations that a step needs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.parts import part
from benchmarks.presets import Preset
from gakernels.nn.token_loss import token_loss


class DenseLora(nn.Module):
    """The floor `dense_lora`: y = W x + scale A1 (B2 x) of width d_r, with no state and no norm.

    Args:
        base: a frozen transformers causal language model.
        names: of the adapted linear layers.
        width: d_r.
        scale: factor of the adapter.
        seed: of the random start values.
        dtype: of the parameters.
    """

    def __init__(
        self, base: PreTrainedModel, names: Sequence[str], width: int, scale: float, seed: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self._base, self.names, self.scale = [base], list(names), scale
        random = torch.Generator(base.device).manual_seed(seed)
        self.input_maps, self.output_maps = nn.ParameterList(), nn.ParameterList()
        for name in names:
            linear = base.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            outputs, inputs = linear.weight.shape
            for maps, shape in ((self.input_maps, (width, inputs)), (self.output_maps, (outputs, width))):
                start = torch.empty(shape, device=base.device, dtype=dtype)
                maps.append(nn.Parameter(start.normal_(std=0.02, generator=random)))

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Mean cross-entropy over the next tokens of the windows (B, W, M)."""
        with self.attached():
            return frozen_loss(self._base[0], input_ids.flatten(0, 1), mask.flatten(0, 1))

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The base model with this adapter while the block runs."""
        hooks = []
        try:
            for name, input_map, output_map in zip(self.names, self.input_maps, self.output_maps, strict=True):
                hook = self._hook(input_map, output_map)
                hooks.append(self._base[0].get_submodule(name).register_forward_hook(hook))
            yield
        finally:
            for handle in hooks:
                handle.remove()

    def _hook(self, input_map: Tensor, output_map: Tensor) -> Callable[..., Tensor]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            with part("adapted_linear"):
                return output + self.scale * F.linear(F.linear(inputs[0], input_map), output_map)

        return add


class FrozenBase(nn.Module):
    """The floor `frozen_base`: no adapter at all.

    So that it has a backward, the output of the first layer that the others adapt requires a gradient: the backward
    goes through everything behind it, as it must with any adapter there.
    """

    def __init__(self, base: PreTrainedModel, first: str) -> None:
        super().__init__()
        self._base, self.first = [base], first

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Mean cross-entropy over the next tokens of the windows (B, W, M)."""
        first = self._base[0].get_submodule(self.first)
        handle = first.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
        try:
            return frozen_loss(self._base[0], input_ids.flatten(0, 1), mask.flatten(0, 1))
        finally:
            handle.remove()


def frozen_loss(base: PreTrainedModel, ids: Tensor, valid: Tensor) -> Tensor:
    """Mean cross-entropy over the next tokens of windows (windows, M), as the library's training computes it."""
    hidden = base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    with part("loss"):
        head, predicted = base.get_output_embeddings(), F.pad(valid[:, 1:], (0, 1)).flatten()
        losses = token_loss(hidden.flatten(0, 1), F.pad(ids[:, 1:], (0, 1)).flatten(), head, base.config.vocab_size)
        return (losses * predicted).sum() / predicted.sum()


def step_flops(preset: Preset) -> float:
    """Operations of the base model in a training step: forward, and backward of the activations only.

    The adapters are not counted, so that the figure is the same for every provider; they are a few per cent. Causal
    attention counts half of its square, and its backward twice its forward.
    """
    width, kv_width = preset.heads * preset.head_dim, preset.kv_heads * preset.head_dim
    attention = preset.hidden * (2 * width + 2 * kv_width)
    weights = preset.layers * (attention + 3 * preset.hidden * preset.ffn) + preset.hidden * preset.vocabulary
    tokens = 2 * preset.segment_tokens
    forward_linear = 2.0 * weights * tokens
    forward_attention = preset.layers * 2.0 * width * preset.window * tokens
    return 2 * forward_linear + 3 * forward_attention
