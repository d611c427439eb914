"""The cards of generators and adapters on the Hugging Face hub, made from their files and from the run."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from gakernels.adapters.adapter import Adapter
from gakernels.model.config import GeneratorConfig

_USE = """```python
from gakernels import GenerativeAdapter

model = GenerativeAdapter.from_pretrained("{repository}")
adapter = model.adapt("A text.")
with model.adapted(adapter):
    print(model.generate("A question about it:"))
```"""
_USE_ADAPTER = """```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{repository}")
```"""
_READERS = {
    "none": "base model alone",
    "empty": "adapter of an empty context",
    "other": "adapter of another context",
    "own": "adapter of its own context",
    "static_lora": "static LoRA, same training",
}

_TASKS = ("reconstruction", "completion", "answers")


def generator_card(repository: str, description: Mapping[str, Any], numbers: int, folder: Path) -> str:
    """The card of a generator.

    Args:
        repository: `owner/name`.
        description: of its file.
        numbers: of its parameters.
        folder: of the run: `recipe.yaml` says how it was trained and `report.json` with what result, if they are there.
            Of local data only the names are told, not where they are.
    """
    config, base = GeneratorConfig.from_dict(description["config"]), description["base_name"]
    rows = {
        "adapts": f"{', '.join(f'`{name}`' for name in config.linears)} of {_layers(config)}",
        "size": f"{numbers:,} parameters; d_r {config.state_size}, r {config.rank}, static rank {config.static_rank}",
        "reads": f"chunks of up to {config.chunk_size:,} tokens",
        **_training(folder / "recipe.yaml"),
    }
    return "\n\n".join(
        [
            _header(base, "gakernels", "generative-adapter"),
            f"# {repository.partition('/')[2]}",
            f"Turns a text into a low-rank adapter of the frozen [{base}](https://huggingface.co/{base}), in one "
            "forward pass; the adapted model then answers about the text without seeing it.",
            _USE.format(repository=repository),
            _table(("", ""), rows.items()),
            *_results(folder / "report.json"),
        ]
    )


def adapter_card(repository: str, adapter: Adapter) -> str:
    """The card of an adapter that is also a PEFT folder."""
    base = adapter.base_name
    return "\n\n".join(
        [
            _header(base, "peft", "lora"),
            f"# {repository.partition('/')[2]}",
            f"A LoRA of [{base}](https://huggingface.co/{base}) that gakernels generated from a context of "
            f"{adapter.tokens_seen:,} tokens. Whoever can query the adapted model can learn what the context says.",
            _USE_ADAPTER.format(repository=repository),
            "`adapter.safetensors` is the same for `gakernels ask` and `gakernels.Adapter.load`.",
            f"Rank {adapter.rank}, {len(adapter.lora_a)} layers, {adapter.numbers():,} numbers.",
        ]
    )


def _header(base: str, library: str, tag: str) -> str:
    data = ModelCardData(base_model=base, library_name=library, tags=["gakernels", tag])
    return f"---\n{data.to_yaml()}\n---"


def _layers(config: GeneratorConfig) -> str:
    return "all layers" if config.layers is None else f"the layers {', '.join(map(str, config.layers))}"


def _training(path: Path) -> dict[str, str]:
    """The rows about the training that a recipe tells."""
    if not path.is_file():
        return {}
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    trainer, data = recipe["trainer"], recipe["data"]
    sources = data.get("sources") or {"": {"path": data["path"]}}
    duration = "epochs" if "epochs" in recipe else "steps"
    weights = dict(trainer.get("loss_weights") or {})
    rows = {
        "data": ", ".join(_named(name, source["path"]) for name, source in sources.items()),
        duration: recipe.get("epochs") or trainer["steps"],
        "learning rate": f"{trainer['learning_rate']}, {trainer['schedule']}",
        "loss weights": ", ".join(f"{factor} {name}" for name, factor in weights.items()),
    }
    return {name: str(value) for name, value in rows.items() if value}


def _named(name: str, path: str) -> str:
    """A source: the data set of the hub, or the name of a local one."""
    return path if path.startswith("hub:") else name or Path(path).name


def _results(path: Path) -> Iterator[str]:
    """The table of perplexities on held-out contexts."""
    if not path.is_file():
        return
    report = json.loads(path.read_text(encoding="utf-8"))
    tasks = {name: report[name]["perplexity"] for name in _TASKS if report.get(name)}
    rows = {
        words: " | ".join(f"{task[reader]:.2f}" if reader in task else "" for task in tasks.values())
        for reader, words in _READERS.items()
        if any(reader in task for task in tasks.values())
    }
    contexts = report["answers"]["contexts"] if "answers" in report else report["contexts"]
    yield f"Perplexity on {contexts} held-out contexts:"
    yield _table(("read with", *tasks), rows.items())


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines) + "\n"
