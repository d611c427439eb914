"""What the compact forms of an adapter lose on the demo's model: size, norm(S), logits, answers; a markdown table.

    python studies/compact_forms.py

Columns, over documents about one invented person each:

    bytes     numbers of the form, without the file's header
    norm(S)   ||U V^T - N||_F / ||N||_F against float32, the mean and the largest over layers and documents
    logits    difference of the logits of the questions' tokens against float32, root mean square relative to that of
              what the adapter changes in them
    KL        divergence of the next-token distributions from those with float32, mean over those tokens, in nats
    accuracy  closed-book, greedy
"""

import argparse
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from gakernels import CompactAdapter, GenerativeAdapter
from gakernels.adapters.adapter import Adapter
from gakernels.adapters.quantized_compact import QuantizedCompactAdapter
from gakernels.data.people import Document, draw_document
from gakernels.demo.experiment import accuracy, answer

FORMS = ("adapter, float32", "compact, float32", "compact, bfloat16", "compact, 8 bits", "compact, 4 bits")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the demo's models are too small for more
    model = GenerativeAdapter.from_pretrained(Path(str(files("gakernels.demo") / "assets" / "generator")))
    rng = Random(arguments.seed)
    documents = [draw_document(rng, 1, (15, 18), "test") for _ in range(arguments.documents)]
    exact = [model.stream().append(document.text()).compact() for document in documents]
    reference = [
        question_logits(model, document, model.expand(compact))
        for document, compact in zip(documents, exact, strict=True)
    ]
    plain = [question_logits(model, document, None) for document in documents]
    print("| form | bytes | norm(S): mean | largest | logits | KL | accuracy |\n|---|---|---|---|---|---|---|")
    for form in FORMS:
        used = [convert(compact, form) for compact in exact]
        size = model.expand(exact[0]).numbers() * 4 if form == FORMS[0] else nbytes(exact[0], form)
        losses = [loss for old, new in zip(exact, used, strict=True) for loss in norm_losses(old, new)]
        logits = [
            question_logits(model, document, model.expand(new)) for document, new in zip(documents, used, strict=True)
        ]
        changed = torch.cat([one - other for one, other in zip(reference, plain, strict=True)]).square().mean().sqrt()
        error = torch.cat([one - other for one, other in zip(logits, reference, strict=True)]).square().mean().sqrt()
        kl = F.kl_div(
            torch.cat(logits).log_softmax(-1),
            torch.cat(reference).log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        )
        right = ask(model, documents, [model.expand(new) for new in used])
        print(
            f"| {form} | {size:,} | {sum(losses) / len(losses):.2g} | {max(losses):.2g} | {error / changed:.2g} | "
            f"{kl:.2g} | {right:.1%} |"
        )


def convert(compact: CompactAdapter, form: str) -> CompactAdapter:
    """The compact adapter after a round trip through a form."""
    if form.endswith("bits"):
        return quantize(compact, form).dequantize()
    return compact.to(dtype=torch.bfloat16) if form.endswith("bfloat16") else compact


def quantize(compact: CompactAdapter, form: str) -> QuantizedCompactAdapter:
    return QuantizedCompactAdapter.quantize(compact, int(form.split()[1]))


def nbytes(compact: CompactAdapter, form: str) -> int:
    """The size of a compact form in bytes."""
    return quantize(compact, form).nbytes if form.endswith("bits") else convert(compact, form).nbytes


def norm_losses(exact: CompactAdapter, other: CompactAdapter) -> list[float]:
    """||U' V'^T - U V^T||_F / ||U V^T||_F by layer."""
    losses = []
    for name in exact.left:
        old, new = (one.left[name].double() @ one.right[name].double().mT for one in (exact, other))
        losses.append(float((new - old).norm() / old.norm()))
    return losses


@torch.no_grad()
def question_logits(model: GenerativeAdapter, document: Document, adapter: Adapter | None) -> Tensor:
    """Logits (tokens, vocabulary) of all questions with their answers, closed-book."""
    assert model.tokenizer is not None
    rows = []
    for prompt, value in document.questions():
        ids = torch.tensor([list(model.tokenizer(f"{prompt} {value}.")["input_ids"])])
        if adapter is None:
            rows.append(model.base(input_ids=ids).logits[0])
        else:
            with model.adapted(adapter):
                rows.append(model.base(input_ids=ids).logits[0])
    return torch.cat(rows)


def ask(model: GenerativeAdapter, documents: Sequence[Document], adapters: Sequence[Adapter]) -> float:
    """The share of questions that are answered correctly with the adapter of their document."""
    pairs = [
        (pair, adapter) for document, adapter in zip(documents, adapters, strict=True) for pair in document.questions()
    ]
    given = answer(model, [prompt for (prompt, _), _ in pairs], [adapter for _, adapter in pairs])
    return accuracy(given, [value for (_, value), _ in pairs])


if __name__ == "__main__":
    main()
