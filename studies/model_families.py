"""Which families of language models of the installed transformers can be adapted: a markdown table.

    python -m studies.model_families            # all of them: docs/model_families.md
    python -m studies.model_families gpt2 opt   # some

Each is a tiny random model from its configuration class. All linear layers that its decoder layers call are adapted,
and five things are checked, in float32:

    start     the adapter at the start of training changes no logit
    adapters  each row of a batch, with an adapter of its own, gets the logits of a copy of the base with W + Delta W
    merged    so does the base with the adapter merged into it, which is the old one again afterwards
    PEFT      so does PEFT with the folder that was written for it
    files     a saved generator makes the same adapter
    padding   with prompts padded on the left, each row is continued as by its copy with W + Delta W
"""

import argparse
import copy
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gakernels import Adapter, GenerativeAdapter, GeneratorConfig, InputError
from gakernels.errors import first_line
from gakernels.model.attachment import decoder_layers
from gakernels.nn.adapted_opaque_linear import is_linear
from studies.tiny_models import VOCABULARY, families, make_base

TOLERANCE = 1e-4


class DifferenceError(AssertionError):
    """Two results that should be the same are not."""


def examine(kind: str) -> str:
    """What happens to a family: "works", with remarks, or what stops it."""
    try:
        base = make_base(kind)
        _logits(base, _random(2, 7))
    except Exception as error:
        return f"not tried: a tiny random model does not run ({first_line(error):.90})"
    try:
        return "works" + "".join(f"; {remark}" for remark in check(base))
    except DifferenceError as error:
        return f"wrong: {error}"
    except InputError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"fails: {type(error).__name__}: {first_line(error)}"


def check(base: PreTrainedModel) -> list[str]:
    """Make all the checks; returns remarks.

    Raises:
        DifferenceError: one of them failed.
        InputError: the base is refused.
    """
    ids, plain = _random(2, 7), copy.deepcopy(base)
    logits = _logits(base, ids)
    model = _attach(base, adaptable(plain) or ["o_proj"])
    with model.adapted(_adapters(model)):
        _same(_logits(base, ids), logits, "the adapter at the start changes the logits")
    _train(model)
    _check_causal(plain, ids, logits)
    adapters = _adapters(model)
    with model.adapted(adapters):
        found = _logits(base, ids)
    if (found - logits).abs().max() < 1e-3:
        raise DifferenceError("an adapter changes nothing")
    merged = [_merged(plain, adapter) for adapter in adapters]
    wanted = torch.cat([_logits(copy_, ids[row : row + 1]) for row, copy_ in enumerate(merged)])
    _same(found, wanted, "rows with adapters differ from a copy with W + Delta W")
    remarks = [*_check_merge(model, adapters[0], ids, wanted), *_check_peft(plain, ids)]
    _check_files(model, plain)
    return [*remarks, *_check_padding(model, plain, adapters, merged)]


def adaptable(base: PreTrainedModel) -> list[str]:
    """Names, within their decoder layer, of the linear layers that are called and return one tensor."""
    called: list[str] = []
    handles = []
    for layer in decoder_layers(base)[1]:
        for name, module in layer.named_modules():
            if is_linear(module):

                def note(_: nn.Module, args: object, output: object, name: str = name) -> None:
                    if isinstance(output, Tensor):
                        called.append(name)

                handles.append(module.register_forward_hook(note))
    _logits(base, _random(2, 7))
    for handle in handles:
        handle.remove()
    return list(dict.fromkeys(called))


def _random(*shape: int) -> Tensor:
    return torch.randint(3, VOCABULARY, shape)


@torch.no_grad()
def _logits(base: Any, ids: Tensor) -> Tensor:
    logits: Tensor = base(input_ids=ids, use_cache=False).logits
    return logits


def _same(found: Tensor, wanted: Tensor, what: str) -> None:
    error = (found - wanted).abs().max() / wanted.abs().max()
    if not error < TOLERANCE:
        raise DifferenceError(f"{what} (relative error {float(error):.1g})")


def _attach(base: PreTrainedModel, linears: Sequence[str]) -> GenerativeAdapter:
    config = GeneratorConfig(linears=tuple(linears), state_size=16, rank=4, chunk_size=6, scale=0.5)
    return GenerativeAdapter(base, config)


def _train(model: GenerativeAdapter) -> None:
    """Random output maps in place of zeros."""
    with torch.no_grad():
        for name in model.adapted_names:
            model.generator(name).output_map.normal_(std=0.5)


def _adapters(model: GenerativeAdapter) -> list[Adapter]:
    return model.adapt([_random(length).tolist() for length in (15, 9)])


def _check_causal(base: PreTrainedModel, ids: Tensor, logits: Tensor) -> None:
    other = torch.cat([ids[:, :-1], (ids[:, -1:] - 2) % (VOCABULARY - 3) + 3], dim=1)
    _same(_logits(base, other)[:, :-1], logits[:, :-1], "a token changes the logits of those before it")


@torch.no_grad()
def _merged(plain: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    """A copy with W + Delta W, by hand."""
    base = copy.deepcopy(plain)
    for name in adapter.lora_a:
        linear, delta = base.get_submodule(name), adapter.delta(name)
        linear.get_parameter("weight").add_(delta.T if isinstance(linear, Conv1D) else delta)
    return base


def _check_merge(model: GenerativeAdapter, adapter: Adapter, ids: Tensor, wanted: Tensor) -> Iterator[str]:
    before = _logits(model.base, ids)
    try:
        model.merge(adapter)
    except InputError:
        yield "an adapter can't be merged"
        return
    _same(_logits(model.base, ids[:1]), wanted[:1], "merged and unmerged logits differ")
    model.unmerge()
    if not torch.equal(_logits(model.base, ids), before):
        raise DifferenceError("the base is not the old one after unmerge()")


def _check_peft(plain: PreTrainedModel, ids: Tensor) -> Iterator[str]:
    names = adaptable(plain)
    moved = [name for name in names if not _in_peft(plain, name)]
    if moved:
        yield f"PEFT can't load {', '.join(sorted({name.rpartition('.')[2] for name in moved}))}"
    model = _attach(copy.deepcopy(plain), [name for name in names if name not in moved])
    _train(model)
    adapter = _adapters(model)[0]
    with model.adapted(adapter):
        wanted = _logits(model.base, ids)
    with tempfile.TemporaryDirectory() as folder:
        adapter.save_peft(folder)
        other = peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder)
    _same(_logits(other, ids), wanted, "PEFT's logits differ")


def _in_peft(base: PreTrainedModel, name: str) -> bool:
    """PEFT takes these names for those of experts that transformers 5 has fused, or of a layer of Mamba."""
    settings, last = str(base.config.to_dict()), name.rpartition(".")[2]
    moved = {"gate_proj", "up_proj", "down_proj"} if "experts" in settings else set()
    return last not in moved | ({"out_proj"} if "mamba" in settings else set())


def _check_files(model: GenerativeAdapter, plain: PreTrainedModel) -> None:
    context = _random(9).tolist()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = GenerativeAdapter.from_pretrained(folder, copy.deepcopy(plain))
        made, wanted = again.adapt(context), model.adapt(context)
        wanted.save(Path(folder) / "adapter.safetensors")
        loaded = Adapter.load(Path(folder) / "adapter.safetensors")
    for name in model.adapted_names:
        for other in (made, loaded):
            _same(other.lora_b[name], wanted.lora_b[name], "a saved generator or adapter differs")


def _check_padding(
    model: GenerativeAdapter, plain: PreTrainedModel, adapters: Sequence[Adapter], merged: Sequence[PreTrainedModel]
) -> Iterator[str]:
    short, ids = _random(1, 4), _random(2, 7)
    ids[1] = torch.cat([torch.zeros(3, dtype=torch.int64), short[0]])
    mask = (ids > 0).long()
    try:
        alone, padded = _continued(plain, short, torch.ones_like(short)), _continued(plain, ids, mask)
    except Exception as error:
        yield f"the base itself can't continue padded prompts ({type(error).__name__})"
        return
    if not torch.allclose(alone[0], padded[1], atol=1e-3):
        yield "the base itself continues a padded prompt differently"
    with model.adapted(adapters):
        found = _continued(model.base, ids, mask)
    wanted = torch.stack([_continued(base, ids, mask)[row] for row, base in enumerate(merged)])
    _same(found, wanted, "prompts padded on the left are continued differently")


def _continued(base: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """The logits (rows, 4, vocabulary) of four more tokens."""
    output = base.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(output.logits, dim=1)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("families", nargs="*", help="model types; all if none is given")
    kinds = parser.parse_args(arguments).families or families()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    print("| family | what happens |\n|---|---|")
    for kind in kinds:
        print(f"| `{kind}` | {examine(kind)} |", flush=True)


if __name__ == "__main__":
    main()
