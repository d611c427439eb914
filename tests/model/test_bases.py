"""Bases as people have them: each computes what the plain one does, or is refused in one line (docs/base_models.md)."""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import torch.distributed as dist
from tiny import SIZES, add_lora, logits_of, make_base, make_config, make_trained, random_context, random_ids
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from gakernels import Adapter, GenerativeAdapter, InputError
from gakernels.model import load_base

DOCS = Path(__file__).parents[2] / "docs" / "base_models.md"
WORKS = "the same numbers"


@contextmanager
def one_process(folder: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def compiled(base: PreTrainedModel) -> Any:
    return torch.compile(base, backend="aot_eager")


def compiled_in_place(base: PreTrainedModel) -> PreTrainedModel:
    base.compile(backend="aot_eager")
    return base


def with_compiled_layers(base: PreTrainedModel) -> PreTrainedModel:
    layers = base.model.layers
    for number in range(len(layers)):
        layers[number] = compiled(layers[number])
    return base


def recomputed(base: PreTrainedModel) -> PreTrainedModel:
    apply_activation_checkpointing(base, check_fn=lambda module: type(module).__name__.endswith("DecoderLayer"))
    return base


def with_gradient_checkpointing(base: PreTrainedModel) -> PreTrainedModel:
    base.gradient_checkpointing_enable()
    return base.train()


def hooked(base: PreTrainedModel) -> PreTrainedModel:
    def louder(_: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        return output

    base.model.layers[0].self_attn.o_proj.register_forward_hook(louder)
    base.model.layers[1].mlp.register_forward_hook(louder)
    return base


PLACES = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}


def dispatched(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    layers = {f"model.layers.{number}": place for number, place in enumerate(("disk", "cpu", "disk"))}
    return accelerate.dispatch_model(base, {**PLACES, **layers}, main_device="cpu", offload_dir=folder)


def on_several_devices(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """As `device_map="auto"` leaves a model on several GPUs: every module has a hook that moves its input."""
    layers = dict.fromkeys((f"model.layers.{number}" for number in range(3)), "cpu")
    return accelerate.dispatch_model(base, {**PLACES, **layers}, main_device="cpu", force_hooks=True)


def on_disk(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    return accelerate.disk_offload(base, folder, execution_device="cpu")


def loaded_to_disk(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    base.save_pretrained(folder / "base")
    layers = {f"model.layers.{number}": place for number, place in enumerate(("cpu", "disk", "disk"))}
    places = {**PLACES, **layers}
    return AutoModelForCausalLM.from_pretrained(folder / "base", device_map=places, offload_folder=folder / "weights")


def in_main_memory(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    return accelerate.cpu_offload(base, execution_device="cpu")


def with_lora(base: PreTrainedModel) -> PreTrainedModel:
    add_lora(base, peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    return base


def lora_model(base: PreTrainedModel) -> Any:
    return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["v_proj"]))


def merged_lora(base: PreTrainedModel) -> PreTrainedModel:
    return lora_model(base).merge_and_unload()  # a LoRA at its start changes nothing


def half(base: PreTrainedModel) -> PreTrainedModel:
    return base.half()


@dataclass(frozen=True)
class Case:
    what: str
    change: Callable[..., Any]
    refused: str = ""
    processes: bool = False  # needs a process group
    folder: bool = False  # needs a folder


CASES = [
    Case("`torch.compile(base)`", compiled),
    Case("`base.compile()`", compiled_in_place),
    Case("its layers compiled one by one", with_compiled_layers),
    Case("`DistributedDataParallel(base)`", DistributedDataParallel, processes=True),
    Case("`DataParallel(base)`", nn.DataParallel),
    Case("`accelerate.prepare(base)`", lambda base: accelerate.Accelerator(cpu=True).prepare(base)),
    Case("gradient checkpointing on", with_gradient_checkpointing),
    Case("layers in `CheckpointWrapper`", recomputed),
    Case("forward hooks on its modules", hooked),
    Case("`device_map` over several devices", on_several_devices, folder=True),
    Case("`device_map` with layers on disk", dispatched, folder=True),
    Case("`from_pretrained(device_map=..., offload_folder=...)`", loaded_to_disk, folder=True),
    Case("`accelerate.disk_offload(base)`", on_disk, folder=True),
    Case("`accelerate.cpu_offload(base)`", in_main_memory, folder=True),
    Case("a LoRA of PEFT, merged", merged_lora),
    Case("a LoRA of PEFT in its layers", with_lora, "base has an adapter of PEFT in it"),
    Case("a `PeftModel`", lora_model, "base has an adapter of PEFT in it"),
    Case("`fully_shard(base)`", fully_shard, "base is sharded", processes=True),
    Case(
        "`FullyShardedDataParallel(base)`",
        lambda base: FullyShardedDataParallel(base, device_id=torch.device("cpu"), use_orig_params=True),
        "base is sharded",
        processes=True,
    ),
    Case(
        "a module that is not a transformers model", lambda base: nn.Linear(3, 3), "base must be a transformers model"
    ),
]
NAMES = [case.what for case in CASES]


def change(case: Case, base: PreTrainedModel, folder: Path) -> Any:
    return case.change(base, folder) if case.folder else case.change(base)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
@pytest.mark.filterwarnings("ignore")
def test_a_base_computes_what_the_plain_one_does_or_is_refused(
    case: Case, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    base = make_base()
    other, config = copy.deepcopy(base), make_config()
    plain = make_trained(GenerativeAdapter(base, config))
    with one_process(tmp_path) if case.processes else nullcontext():
        changed = change(case, other, tmp_path)
        if case.refused:
            with pytest.raises(InputError, match=case.refused) as refused:
                GenerativeAdapter(changed, config)
            assert "\n" not in str(refused.value)
            return
        plain.save_pretrained(tmp_path / "generator")
        model = GenerativeAdapter.from_pretrained(tmp_path / "generator", changed)
        model.tokenizer = plain.tokenizer = tokenizer
        assert_same(model, plain)
    model.adapt(random_context(20)).save_peft(tmp_path / "peft")
    peft_model = peft.PeftModel.from_pretrained(copy.deepcopy(plain.base), tmp_path / "peft")
    assert sum("lora_A" in name for name, _ in peft_model.named_parameters()) == len(plain.adapted_names)


def assert_same(model: GenerativeAdapter, plain: GenerativeAdapter) -> None:
    """The same names, adapters, logits, texts and gradients."""
    context, ids = random_context(20), random_ids(2, 7)
    assert model.adapted_names == plain.adapted_names
    assert set(model.state_dict()) == set(plain.state_dict())
    mine, wanted = model.adapt(context), plain.adapt(context)
    assert mine.base_fingerprint == wanted.base_fingerprint
    assert mine.target_modules == wanted.target_modules
    for name in wanted.lora_b:
        torch.testing.assert_close(mine.lora_b[name], wanted.lora_b[name], rtol=1e-4, atol=1e-5)
    before = logits_of(plain.base, ids)
    torch.testing.assert_close(logits_of(model.base, ids), before, rtol=1e-4, atol=1e-5)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with plain.adapted(wanted):
        logits, tokens = logits_of(plain.base, ids), plain.base.generate(input_ids=ids, **settings)
        texts = plain.generate(["w3 w4 w5", "w6"])
    assert (logits - before).abs().max() > 1e-2
    with model.adapted(wanted):
        torch.testing.assert_close(logits_of(model.base, ids), logits, rtol=1e-4, atol=1e-5)
        assert torch.equal(model.base.generate(input_ids=ids, **settings), tokens)
        assert model.generate(["w3 w4 w5", "w6"]) == texts
    windows = random_ids(1, 4, 5)
    for ours, theirs in zip(gradients(model, windows), gradients(plain, windows), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def gradients(model: GenerativeAdapter, windows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    hidden, _ = model(windows, torch.ones_like(windows, dtype=torch.bool), 2, (0, 1, 1, 2))
    return torch.autograd.grad(hidden.square().mean(), list(model.generators.parameters()))


# In half precision


def test_a_base_in_float16_is_near_the_one_in_float32() -> None:
    base = make_base()
    other, config = copy.deepcopy(base).half(), make_config()
    plain, model = make_trained(GenerativeAdapter(base, config)), GenerativeAdapter(other, config)
    model.load_generator_tensors(plain.generator_tensors(), "the other")
    context, ids = random_context(20), random_ids(2, 7)
    wanted, found = plain.adapt(context), model.adapt(context)
    with plain.adapted(wanted):
        logits = logits_of(plain.base, ids)
    with model.adapted(found):
        assert logits_of(model.base, ids).dtype == torch.float16
        assert (logits_of(model.base, ids) - logits).abs().max() < 0.05 * logits.abs().max()


def test_a_base_with_a_soft_cap_is_loaded_with_an_attention_that_has_it(tmp_path: Path) -> None:
    base, ids = make_base("gemma2"), random_ids(2, 7)
    base.save_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(load_base(str(tmp_path))[0].eval(), ids), logits_of(base, ids))


# Merging into weights that are elsewhere


def test_an_adapter_is_merged_over_several_devices_and_refused_for_weights_on_disk(tmp_path: Path) -> None:
    for place, refused in ((on_several_devices, False), (on_disk, True)):
        base, config = make_base(), make_config()
        model = make_trained(GenerativeAdapter(place(base, tmp_path), config))
        adapter, ids = model.adapt(random_context(20)), random_ids(2, 7)
        with model.adapted(adapter):
            wanted = logits_of(model.base, ids)
        if refused:
            for use in (model.merge, lambda adapter, model=model: model.save_merged(adapter, tmp_path / "merged")):
                with pytest.raises(InputError, match="quantised or offloaded; merge it into the full base model"):
                    use(adapter)
        else:
            model.merge(adapter)
            torch.testing.assert_close(logits_of(model.base, ids), wanted, rtol=1e-4, atol=1e-4)


def test_weights_that_are_nowhere_are_refused() -> None:
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(make_base().config)
    with pytest.raises(InputError, match=r"base must have values for all of its parameters, but .* on the device meta"):
        GenerativeAdapter(base, make_config()).base_fingerprint()


# What is hooked into a layer stays there


def test_hooks_stay_with_a_layer_and_can_be_taken_off() -> None:
    base, ids, seen = make_base(), random_ids(1, 4), []
    handle = base.model.layers[0].self_attn.o_proj.register_forward_hook(lambda *_: seen.append("o_proj"))
    model = GenerativeAdapter(base, make_config())
    logits_of(model.base, ids)
    assert seen == ["o_proj"]
    base = model.detach()
    logits_of(base, ids)
    assert seen == ["o_proj"] * 2
    handle.remove()
    logits_of(base, ids)
    assert seen == ["o_proj"] * 2


# Another base than the one that a generator was trained for


@pytest.fixture
def saved(tmp_path: Path) -> tuple[GenerativeAdapter, Path]:
    model = make_trained(GenerativeAdapter(make_base(), make_config()))
    model.save_pretrained(tmp_path / "generator")
    return model, tmp_path / "generator"


def test_added_tokens_leave_the_generator_usable_with_a_warning(saved: tuple[GenerativeAdapter, Path]) -> None:
    plain, folder = saved
    base = copy.deepcopy(plain).detach()
    base.resize_token_embeddings(SIZES["vocab_size"] + 5)
    with pytest.warns(UserWarning, match="its decoder layers are the same, so adapters fit if only tokens were added"):
        model = GenerativeAdapter.from_pretrained(folder, base)
    context, ids = random_context(20), random_ids(2, 7)
    adapter, wanted = model.adapt(context), plain.adapt(context)
    assert adapter.base_fingerprint == wanted.base_fingerprint
    with model.adapted(wanted), plain.adapted(adapter):
        torch.testing.assert_close(logits_of(model.base, ids)[..., : SIZES["vocab_size"]], logits_of(plain.base, ids))
    assert model.adapt([[70 - 5, 66]])[0].tokens_seen == 2  # new tokens can be read


def test_another_base_is_refused_unless_it_is_allowed(saved: tuple[GenerativeAdapter, Path], tmp_path: Path) -> None:
    plain, folder = saved
    other = copy.deepcopy(plain).detach()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.1)
    with pytest.raises(InputError, match=r"was trained for .* allow_other_base \(--allow-other-base\) accepts it"):
        GenerativeAdapter.from_pretrained(folder, other)
    with pytest.warns(UserWarning, match="accepted anyway"):
        model = GenerativeAdapter.from_pretrained(folder, other, allow_other_base=True)
    stream = plain.stream().append(random_context(9))
    with model.adapted(stream.adapter()), model.adapted(stream.compact()):  # files of the generator's own base fit
        pass
    stream.save(tmp_path / "state")
    assert type(stream).load(model, tmp_path / "state").tokens_seen == 9
    with (
        pytest.raises(InputError, match="belongs to a base model with fingerprint"),
        plain.adapted(
            model.adapt(random_context(9))  # what it makes says which base it comes from
        ),
    ):
        pass


def test_a_generator_of_an_earlier_version_has_no_fingerprint_of_the_layers(
    saved: tuple[GenerativeAdapter, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, folder = saved
    monkeypatch.setattr(GenerativeAdapter, "base_layers_fingerprint", lambda self: "")
    plain.save_pretrained(folder)
    base = copy.deepcopy(plain).detach()
    assert GenerativeAdapter.from_pretrained(folder, copy.deepcopy(base)).adapted_names
    base.resize_token_embeddings(SIZES["vocab_size"] + 5)
    with pytest.raises(InputError, match="allow_other_base"):
        GenerativeAdapter.from_pretrained(folder, base)


def test_a_folder_of_a_lora_is_refused_as_a_base(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, saved: tuple[GenerativeAdapter, Path]
) -> None:
    plain, folder = saved
    base = copy.deepcopy(plain).detach()
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    lora = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), peft.LoraConfig(r=2, target_modules=["q_proj"])
    )
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(InputError, match=r"lora' is a PEFT adapter \(adapter_config.json\).*; merge it first"):
        GenerativeAdapter.from_pretrained(folder, tmp_path / "lora")
    lora.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "merged")
    model = GenerativeAdapter.from_pretrained(folder, tmp_path / "merged")
    assert model.adapt("w3 w4").base_name == str(tmp_path / "merged")


# The table


OTHERS = [  # each has a test of its own above
    ("in float16", "works, near the numbers in float32"),
    ("resized for added tokens", "works, with a warning"),
    ("another base than the one the generator was trained for", "refused, unless `allow_other_base` is given"),
    ("the folder of a LoRA, as a name", "refused: is a PEFT adapter"),
    ("with weights on the device meta", "refused: base must have values for all of its parameters"),
]


def table() -> str:
    rows = OTHERS + [(case.what, f"refused: {case.refused}" if case.refused else WORKS) for case in CASES]
    return "\n".join(["| base | what happens |", "|---|---|", *(f"| {what} | {outcome} |" for what, outcome in rows)])


def test_the_table_in_the_docs_is_what_was_tried() -> None:
    assert table() in DOCS.read_text(encoding="utf-8")


def test_the_message_of_an_adapter_that_is_a_path_says_what_to_do(saved: tuple[GenerativeAdapter, Path]) -> None:
    model, folder = saved
    model.adapt(random_context(9)).save(folder / "a.safetensors")
    for wrong in (str(folder / "a.safetensors"), folder / "a.safetensors"):
        with pytest.raises(InputError, match=re.escape("load it: Adapter.load(")), model.adapted(wrong):
            pass
    with pytest.raises(InputError, match="adapters must be Adapter objects"), model.adapted([3]):
        pass
    with model.adapted(Adapter.load(folder / "a.safetensors")):
        pass
