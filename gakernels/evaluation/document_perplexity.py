"""The loss of a text, closed-book, in windows as the generator reads it."""

from contextlib import nullcontext

import torch

from gakernels.adapters.adapter import Adapter
from gakernels.model import GenerativeAdapter
from gakernels.model.encoding import encode_context
from gakernels.model.window_losses import token_losses
from gakernels.model.windows import pad_windows, split_evenly


@torch.no_grad()
def document_loss(model: GenerativeAdapter, text: str, adapter: Adapter | None) -> tuple[float, int]:
    """Negative log-likelihood of a text in nats, and the number of predicted tokens.

    The text is cut into even windows of at most the generator's chunk size; the first token of each is not predicted.

    Raises:
        InputError: the text is empty.
    """
    chunks = split_evenly(encode_context(model.tokenizer, text, first=True), model.config.chunk_size)
    input_ids, mask = (tensor.to(model.device) for tensor in pad_windows([[chunk] for chunk in chunks], pad=0))
    with model.adapted(adapter) if adapter is not None else nullcontext():
        output = model.base.get_decoder()(input_ids=input_ids[:, 0], use_cache=False)
    target = mask.clone()
    target[..., 0] = False
    loss = token_losses(model, output.last_hidden_state[:, None], input_ids, {"text": target})["text"]
    return float(loss.total), int(loss.tokens)
