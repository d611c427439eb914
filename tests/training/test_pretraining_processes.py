"""A recipe on two processes, with replicas and with shards, against the same on one; started by torchrun once."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pretraining_processes
import pytest
import torch
from invented import make_tokenizer, random_text
from regression import log_of
from tiny import make_base

from gakernels import GenerativeAdapter
from gakernels.training.pretraining import make_model, pretrain
from gakernels.training.pretraining_recipe import PretrainingRecipe
from gakernels.training.recipes import load_recipe

RECIPE = """
model: {{name: {folder}/base}}
data: {{path: {folder}/text.txt, cache: {folder}/cache}}
generator: {{linears: [o_proj, down_proj], state_size: 16, rank: 4, scale: 0.5, chunk_size: 8, static_rank: 2}}
windows: {{chunks: 2, batch_size: 4, plain: true}}
trainer: {{steps: 4, learning_rate: 1e-2, warmup_steps: 1, log_every: 1, evaluate_every: 2}}
evaluation: {{contexts: 3, contexts_at_intervals: 2, static_lora: true}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one process, and the same on two."""
    torch.manual_seed(int(os.environ.get("GAKERNELS_TEST_SEED") or torch.seed()) % 2**32)
    folder = tmp_path_factory.mktemp("runs")
    make_base().save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    (folder / "text.txt").write_text(random_text(600))
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    recipe = load_recipe(PretrainingRecipe, folder / "recipe.yaml")
    pretrain(make_model(recipe, "cpu"), recipe, folder / "one", progress=False)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*torchrun, pretraining_processes.__file__, str(folder)], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", ["replicas", "shards"])
def test_two_processes_train_what_one_does(folder: Path, name: str) -> None:
    for part in ("", "static_lora"):
        one, two = log_of(folder / "one" / part), log_of(folder / name / part)
        assert [line["step"] for line in two] == [1, 2, 3, 4]
        for ours, expected in zip(two, one, strict=True):
            assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert sorted(path.name for path in (folder / name).iterdir()) == sorted(
        path.name for path in (folder / "one").iterdir()
    )


def perplexities(report: dict[str, Any]) -> dict[str, float]:
    return {f"{task} {name}": value for task in ("reconstruction", "completion") for name, value in of(report, task)}


def of(report: dict[str, Any], task: str) -> Any:
    return report[task]["perplexity"].items()


@pytest.mark.parametrize("name", ["replicas", "shards"])
def test_each_process_has_the_report_and_one_generator_is_written(folder: Path, name: str) -> None:
    expected = json.loads((folder / "one" / "report.json").read_text())
    for rank in range(2):
        found = json.loads((folder / f"{name}-{rank}.json").read_text())
        assert found["sharded"] == (name == "shards")
        assert perplexities(found["report"]) == pytest.approx(perplexities(expected), rel=1e-3)
    one, two = (GenerativeAdapter.from_pretrained(folder / place) for place in ("one", name))
    expected_tensors = one.generator_tensors()
    for key, tensor in two.generator_tensors().items():
        # Not number by number: AdamW moves one whose gradient is all but zero by the sign of the rounding.
        assert (tensor - expected_tensors[key]).norm() <= 1e-2 * expected_tensors[key].norm()
