"""Everything that the library writes, once in an older and once in a newer form, for tests of what may go wrong."""

import json
from pathlib import Path

import pytest
import torch
from invented import make_tokenizer, random_text
from tiny import make_model, make_trained, random_context
from torch import nn

from gakernels.adapters.quantized_compact import QuantizedCompactAdapter
from gakernels.data import source_of, token_cache
from gakernels.distributed import Parallel
from gakernels.evaluation.answer_log import AnswerLog, Entry
from gakernels.files import write_text
from gakernels.model.released import save_released
from gakernels.server.context_store import ContextStore
from gakernels.training.checkpoint import RunState, checkpoint_writer
from gakernels.training.curves import RunSeries, Series, plot_runs
from gakernels.training.run_log import RunLog


class Writers:
    """Two models, and for each kind of file a function that writes it to a folder."""

    def __init__(self, texts: Path) -> None:
        self.texts = texts
        self.models = [make_model("llama", tokenizer=make_tokenizer()) for _ in range(2)]
        self.released = [make_trained(make_model("llama", sketch_side="output", damping=0.0)) for _ in range(2)]
        for number in range(2):
            (texts / f"{number}.txt").write_text(random_text(30_000))
        self.streams = [model.stream().append(random_context(20)) for model in self.models]

    def adapter(self, folder: Path, new: int) -> None:
        self.streams[new].adapter().save(folder / "adapter.safetensors")

    def generator(self, folder: Path, new: int) -> None:
        self.models[new].save_pretrained(folder / "generator")

    def state(self, folder: Path, new: int) -> None:
        self.streams[new].save(folder / "state.safetensors")

    def compact(self, folder: Path, new: int) -> None:
        self.streams[new].compact().save(folder / "compact.safetensors")

    def quantized(self, folder: Path, new: int) -> None:
        QuantizedCompactAdapter.quantize(self.streams[new].compact()).save(folder / "quantized.safetensors")

    def peft(self, folder: Path, new: int) -> None:
        self.streams[new].adapter().save_peft(folder / "peft")

    def gguf(self, folder: Path, new: int) -> None:
        pytest.importorskip("gguf")
        self.streams[new].adapter().save_gguf(folder / "adapter.gguf")

    def merged(self, folder: Path, new: int) -> None:
        self.models[new].save_merged(self.streams[new].adapter(), folder / "merged")

    def released_format(self, folder: Path, new: int) -> None:
        save_released(self.released[new], folder / "released")

    def checkpoint(self, folder: Path, new: int) -> None:
        parameters = {"weight": nn.Parameter(torch.randn(40, 40))}
        state = RunState(parameters, torch.optim.AdamW(parameters.values()))
        with checkpoint_writer(Parallel()) as writer:
            writer.save(folder / "checkpoints", 1 + new, state, {})

    def cache(self, folder: Path, new: int) -> None:
        token_cache(source_of(str(self.texts / f"{new}.txt")), make_tokenizer(), folder / f"cache{new}", progress=False)

    def log(self, folder: Path, new: int) -> None:
        folder.mkdir(exist_ok=True)
        RunLog(folder, 0 if not new else 1).write({"step": 1 + new, "loss": 0.5, "text": "x" * 9000})

    def answers(self, folder: Path, new: int) -> None:
        AnswerLog(folder / "report.json", {"seed": 1}).add(Entry("prompt", (((new, 0, -1), "y" * 9000),), {}))

    def report(self, folder: Path, new: int) -> None:
        write_text(folder / "report.json", json.dumps({"loss": [new] * 9000}))

    def plot(self, folder: Path, new: int) -> None:
        pytest.importorskip("matplotlib")
        plot_runs([RunSeries("run", {"loss/completion": Series((1, 2), (2.0, 1.0 - new))})], folder / "curves.png")

    def context(self, folder: Path, new: int) -> None:
        """The newer form is another append to the same context."""
        store = ContextStore(folder / "contexts", "base", "generator")
        try:
            context = next(iter(store.of("owner")), None) or store.create("owner")
            store.commit(context, {"layer": torch.randn(1, 48, 48)}, 7)
        finally:
            store.close()


KINDS = [name for name in vars(Writers) if not name.startswith("_")]


def write(writers: Writers, kind: str, folder: Path, new: bool) -> None:
    """Write the older or the newer form."""
    getattr(writers, kind)(folder, int(new))


def contents(folder: Path) -> dict[str, bytes]:
    """All files, but for locks. What a failed append left of a line does not count: it is cut off when it is read."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: path.read_bytes()[: path.read_bytes().rfind(b"\n") + 1] if name.endswith(".jsonl") else path.read_bytes()
        for name, path in found.items()
        if not name.endswith("lock")
    }
