"""--allow-other-base, and bases that are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from gakernels import GenerativeAdapter


@pytest.fixture
def other_base(files: Any, tmp_path: Path) -> Path:
    """A base model whose layers are not those that the generator was trained for."""
    model = GenerativeAdapter.from_pretrained(files.generator)
    base = model.detach()
    with torch.no_grad():
        next(base.model.layers[0].parameters()).mul_(1.5)
    base.save_pretrained(tmp_path / "other")
    model.tokenizer.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def test_another_base_is_taken_only_with_the_option(
    run: Callable[..., Any], refused: Callable[..., str], files: Any, document: Path, adapter: Path, other_base: Path
) -> None:
    model = ["--generator", files.generator, "--model", other_base]
    assert "--allow-other-base" in refused("ask", *model, "--no-adapter", "w3")
    for source in (["--no-adapter"], ["--adapter", adapter], ["--document", document]):
        with pytest.warns(UserWarning, match="accepted anyway"):
            assert run("ask", *model, "--allow-other-base", *source, "w3").code == 0
    merged = other_base.parent / "merged"
    export = ["export", "--adapter", adapter, "--format", "merged", "--output", merged, *model]
    assert "--allow-other-base" in refused(*export)
    with pytest.warns(UserWarning, match="accepted anyway"):
        assert run(*export, "--allow-other-base").code == 0
    assert AutoModelForCausalLM.from_pretrained(merged) is not None


def test_the_folder_of_a_lora_is_refused(refused: Callable[..., str], files: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = GenerativeAdapter.from_pretrained(files.generator)
    name, tokenizer = base.base.config.name_or_path, base.tokenizer
    lora = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(name), peft.LoraConfig(r=2, target_modules=["q_proj"])
    )
    lora.save_pretrained(tmp_path / "lora")
    tokenizer.save_pretrained(tmp_path / "lora")
    line = refused("ask", "--generator", files.generator, "--model", tmp_path / "lora", "--no-adapter", "w3")
    assert "is a PEFT adapter (adapter_config.json)" in line


def test_a_prompt_beyond_the_positions_is_refused(refused: Callable[..., str], files: Any) -> None:
    limit = GenerativeAdapter.from_pretrained(files.generator).base.config.max_position_embeddings
    line = refused("ask", *files.model, "--no-adapter", "w3 " * (limit + 5))
    assert f"the model reads {limit} tokens, but the prompt has" in line
