"""Generators in the authors' layout: a synthetic checkpoint gives what a plain computation of it gives."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, logits_of, make_base, make_config, make_trained, random_context, random_ids
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from gakernels import FormatError, GenerativeAdapter, InputError
from gakernels.model.hub import PATTERNS
from gakernels.model.released import save_released

WIDTH, INNER, STATE, RANK, WINDOW, ALPHA = 32, 48, 12, 5, 16, 9
SHAPES = {"o_proj": (WIDTH, WIDTH), "down_proj": (INNER, WIDTH)}  # d_in, d_out
PLACES = {"o_proj": "self_attn.o_proj", "down_proj": "mlp.down_proj"}
CONFIG = {  # as the released code saves it
    "peft_type": "FASTLORA",
    "auto_mapping": None,
    "base_model_name_or_path": "base",
    "revision": None,
    "task_type": "CAUSAL_LM",
    "inference_mode": True,
    "fastlora_r": STATE,
    "fastlora_inter_size": STATE,
    "fastlora_window": WINDOW,
    "fastlora_max_rank": RANK,
    "fastlora_attn_len": 8192,
    "fastlora_gist_len": 0,
    "fastlora_alpha": ALPHA,
    "fastlora_dropout": 0.0,
    "fastlora_arch": "aassbb",
    "fastlora_norm": "svd",
    "fastlora_init": "random",
    "fastlora_merge": "pre-norm-sum",
    "fastlora_param": ["o_proj"],
    "fastlora_training_attention_mask": None,
    "target_modules": ["o_proj"],
    "lora_r": 0,
    "lora_alpha": 0,
    "lora_dropout": 0.0,
    "lora_param": None,
    "layer_replication": None,
    "megatron_config": None,
    "bias": "none",
}


def make_checkpoint(
    folder: Path, linears: Sequence[str] = ("o_proj",), layers: int = 3, **changes: Any
) -> dict[str, Tensor]:
    """A random checkpoint in the authors' layout; returns its tensors."""
    tensors = {}
    for layer in range(layers):
        for linear in linears:
            prefix = f"base_model.model.model.layers.{layer}.base_layer.{PLACES[linear]}.fastlora_"
            d_in, d_out = SHAPES[linear]
            tensors |= {
                f"{prefix}A1.weight": torch.randn(STATE, d_in) / math.sqrt(d_in),
                f"{prefix}A2.weight": torch.randn(STATE, WIDTH) / math.sqrt(WIDTH),
                f"{prefix}A3.weight": torch.randn(STATE, WIDTH) / math.sqrt(WIDTH),
                f"{prefix}B.weight": torch.randn(d_out, STATE),
                f"{prefix}hidden_state_norm.weight": 1 + 0.2 * torch.randn(WIDTH),
            }
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {**CONFIG, "fastlora_param": list(linears), "target_modules": list(linears), **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return tensors


class Plain:
    """The released code's inference, written down from its description: float64, one window at a time."""

    def __init__(self, base: PreTrainedModel, tensors: dict[str, Tensor], linears: Sequence[str], norm: str) -> None:
        self.base, self.linears, self.norm = base.double(), linears, norm
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}
        self.states: dict[tuple[int, str], Tensor] = {}
        self.sketches: dict[tuple[int, str], Tensor] = {}
        self.seed = int(torch.randint(2**31, ()))

    def part(self, layer: int, linear: str, part: str) -> Tensor:
        return self.tensors[f"base_model.model.model.layers.{layer}.base_layer.{PLACES[linear]}.fastlora_{part}.weight"]

    def normalised(self, layer: int, linear: str) -> Tensor:
        """U V^T of torch.svd_lowrank(M, q=rank, niter=1), whose sketch is drawn first, so that it can be repeated."""
        state = self.states[layer, linear]
        if self.norm == "frobenius":
            return state * torch.rsqrt(state.square().sum() + 1e-6)
        torch.manual_seed(self.seed + 1000 * layer + len(linear))
        self.sketches[layer, linear] = torch.randn(STATE, RANK, dtype=torch.float64)
        torch.manual_seed(self.seed + 1000 * layer + len(linear))
        u, _, v = torch.svd_lowrank(state, q=RANK, niter=1)
        return u @ v.mT

    def run(self, ids: Tensor, read: bool) -> Tensor:
        """Logits (1, M, vocabulary) with the adapters of the states; with `read` the window is added to the states."""
        inputs: dict[int, Tensor] = {}
        hooks = []
        for layer, module in enumerate(self.base.model.layers):
            hooks.append(
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, layer=layer: inputs.update(
                        {layer: args[0] if args else kwargs["hidden_states"]}
                    ),
                    with_kwargs=True,
                )
            )
            for linear in self.linears:
                if (layer, linear) in self.states:
                    adapter = self.part(layer, linear, "A1").mT @ self.normalised(layer, linear)
                    delta = ALPHA / STATE * (adapter @ self.part(layer, linear, "B").mT)  # (d_in, d_out)
                    hooks.append(
                        module.get_submodule(PLACES[linear]).register_forward_hook(
                            lambda _, args, y, delta=delta: y + args[0] @ delta
                        )
                    )
        logits = logits_of(self.base, ids)
        for hook in hooks:
            hook.remove()
        for layer in range(len(self.base.model.layers)) if read else ():
            for linear in self.linears:
                hidden = inputs[layer][0]
                hidden = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)
                hidden = hidden * self.part(layer, linear, "hidden_state_norm")
                keys, values = (hidden @ self.part(layer, linear, part).mT for part in ("A2", "A3"))
                self.states[layer, linear] = self.states.get((layer, linear), 0) + keys.mT @ values
        return logits


def even_windows(tokens: list[int]) -> list[list[int]]:
    count = math.ceil(len(tokens) / WINDOW)
    size = math.ceil(len(tokens) / count)
    return [tokens[start : start + size] for start in range(0, len(tokens), size)]


def set_sketches(model: GenerativeAdapter, plain: Plain) -> None:
    for (layer, linear), sketch in plain.sketches.items():
        model.generator(f"model.layers.{layer}.{PLACES[linear]}").sketch.copy_(sketch)


@pytest.mark.parametrize(
    ("linears", "norm", "length"),
    [
        (("o_proj",), "svd", 16),
        (("o_proj",), "svd", 47),
        (("o_proj", "down_proj"), "svd", 40),
        (("o_proj",), "frobenius", 40),
    ],
)
@pytest.mark.parametrize("damping", [0.0, None])
def test_logits_are_those_of_the_released_code(
    tmp_path: Path, linears: tuple[str, ...], norm: str, length: int, damping: float | None
) -> None:
    tensors = make_checkpoint(tmp_path, linears, fastlora_norm=norm)
    base = make_base("mistral", torch.float64)
    plain = Plain(make_base("mistral", torch.float64), tensors, linears, norm)
    plain.base.load_state_dict(base.state_dict())
    settings = {} if damping is None else {"damping": damping}
    model = GenerativeAdapter.from_pretrained(tmp_path, base, dtype=torch.float64, **settings)

    context, ids = random_context(length), random_ids(1, 10)
    for window in even_windows(context):
        plain.run(torch.tensor([window]), read=True)
    expected = plain.run(ids, read=False)  # also draws the sketches of all states
    set_sketches(model, plain)
    adapter = model.adapt([context])[0]
    with model.adapted(adapter):
        found = logits_of(model.base, ids)
    without = logits_of(model.base, ids)
    tolerance = (
        1e-8 if norm == "svd" and damping == 0 else 1e-5
    )  # the other epsilons: of the damping, and 1e-6 in a norm
    assert (found - expected).abs().max() < tolerance * expected.abs().max()
    assert (expected - without).abs().max() > 1e-2 * expected.abs().max()
    assert adapter.rank == (RANK if norm == "svd" else STATE)


def test_the_settings_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    model = GenerativeAdapter.from_pretrained(tmp_path, make_base("mistral"))
    assert (
        model.config.to_dict()
        == make_config(
            linears=("self_attn.o_proj",),
            state_size=STATE,
            rank=RANK,
            scale=ALPHA / STATE,
            chunk_size=WINDOW,
            damping=1e-6,
            sketch_side="output",
        ).to_dict()
    )
    make_checkpoint(tmp_path, layers=2)
    assert GenerativeAdapter.from_pretrained(tmp_path, make_base("mistral")).config.layers == (0, 1)


def test_a_context_of_few_tokens_has_a_finite_adapter(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    model = GenerativeAdapter.from_pretrained(tmp_path, make_base("mistral"))
    adapter = model.adapt([[1, 7]])[0]
    assert all(factor.isfinite().all() for factor in [*adapter.lora_a.values(), *adapter.lora_b.values()])
    norms = [float((adapter.delta(name)).norm()) for name in adapter.lora_a]
    assert min(norms) > 0


def test_a_bfloat16_checkpoint_is_read_exactly(tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in make_checkpoint(tmp_path).items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    generator = GenerativeAdapter.from_pretrained(tmp_path, make_base("mistral")).generator(
        "model.layers.1.self_attn.o_proj"
    )
    prefix = "base_model.model.model.layers.1.base_layer.self_attn.o_proj.fastlora_"
    assert torch.equal(generator.key_projection, tensors[f"{prefix}A2.weight"].mT.float())
    assert torch.equal(generator.input_map, tensors[f"{prefix}A1.weight"].float())


@pytest.mark.parametrize("linears", [("o_proj",), ("o_proj", "down_proj")])
def test_export_writes_the_layout_that_was_read(tmp_path: Path, linears: tuple[str, ...]) -> None:
    tensors = make_checkpoint(tmp_path / "there", linears)
    model = GenerativeAdapter.from_pretrained(tmp_path / "there", make_base("mistral"))
    save_released(model, tmp_path / "back", base_name="base")
    back = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    there, again = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("there", "back"))
    names = [PLACES[linear] for linear in sorted(linears)]
    for name in set(again) - {"fastlora_param", "target_modules"}:
        assert again[name] == there[name], name
    assert sorted(again["target_modules"]) == sorted(again["fastlora_param"]) == sorted(names)


def test_own_generators_are_exported_where_the_released_code_can_follow(tmp_path: Path) -> None:
    base = make_base("mistral")
    model = make_trained(GenerativeAdapter(base, make_config(sketch_side="output", damping=1e-6, scale=0.3)))
    context = random_context(30)
    expected = model.adapt([context])[0]
    sketches = {name: tensor.clone() for name, tensor in model.generator_tensors().items() if name.endswith("sketch")}
    save_released(model, tmp_path)
    model.detach()
    again = GenerativeAdapter.from_pretrained(tmp_path, base)
    again.load_generator_tensors({**again.generator_tensors(), **sketches}, "the model")
    found = again.adapt([context])[0]
    assert all(torch.allclose(found.delta(name), expected.delta(name), atol=1e-5) for name in expected.lora_a)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "sketch_side"),
        ({"sketch_side": "output", "power_iterations": 2}, "power_iterations=1"),
        ({"sketch_side": "output", "layers": (0, 2)}, "adapts all decoder layers"),
        ({"sketch_side": "output", "static_rank": 2}, "no static term"),
        ({"sketch_side": "output", "token_weights": True}, "no token_weights"),
        ({"sketch_side": "output", "delta_rule": True}, "no delta_rule"),
    ],
)
def test_what_the_released_code_can_not_compute_is_not_exported(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    model = GenerativeAdapter(make_base("mistral"), make_config(**settings))
    with pytest.raises(InputError, match=message):
        save_released(model, tmp_path / "out")
    other = GenerativeAdapter(make_base("gpt_neox"), make_config("gpt_neox", sketch_side="output"))
    with pytest.raises(InputError, match=r"named model\.layers, but this model has gpt_neox\.layers\.0"):
        save_released(other, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_from_pretrained_finds_the_base_and_the_tokenizer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    make_checkpoint(tmp_path / "released")
    base = make_base("mistral")
    base.save_pretrained(tmp_path / "released" / "base")  # beside the checkpoint, as its configuration says
    tokenizer.save_pretrained(tmp_path / "released")
    model = GenerativeAdapter.from_pretrained(tmp_path / "released")
    assert model.tokenizer is not None
    expected = GenerativeAdapter.from_pretrained(tmp_path / "released", base).adapt([[1, 5, 9, 5, 20, 30]])[0]
    found = model.adapt(["w5 w9 w5 w20 w30"])[0]
    assert all(torch.equal(found.lora_b[name], expected.lora_b[name]) for name in expected.lora_b)


def test_a_name_of_the_hub_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    make_checkpoint(tmp_path / "fetched")
    make_base("mistral").save_pretrained(tmp_path / "fetched" / "base")
    asked = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, tuple(allow_patterns)))
        return str(tmp_path / "fetched")

    monkeypatch.setattr("gakernels.model.hub.snapshot_download", snapshot)
    name = "generative-adaptor/Generative-Adapter-Mistral-7B-Instruct-v0.2"
    model = GenerativeAdapter.from_pretrained(name)
    assert asked == [(name, PATTERNS)]
    assert not any("bin" in pattern or "py" in pattern for pattern in PATTERNS)
    assert model.config.rank == RANK


def test_a_hub_that_can_not_be_reached_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(name: str, **_: Any) -> str:
        raise FileNotFoundError(f"no way to {name}\nand more lines")

    monkeypatch.setattr("gakernels.model.hub.snapshot_download", snapshot)
    with pytest.raises(InputError, match=r"no folder some/name, and the hub did not provide one: no way to some/name$"):
        GenerativeAdapter.from_pretrained("some/name")
    for name in ("/nowhere/at/all", "one", "../up/there", "a/b/c"):
        with pytest.raises(InputError, match=f"there is no folder {name}$"):
            GenerativeAdapter.from_pretrained(name)


def rename(tensors: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


BROKEN: list[tuple[dict[str, Any], Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = [
    ({"peft_type": "LORA"}, dict, "must be of a released generator"),
    ({"fastlora_norm": "softmax"}, dict, "norm 'softmax'; supported are svd, frobenius"),
    ({"fastlora_inter_size": 7}, dict, "fastlora_inter_size must be fastlora_r"),
    ({"fastlora_r": "12"}, dict, "its entry 'fastlora_r' must be of type int"),
    ({"fastlora_r": 0, "fastlora_inter_size": 0}, dict, "state_size must be at least 1"),
    ({"fastlora_max_rank": 13}, dict, "rank must be between 1 and state_size"),
    ({"fastlora_alpha": math.inf}, dict, "fastlora_alpha"),
    ({"fastlora_r": 10**9, "fastlora_inter_size": None}, dict, "does not fit its settings"),
    ({"lora_r": 8}, dict, "lora_r must be 0"),
    ({"base_model_name_or_path": None}, dict, "base_model_name_or_path"),
    (
        {},
        lambda tensors: rename(tensors, "layers.1.", "layers.7."),
        r"does not fit the base model: layers must be between",
    ),
    ({}, lambda tensors: rename(tensors, "o_proj", "x_proj"), r"does not fit the base model: linears: no linear layer"),
    ({}, lambda tensors: rename(tensors, "fastlora_A2", "fastlora_AQ"), "which is not part of a released generator"),
    ({}, lambda tensors: rename(tensors, "base_layer.", ""), "which is not part of a released generator"),
    ({}, lambda tensors: dict(list(tensors.items())[1:]), "must hold fastlora_hidden_state_norm, fastlora_A1"),
    ({}, lambda _: {}, "must hold fastlora_hidden_state_norm, fastlora_A1"),
    ({}, lambda tensors: {n: t[:, :-1] if "A3" in n else t for n, t in tensors.items()}, "does not fit this generator"),
    ({}, lambda tensors: {n: t[0] if "A2" in n else t for n, t in tensors.items()}, "does not fit this generator"),
]


@pytest.mark.parametrize(("changes", "change", "message"), BROKEN)
def test_a_checkpoint_that_is_wrong_is_refused_and_the_base_left_alone(
    tmp_path: Path, changes: dict[str, Any], change: Callable[..., dict[str, Tensor]], message: str
) -> None:
    tensors = make_checkpoint(tmp_path, **changes)
    changed = {name: tensor.contiguous() for name, tensor in change(tensors).items()}
    save_file(changed, tmp_path / "adapter_model.safetensors")
    base = make_base("mistral")
    kinds = [type(module) for module in base.modules()]
    with pytest.raises(FormatError, match=message):
        GenerativeAdapter.from_pretrained(tmp_path, base)
    assert [type(module) for module in base.modules()] == kinds
    GenerativeAdapter(base, make_config())


def test_pickles_are_refused_unread(tmp_path: Path) -> None:
    tensors = make_checkpoint(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    with pytest.raises(FormatError, match=r"in a pickle, which may run code.*only adapter_model\.safetensors"):
        GenerativeAdapter.from_pretrained(tmp_path, make_base("mistral"))
    (tmp_path / "adapter_model.bin").unlink()
    with pytest.raises(InputError, match=r"there is no file .*adapter_model\.safetensors"):
        GenerativeAdapter.from_pretrained(tmp_path, make_base("mistral"))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000, '{"fastlora_r": 1' + "0" * 5000 + "}"])
def test_a_configuration_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(FormatError, match=r"adapter_config\.json is damaged"):
        GenerativeAdapter.from_pretrained(tmp_path, make_base("mistral"))


def test_the_vocabulary_of_these_tests_is_that_of_the_base() -> None:
    assert make_base("mistral").get_input_embeddings().num_embeddings == VOCABULARY
