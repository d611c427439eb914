"""An adapter goes to other programs: a PEFT folder (peft, vLLM, LoRAX), and a GGUF file (llama.cpp).

    python examples/export_an_adapter.py FOLDER

The GGUF file needs the package gguf, and loading the PEFT folder back, as a check, the package peft.
"""

import sys
import tempfile
from importlib.resources import files
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from gakernels import GenerativeAdapter

GENERATOR = Path(str(files("gakernels.demo") / "assets" / "generator"))
TEXT = "The dessert that Nada Oskar bakes is honey tart. The hat that Nada Oskar wears is felt beret."


def main(folder: Path) -> float:
    """Write both; returns how far the logits of the PEFT model are from ours."""
    model = GenerativeAdapter.from_pretrained(GENERATOR)
    adapter = model.stream().append(TEXT).adapter()
    adapter.save_peft(folder / "peft")
    adapter.save_gguf(folder / "adapter.gguf")
    ids = torch.tensor([model.tokenizer("Question: What is the hat of Nada Oskar? Answer:")["input_ids"]])
    plain = AutoModelForCausalLM.from_pretrained(GENERATOR.parent / "base")
    with torch.no_grad(), model.adapted(adapter):
        ours, theirs = model.base(ids).logits, PeftModel.from_pretrained(plain, str(folder / "peft"))(ids).logits
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"{path.relative_to(folder)}: {path.stat().st_size:,} bytes")
    return float((ours - theirs).abs().max())


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
