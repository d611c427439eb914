"""Every family of causal language models in transformers does what docs/model_families.md says of it."""

import re
from pathlib import Path

import pytest
import torch
import transformers

from gakernels import AdaptedLinear, GenerativeAdapter, GeneratorConfig, InputError
from gakernels.model import load_base
from studies import model_families
from studies.model_families import adaptable, examine
from studies.tiny_models import families, make_base

DOCS = Path(__file__).parents[2] / "docs" / "model_families.md"
# Always tried, one of a kind: Conv1D, a flattened batch, ALiBi, layers with a forward of their own, fused queries, keys
# and values, experts, compressed keys, recurrent layers, text and images, encoders, and the kinds that are refused.
ALWAYS = frozenset(
    {
        "bart",
        "bert",
        "bloom",
        "deepseek_v3",
        "falcon",
        "gemma3",
        "gpt2",
        "gpt_neox",
        "jamba",
        "llama4",
        "mamba",
        "mamba2",
    }
    | {"mistral3", "opt", "qwen2_5_vl", "qwen3_moe", "rwkv", "xlnet"}
)


def documented() -> dict[str, str]:
    return dict(re.findall(r"^\| `(\S+)` \| (.*) \|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE))


def same_version() -> bool:
    return f"transformers {transformers.__version__}," in DOCS.read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow) for name in families()]
)
def test_a_family_does_what_the_docs_say(family: str) -> None:
    found, expected = examine(family), documented().get(family, "works")
    if not same_version():  # remarks and reasons may be others
        if found.startswith("not tried"):
            pytest.skip(found)
        found, expected = (text.partition(";")[0].partition(":")[0] for text in (found, expected))
    assert found == expected


@pytest.mark.skipif(not same_version(), reason="the table is of another version of transformers")
def test_the_docs_name_every_family() -> None:
    assert sorted(documented()) == families()
    assert sum(outcome.startswith("works") for outcome in documented().values()) > 140
    assert not any(outcome.startswith(("wrong", "fails")) for outcome in documented().values())


@pytest.mark.filterwarnings("ignore")
def test_a_layer_that_ignores_its_adapter_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdaptedLinear, "adapted_product", lambda self, x, factors: self.base_product(x))
    assert examine("llama") == "wrong: an adapter changes nothing"
    monkeypatch.undo()
    monkeypatch.setattr(model_families, "_merged", lambda plain, adapter: plain)
    assert examine("llama").startswith("wrong: rows with adapters differ from a copy with W + Delta W")


def test_a_router_that_returns_several_tensors_is_refused() -> None:
    base = make_base("llama4_text")
    assert not [name for name in adaptable(base) if name.endswith("router")]
    model = GenerativeAdapter(base, GeneratorConfig(linears=("router",), state_size=8, rank=2, chunk_size=4))
    with pytest.raises(InputError, match=r"linears: Llama4Router can't be adapted, it returns more than one tensor"):
        model.adapt([3, 4, 5, 6, 7])


def test_models_with_an_encoder_are_refused() -> None:
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, vocab_size=32)
    base = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(InputError, match=r"decoder-only .*, but T5ForConditionalGeneration has an encoder too$"):
        GenerativeAdapter(base, GeneratorConfig(linears=("o",), state_size=8, rank=2, chunk_size=4))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "mistral3"])
def test_a_model_of_text_and_images_is_loaded_by_name(family: str, tmp_path: Path) -> None:
    original = make_base(family)
    original.save_pretrained(tmp_path / "base")
    base, _ = load_base(str(tmp_path / "base"))
    assert type(base) is type(original)
    linears = ("self_attn.o_proj",)
    model = GenerativeAdapter(base, GeneratorConfig(linears=linears, state_size=8, rank=2, chunk_size=4))
    assert all("language_model" in name for name in model.adapted_names)
    model.save_pretrained(tmp_path / "generator", base_name="../base")
    again = GenerativeAdapter.from_pretrained(tmp_path / "generator")
    ids = torch.randint(3, 64, (1, 6))
    assert torch.equal(again.decoder(input_ids=ids).last_hidden_state, model.decoder(input_ids=ids).last_hidden_state)
