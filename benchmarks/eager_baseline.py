"""The eager baseline: the computation of the authors' released code, rewritten in plain PyTorch.

It shares the base model, the parameters and the sketch with `gakernels`, but computes differently:

- keys, values and their outer products for all windows, including those whose state no window sees;
- prefixes as a masked (windows x windows) expansion of the states that is then summed;
- the norm as `torch.svd_lowrank` with a fixed sketch: three QR factorisations and an SVD, differentiated by autograd,
  multiplied out to d_r x d_r;
- the adapter applied with width d_r: input map, norm, output map;
- the loss of the transformers model on full logits, and activation checkpointing as an option.

Its state matrix is S^T, so its sketch acts on the output side (`AdapterGenerator.sketch_side`). Of several choices
it makes the cheapest: a norm only for each distinct prefix, and no key-value cache.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from benchmarks.measure import part
from gakernels.model.attachment import decoder_layers, lean_modules
from gakernels.nn import AdapterGenerator

GUARD = 1e-7  # singular values closer than this, relative or absolute, make the released code drop the matrix


class EagerBaseline(nn.Module):
    """The released computation on a base model, with the parameters of our generators.

    The base may have a `GenerativeAdapter`, which does nothing outside its own passes, except for its lean
    modules: `plain_modules` replaces them by those of transformers.

    Args:
        base: a transformers causal language model; it is changed only within `forward` and `attached`.
        generators: by the name of the adapted linear layer; only parameters and sketches are used, not methods.
        scale: factor of the adapter.
        checkpointing: recompute the decoder layers, generators included, in the backward.
        guard: replace the norm by zero if singular values come within `GUARD`, as the released code does.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        generators: Mapping[str, AdapterGenerator],
        scale: float,
        checkpointing: bool = False,
        guard: bool = True,
    ) -> None:
        super().__init__()
        self._base, self.scale, self.checkpointing, self.guard = [base], scale, checkpointing, guard
        self.names = list(generators)
        self.generators = nn.ModuleDict({name.replace(".", "/"): generators[name] for name in self.names})

    @property
    def base(self) -> PreTrainedModel:
        """The base model; not a submodule, so that `parameters` has only those of the generators."""
        return self._base[0]

    def generator(self, name: str) -> AdapterGenerator:
        """The generator of a linear layer, by its name in the base model."""
        generator = self.generators[name.replace(".", "/")]
        assert isinstance(generator, AdapterGenerator)
        return generator

    def forward(self, input_ids: Tensor, mask: Tensor, seen: Sequence[int]) -> Tensor:
        """Mean cross-entropy over all next tokens of all windows.

        Args:
            input_ids: (B, W, M).
            mask: (B, W, M) bool, False for padding on the right.
            seen: (W,), how many of the first windows the adapter of each window has seen.
        """
        ids, valid = input_ids.flatten(0, 1), mask.flatten(0, 1)
        with self.attached(mask, seen):
            return next_token_loss(self.base, ids, valid, attention_mask=valid.long())

    @contextmanager
    def attached(self, mask: Tensor, seen: Sequence[int]) -> Iterator[None]:
        """The base model as the released code changes it, for windows with this mask (B, W, M), while the block runs.

        The backward does not need this: a layer's new forward forms its adapters again when it is recomputed.
        """
        prefix, layers = decoder_layers(self.base)
        changed: list[nn.Module] = []
        try:
            for number, layer in enumerate(layers):
                names = [name for name in self.names if name.startswith(f"{prefix}.{number}.")]
                if names:
                    layer.forward = self._layer_forward(layer.forward, names, mask, seen)
                    changed.append(layer)
            yield
        finally:
            for layer in changed:
                del layer.forward

    def _layer_forward(
        self, plain: Callable[..., Tensor], names: list[str], mask: Tensor, seen: Sequence[int]
    ) -> Callable[..., Tensor]:
        """A decoder layer's forward that first forms the adapters of its linear layers from its input (B W, M, d_h)."""

        def adapted(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            windows = hidden.unflatten(0, mask.shape[:2])
            hooks = []
            for name in names:
                generator = self.generator(name)
                norms = window_norms(generator, windows, mask, seen, self.guard).flatten(0, 1)
                hook = _adapter_hook(generator, norms, self.scale)
                hooks.append(self.base.get_submodule(name).register_forward_hook(hook))
            try:
                return plain(hidden, *args, **kwargs)
            finally:
                for handle in hooks:
                    handle.remove()

        if not self.checkpointing:
            return adapted
        return lambda hidden, *args, **kwargs: checkpoint(adapted, hidden, *args, use_reentrant=False, **kwargs)


def next_token_loss(base: PreTrainedModel, ids: Tensor, valid: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean cross-entropy over the next tokens of windows (windows, M), on full logits, in float32 or wider."""
    logits = base(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits
    labels = F.pad(ids.masked_fill(~valid, -100), (0, 1), value=-100)[:, 1:]
    with part("loss"):
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(wide.flatten(0, 1), labels.flatten(), ignore_index=-100)


@contextmanager
def plain_modules(base: PreTrainedModel) -> Iterator[None]:
    """The base model with the modules of transformers instead of our lean ones while the block runs."""
    ours = lean_modules(base)
    for parent, name, module in ours:
        setattr(parent, name, module.original)
    try:
        yield
    finally:
        for parent, name, module in ours:
            setattr(parent, name, module)


def _adapter_hook(generator: AdapterGenerator, norms: Tensor, scale: float) -> Callable[..., Tensor]:
    """Adds scale B (N^T (A x)) of width d_r to the output of a linear layer, with a matrix N (d_r, d_r) per window.

    The static term, which the released code does not have, is a separate plain LoRA.
    """

    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        with part("adapted_linear"):
            inner = F.linear(inputs[0], generator.input_map) @ norms
            change = F.linear(inner, generator.output_map)
            if generator.static_lora_a is not None and generator.static_lora_b is not None:
                change = change + F.linear(F.linear(inputs[0], generator.static_lora_a), generator.static_lora_b)
            return output + scale * change

    return add


def window_norms(generator: AdapterGenerator, hidden: Tensor, mask: Tensor, seen: Sequence[int], guard: bool) -> Tensor:
    """The normalised state (B, W, d_r, d_r) that each window sees, zero for a window that sees none.

    Args:
        generator: its parameters and sketch are used.
        hidden: (B, W, M, d_h), the input of the decoder layer.
        mask: (B, W, M) bool.
        seen: (W,).
        guard: see `EagerBaseline`.
    """
    with part("generator"):
        merged = merge_states(window_states(generator, hidden, mask), seen)
        first = {count: window for window, count in reversed(list(enumerate(seen))) if count > 0}
        distinct = merged[:, list(first.values())]
    with part("polar"):
        norms = randomized_svd_norm(distinct, generator.sketch, generator.power_iterations, guard)
    with part("generator"):
        slot = {count: place for place, count in enumerate(first, start=1)}
        nothing = torch.zeros_like(norms[:, :1])
        return torch.cat([nothing, norms], dim=1)[:, [slot.get(count, 0) for count in seen]]


def window_states(generator: AdapterGenerator, hidden: Tensor, mask: Tensor) -> Tensor:
    """K^T V of each window (B, W, d_r, d_r), the transpose of our state, of hidden states (B, W, M, d_h)."""
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + generator.eps)
    normed = generator.norm_weight * normed.to(hidden.dtype)
    valid = mask[..., None].to(hidden.dtype)
    keys = F.linear(normed, generator.key_projection.mT) * valid
    values = F.linear(normed, generator.value_projection) * valid
    return keys.mT @ values


def merge_states(states: Tensor, seen: Sequence[int]) -> Tensor:
    """The sum of the states (B, W, d_r, d_r) that each window sees, by a masked expansion (B, W, W, d_r, d_r)."""
    order = torch.arange(len(seen), device=states.device)
    visible = order < torch.tensor(seen, device=states.device)[:, None]
    return (states[:, None] * visible[None, :, :, None, None].to(states.dtype)).sum(dim=2)


def randomized_svd_norm(matrices: Tensor, sketch: Tensor, iterations: int, guard: bool) -> Tensor:
    """U V^T (..., d_r, d_r) of `torch.svd_lowrank(matrices, q=r, niter=iterations)` with the given sketch (d_r, r).

    In float32 or wider. The result has the dtype of the matrices.
    """
    with torch.autocast(matrices.device.type, enabled=False):
        wide = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
        basis = torch.linalg.qr(wide @ sketch.to(wide.dtype)).Q
        for _ in range(iterations):
            basis = torch.linalg.qr(wide.mT @ basis).Q
            basis = torch.linalg.qr(wide @ basis).Q
        left, singular, right = torch.linalg.svd(basis.mT @ wide, full_matrices=False)
        norms = (basis @ left) @ right
        if guard:
            gaps = singular[..., :-1] - singular[..., 1:]
            close = ((gaps < GUARD) | (gaps < GUARD * singular[..., :-1])).any(-1)
            norms = norms.masked_fill(close[..., None, None], 0)
        return norms.to(matrices.dtype)
