"""SmolLM2 answers with an exported adapter as in this library: in PEFT, and with the tensors of the GGUF file."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from gakernels.demo import smollm2

TEXT = "The Vasa is a Swedish warship that sank in 1628. It was raised from the sea floor in 1961."
PROMPTS = ["Question: When did the Vasa sink?\nAnswer:", "Question: What was raised in 1961?\nAnswer:"]
GGUF_NAMES = {"o_proj": "attn_output", "down_proj": "ffn_down"}


def greedy(base: torch.nn.Module, tokens: list[int], count: int) -> list[int]:
    """Of a plain model, which reads everything again for every token."""
    new: list[int] = []
    with torch.no_grad():
        for _ in range(count):
            logits = base(input_ids=torch.tensor([tokens + new]), use_cache=False).logits
            new.append(int(logits[0, -1].argmax()))
    return new


def test_exports_of_a_real_adapter(tmp_path: Path, real_model: Path) -> None:
    peft, gguf = pytest.importorskip("peft"), pytest.importorskip("gguf")
    model = smollm2.load()
    adapter = model.adapt(TEXT)
    adapter.save_peft(tmp_path / "peft")
    adapter.save_gguf(tmp_path / "adapter.gguf")
    with model.adapted(adapter):
        answers = model.generate(PROMPTS, max_new_tokens=6)

    base = AutoModelForCausalLM.from_pretrained(real_model.parent, gguf_file=real_model.name)
    other = peft.PeftModel.from_pretrained(base, str(tmp_path / "peft")).eval()
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        new = greedy(other, model.tokenizer(prompt)["input_ids"], 6)
        assert answer
        assert model.tokenizer.decode(new, skip_special_tokens=True).strip().startswith(answer)

    read = gguf.GGUFReader(tmp_path / "adapter.gguf").tensors
    tensors = {one.name: torch.tensor(gguf.quants.dequantize(one.data, one.tensor_type)) for one in read}
    for name in model.adapted_names:
        layer, short = name.split(".")[2], GGUF_NAMES[name.split(".")[-1]]
        a, b = (tensors.pop(f"blk.{layer}.{short}.weight.lora_{which}") for which in "ab")
        torch.testing.assert_close(b @ a, adapter.delta(name).float())
    assert not tensors
