"""The effect of a quantised base model on losses, gradients and the demo's answers; prints markdown tables.

    python studies/base_precision.py --demo
    python studies/base_precision.py --model MODEL_FOLDER --text TEXT_FILE [--train STEPS]

Losses      nats per token of the text in windows of --tokens tokens, by the base model alone.
Logits      ||logits - logits in float32|| / ||logits in float32||, over all of them.
Gradients   of one linear layer: dx = dy W with dy from the text's loss, dy rounded to 8 bits in either type and W in
            full, compared with the exact dx; the median over all linear layers of the decoder layers.
Training    --train steps of pretraining a generator (4 segments of 4 chunks of 64 tokens a step), the same windows for
            every base; then the losses of held-out windows, with the base used in training and with a float32 base.
Demo        questions about invented people, as `gakernels demo` asks them (one person per document).
"""

import argparse
import copy
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from gakernels import GeneratorConfig
from gakernels.data.people import Document, draw_document
from gakernels.demo.experiment import FACTS_PER_PERSON, ask_all_ways
from gakernels.model import GenerativeAdapter, load_base
from gakernels.model.attachment import decoder_layers
from gakernels.model.quantized_base import QUANTIZATIONS, quantize_base
from gakernels.model.window_losses import pretraining_windows, window_losses
from gakernels.nn.float8 import E4M3, E5M2, quantize_rows

ASSETS = Path(str(files("gakernels.demo") / "assets"))
CHUNKS, CHUNK, HELD_OUT = 4, 64, 32
PRECISIONS = ("float32", "bfloat16", *QUANTIZATIONS)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--model", type=Path, help="folder of a causal language model for transformers")
    parser.add_argument("--text", type=Path, help="a plain text file that the model reads")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--train", type=int, default=0, metavar="STEPS")
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    arguments = parser.parse_args()
    if arguments.model is not None:
        base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
        windows = read(arguments.model, arguments.text, arguments.tokens, arguments.windows)
        print_losses(base, windows, arguments.precisions)
        print_gradients(base, windows)
        if arguments.train:
            segments = read(arguments.model, arguments.text, CHUNKS * CHUNK, 4 * arguments.train + HELD_OUT)
            print_training(base, segments, arguments.precisions, arguments.train)
    if arguments.demo:
        print_demo(arguments.precisions, arguments.questions, arguments.seed)


def read(model: Path, text: Path, tokens: int, windows: int) -> Tensor:
    """Windows (windows, tokens) from the start of a text."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    characters = text.read_text(encoding="utf-8")[: 8 * tokens * windows]
    ids = torch.tensor(tokenizer(characters, add_special_tokens=False)["input_ids"])
    return ids[: len(ids) // tokens * tokens].view(-1, tokens)[:windows]


def in_precision(base: PreTrainedModel, precision: str) -> PreTrainedModel:
    """A copy of a model; quantised copies compute in bfloat16 except in their linear layers."""
    base = copy.deepcopy(base)
    if precision == "float32":
        return base
    base = base.to(torch.bfloat16)  # type: ignore[arg-type]
    return base if precision == "bfloat16" else quantize_base(base, precision)


def print_losses(base: PreTrainedModel, windows: Tensor, precisions: list[str]) -> None:
    print(f"{windows.shape[0]} windows of {windows.shape[1]} tokens\n")
    print("| base | nats a token | against float32 | logits |\n|---|---|---|---|")
    exact, wanted = loss_and_logits(base, windows)
    for precision in precisions:
        loss, logits = loss_and_logits(in_precision(base, precision), windows)
        off = ((logits - wanted).norm() / wanted.norm()).item()
        print(f"| {precision} | {loss:.4f} | {100 * (loss / exact - 1):+.2f}% | {off:.1e} |", flush=True)


@torch.no_grad()
def loss_and_logits(base: PreTrainedModel, windows: Tensor) -> tuple[float, Tensor]:
    logits = torch.cat([base(input_ids=window[None], use_cache=False).logits for window in windows]).float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()).item(), logits


def print_gradients(base: PreTrainedModel, windows: Tensor) -> None:
    errors: dict[torch.dtype, list[float]] = {E4M3: [], E5M2: []}
    for weight, grad in output_gradients(base, windows[:4]):
        exact = grad @ weight
        scales = quantize_rows(weight).scale.flatten()
        for dtype, found in errors.items():
            rows = quantize_rows(grad, dtype, scales)
            dx = (rows.values.float() * rows.scale) @ (weight / scales[:, None])
            found.append(((dx - exact).norm() / exact.norm()).item())
    print("\n| dy in | error of dx |\n|---|---|")
    for dtype, found in errors.items():
        print(f"| {str(dtype).removeprefix('torch.')} | {torch.tensor(found).median().item():.2%} |")


def output_gradients(base: PreTrainedModel, windows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The weight of each linear layer, and the gradient (tokens, d_out) of its output."""
    found: list[tuple[Tensor, Tensor]] = []

    def keep(module: Any, _: Any, grads: Any) -> None:
        found.append((module.weight.detach(), grads[0].flatten(0, -2)))

    layers = decoder_layers(base)[1].modules()
    hooks = [module.register_full_backward_hook(keep) for module in layers if isinstance(module, nn.Linear)]
    base.requires_grad_(False)
    embed: Any = base.get_input_embeddings()
    embedded = embed(windows).requires_grad_()
    logits = base(inputs_embeds=embedded, use_cache=False).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()).backward()
    for hook in hooks:
        hook.remove()
    yield from found


def print_training(base: PreTrainedModel, segments: Tensor, precisions: list[str], steps: int) -> None:
    print(
        f"\n{steps} steps\n\n| base | reconstruction | completion | with the base in float32 | |\n|---|---|---|---|---|"
    )
    config = GeneratorConfig(linears=("o_proj", "down_proj"), state_size=64, rank=16, chunk_size=CHUNK, scale=0.5)
    for precision in precisions:
        model = GenerativeAdapter(in_precision(base, precision), config)
        train(model, segments[HELD_OUT:], steps)
        full = GenerativeAdapter(copy.deepcopy(base), config)
        full.load_generator_tensors(model.generator_tensors(), precision)
        found = [*held_out_losses(model, segments[:HELD_OUT]), *held_out_losses(full, segments[:HELD_OUT])]
        print("| " + " | ".join([precision, *(f"{loss:.4f}" for loss in found)]) + " |", flush=True)


def train(model: GenerativeAdapter, segments: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.generators.parameters(), lr=3e-3, weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20) * (1 - step / steps)
        random = torch.Generator().manual_seed(step)
        rows = segments[torch.randint(len(segments), (4,), generator=random)]
        losses = window_losses(model, pretraining_windows(rows, CHUNKS, random))
        torch.stack([loss.mean for loss in losses.values()]).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.generators.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def held_out_losses(model: GenerativeAdapter, segments: Tensor) -> list[float]:
    """Reconstruction and completion, nats per token."""
    random = torch.Generator().manual_seed(0)
    losses = window_losses(model, pretraining_windows(segments, CHUNKS, random, "copy"))
    return [losses[name].mean.item() for name in ("reconstruction", "completion")]


def print_demo(precisions: list[str], questions: int, seed: int) -> None:
    base, tokenizer = load_base(str(ASSETS / "base"))
    rng, documents = Random(seed), list[Document]()
    while sum(len(document.facts) for document in documents) < questions:
        documents.append(draw_document(rng, 1, FACTS_PER_PERSON[1], "test"))
    print("\n| base | closed-book | document in the prompt | own adapter | other adapter |\n|---|---|---|---|---|")
    for precision in precisions:
        model = GenerativeAdapter.from_pretrained(ASSETS / "generator", in_precision(base, precision), tokenizer)
        found = ask_all_ways(model, documents).accuracy
        print("| " + " | ".join([precision, *(f"{value:.1%}" for value in found.values())]) + " |", flush=True)


if __name__ == "__main__":
    main()
