r"""The model type `gakernels` of lm-evaluation-harness: a field of each document becomes the adapter that answers it.

    python -m gakernels.integrations.lm_eval --tasks boolq \
        --model gakernels --model_args generator=my-generator,context_field=passage

is the command `lm_eval` with that model type, because lm_eval finds other packages' model types only when they are
imported. Needs lm_eval, which `import gakernels` does not.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import get_dtype
from tqdm import tqdm

from gakernels.distributed import Ranks
from gakernels.errors import InputError
from gakernels.model import GenerativeAdapter

Answer = TypeVar("Answer")


@register_model("gakernels")
class GenerativeAdapterLM(HFLM):
    """A base model that answers each request with the adapter of its document's context.

    The context is the text in a field of the document (a list of texts becomes one line each). It is removed from the
    prompt: if the task put it there, its last occurrence is cut out (the demonstrations before it keep theirs).
    Requests about the same context are answered together, with one adapter. The base model alone answers if the field
    is empty or there is no `context_field`.

    Args:
        generator: folder or name on the hub.
        pretrained: the base model; by default the one that the generator names.
        context_field: the field of the task's documents.
        device: such as `cuda:0`; by default a GPU if there is one.
        dtype: of the base model; `auto` is that of its weights.
        options: for `HFLM`, such as `batch_size`; none control how the base model is loaded.

    Raises:
        InputError: a model can't be loaded or has no tokenizer, or there are several processes; later, a document does
            not have the field, or it holds no text.
        FormatError: the generator is damaged or belongs to another base model.
    """

    def __init__(
        self,
        generator: str,
        pretrained: str | None = None,
        context_field: str | None = None,
        device: str | None = None,
        dtype: str | torch.dtype = "auto",
        **options: Any,
    ) -> None:
        if Ranks.from_environment().world > 1:
            raise InputError("the model type gakernels runs in one process, but there are several")
        self.generative = model = GenerativeAdapter.from_pretrained(generator, base=pretrained)
        if model.tokenizer is None:
            raise InputError(f"the base model of {generator} must have a tokenizer, but it has none")
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model.to(place)
        if dtype != "auto":
            model.base.to(get_dtype(dtype))
        self.context_field = context_field
        super().__init__(model.base, tokenizer=model.tokenizer, backend="causal", **options)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """See `HFLM`; the prompt is the first argument of a request."""
        return self._by_context(requests, super().loglikelihood, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """See `HFLM`; the text is scored whole, even if it holds the context."""
        return self._by_context(requests, super().loglikelihood_rolling, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """See `HFLM`; the prompt is the first argument of a request."""
        return self._by_context(requests, super().generate_until, disable_tqdm)

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Raises: InputError: there is a context_field, since lm_eval stores answers by the prompt alone."""
        if self.context_field is not None:
            raise InputError("use_cache must be off with context_field: answers are stored without their context")
        super().set_cache_hook(cache_hook)

    def _by_context(
        self, requests: list[Instance], answer: Callable[..., list[Answer]], disable_tqdm: bool
    ) -> list[Answer]:
        numbers: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            numbers.setdefault(self._context(request), []).append(number)
        answers: dict[int, Answer] = {}
        for context, group in tqdm(numbers.items(), desc="contexts", disable=disable_tqdm):
            adapter = self.generative.adapt(context) if context else None
            asked = [_without(context, requests[number]) for number in group]
            with nullcontext() if adapter is None else self.generative.adapted(adapter):
                answers.update(zip(group, answer(asked, disable_tqdm=True), strict=True))
        return [answers[number] for number in range(len(requests))]

    def _context(self, request: Instance) -> str:
        if self.context_field is None:
            return ""
        if self.context_field not in request.doc:
            fields = ", ".join(request.doc)
            raise InputError(f"context_field must be a field of the documents ({fields}), but is {self.context_field}")
        value = request.doc[self.context_field]
        lines = value if isinstance(value, list) else [value or ""]
        if not all(isinstance(line, str) for line in lines):
            raise InputError(
                f"context_field {self.context_field} must hold a text or a list of them, but is {value!r:.40}"
            )
        return "\n".join(lines).strip()


def _without(context: str, request: Instance) -> Instance:
    """A request whose prompt does not hold the context."""
    prompt, *rest = request.args
    if not context or not rest or context not in prompt:
        return request
    before, _, after = prompt.rpartition(context)
    return replace(request, arguments=(before + after if before.strip() else after.lstrip(), *rest))


if __name__ == "__main__":
    cli_evaluate()
