"""`gakernels finetune`."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from invented import random_text
from tiny import VOCABULARY
from transformers import AutoTokenizer

from gakernels import GenerativeAdapter
from gakernels.training.instruction.recipe import FinetuningRecipe
from gakernels.training.recipes import load_recipe


def write_rows(path: Path, count: int) -> Path:
    rows = [
        {
            "context": random_text(40),
            # Never the same question twice: equal ones would count once.
            "qas": [
                {"question": f"w{n} {random_text(2).strip()}", "answers": [random_text(2).strip()]} for n in (3, 4, 5)
            ],
        }
        for _ in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "questions.jsonl", 14)


@pytest.fixture
def options(files: Any, data: Path, tmp_path: Path) -> list[Any]:
    """A run of a moment."""
    values = {
        "generator": files.generator,
        "data": data,
        "output": tmp_path / "out",
        "batch-size": 4,
        "held-out": 4,
        "warmup-steps": 1,
        "learning-rate": 0.01,
        "steps": 4,
        "log-every": 1,
        "checkpoint-every": 2,
    }
    return [part for name, value in values.items() for part in (f"--{name}", value)]


def test_it_tunes_reports_and_writes_a_generator_that_adapt_uses(
    run: Callable[..., Any], options: list[Any], files: Any, document: Path, tmp_path: Path
) -> None:
    outcome = run("finetune", *options, "--losses", "answers,reconstruction")
    assert outcome.code == 0, outcome.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())["answers"]
    for name, label in (
        ("none", "base model, no adapter"),
        ("other", "adapter of another context"),
        ("own", "adapter of its own context"),
    ):
        row = next(line for line in outcome.out.splitlines() if label in line)
        assert f"{report['perplexity'][name]:.3f}" in row
        assert f"{report['exact'][name]:.1%}" in row
    assert "Held-out answers: 12 about 4 contexts" in outcome.out
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert set(lines[0]["loss"]) == {"answers", "reconstruction"}
    before = GenerativeAdapter.from_pretrained(files.generator).generator_tensors()
    after = GenerativeAdapter.from_pretrained(tmp_path / "out").generator_tensors()
    assert any(not after[name].equal(before[name]) for name in before)
    adapted = run(
        "adapt", "--generator", tmp_path / "out", "--document", document, "--output", tmp_path / "a.safetensors"
    )
    assert adapted.code == 0


def test_options_and_settings_make_up_the_recipe_that_is_written(
    run: Callable[..., Any], options: list[Any], data: Path, files: Any, tmp_path: Path
) -> None:
    config = tmp_path / "my.yaml"
    config.write_text("batches:\n  conversations: 2\ntrainer:\n  clip: 0.5\n  steps: 9\nepochs: 0.25\n")
    outcome = run(
        "finetune", *options, "--config", config, "--set", "trainer.clip=0.7", "--seed", 3, "--epochs", 0.3, "--strict"
    )
    assert outcome.code == 0, outcome.err
    recipe = load_recipe(FinetuningRecipe, tmp_path / "out" / "recipe.yaml")
    assert (recipe.batches.conversations, recipe.batches.batch_size) == (2, 4)
    assert (recipe.trainer.clip, recipe.trainer.steps, recipe.epochs) == (0.7, 4, 0.3)
    assert (recipe.seed, recipe.trainer.seed, recipe.data.strict) == (3, 3, True)
    assert (recipe.data.path, recipe.start) == (str(data), str(files.generator))
    lines = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    assert len(lines) == 1  # 0.3 rounds of 10 contexts


def test_untrained_generators_can_be_tuned(
    run: Callable[..., Any], options: list[Any], files: Any, tmp_path: Path
) -> None:
    scratch = ["--model", files.base, *options[2:]]
    settings = ["generator.state_size=8", "generator.rank=4", "generator.chunk_size=8", "batches.window=40"]
    outcome = run("finetune", *scratch, *[part for setting in settings for part in ("--set", setting)])
    assert outcome.code == 0, outcome.err
    assert GenerativeAdapter.from_pretrained(tmp_path / "out").config.state_size == 8


def test_started_again_it_goes_on(run: Callable[..., Any], options: list[Any], tmp_path: Path) -> None:
    assert run("finetune", *options).code == 0
    log = (tmp_path / "out" / "log.jsonl").read_text()
    assert run("finetune", *options).code == 0
    assert (tmp_path / "out" / "log.jsonl").read_text() == log


def test_the_plan_tells_data_steps_and_padding(
    run: Callable[..., Any], options: list[Any], data: Path, files: Any, tmp_path: Path
) -> None:
    with data.open("a") as file:
        file.write('{"text": "no question"}\n')
    outcome = run("finetune", *options, "--dry-run", "--tflops", 100)
    assert outcome.code == 0, outcome.err
    assert not (tmp_path / "out").exists()

    def row(label: str) -> str:
        return next(line for line in outcome.out.splitlines() if label in line)

    model = GenerativeAdapter.from_pretrained(files.generator)
    assert f"{model.base.num_parameters():,}" in row("parameters of the base")
    assert f"{sum(p.numel() for p in model.generators.parameters()):,}" in row("parameters of the generators")
    assert "10, with 30 conversations" in row("contexts to train on")
    assert "1 x record of an unknown form" in row("records left out")
    assert "4 of 4 contexts: 1.60 rounds" in row("steps")
    assert "%" in row("tokens in a step")
    assert "seconds" in row("time at 100 TFLOP/s")
    assert "GB" in row("kept by the generators")
    assert "yes" in row("fits a GPU of 24 GB")


def stopped(outcome: Any) -> str:
    """The last line of a run that found its data wanting; the bar of tokenising stands in front."""
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    return str(outcome.err.splitlines()[-1])


def test_a_run_stops_where_too_much_of_its_data_can_not_be_used(
    run: Callable[..., Any], refused: Callable[..., str], options: list[Any], data: Path, tmp_path: Path
) -> None:
    with data.open("a") as file:
        file.write('{"context": "w5", "conversations": [{"from": "tool", "value": "w7"}]}\n')
    message = stopped(run("finetune", *options))
    assert f"data: 6.7% of the rows of {data} can't be used: 1 x message whose role is not system" in message
    assert "--allow-skipped" in message
    assert not (tmp_path / "out").exists()
    plan = run("finetune", *options, "--dry-run")
    assert plan.code == 0
    assert "A run stops: 6.7% of the rows" in plan.out
    allowed = run("finetune", *options, "--allow-skipped")
    assert allowed.code == 0, allowed.err
    assert "left out: 1 x message whose role is not system" in allowed.err
    assert load_recipe(FinetuningRecipe, tmp_path / "out" / "recipe.yaml").data.allow_skipped
    assert "must not both be true" in refused("finetune", *options, "--allow-skipped", "--strict")


def test_few_rows_that_can_not_be_used_do_not_stop_a_run(
    run: Callable[..., Any], options: list[Any], data: Path
) -> None:
    write_rows(data, 25)
    with data.open("a") as file:
        file.write('{"context": "w5"}\n')
    outcome = run("finetune", *options)
    assert outcome.code == 0, outcome.err
    assert "left out: 1 x record of an unknown form" in outcome.err


def test_limits_and_broken_files_stop_a_run_too(run: Callable[..., Any], options: list[Any], data: Path) -> None:
    with data.open("a") as file:
        file.write(
            json.dumps({"context": "w9 " * 60, "qas": [{"question": f"w{n}", "answer": 7} for n in range(3, 7)]})
        )
    message = stopped(run("finetune", *options, "--context-tokens", 50))
    assert f"data: 8.7% of the rows of {data} can't be used: 1 x context of more than 50 tokens" in message
    assert run("finetune", *options).code == 0
    folder = data.with_name("folder")
    folder.mkdir()
    data.rename(folder / "a.jsonl")
    (folder / "b.json").write_text("[")
    options[options.index(data)] = folder
    assert f"data: {folder} can't be read to its end: 1 x file that is not JSON" in stopped(run("finetune", *options))


@pytest.mark.parametrize("name", ["mistral-7b-finetuning", "llama2-7b-finetuning", "cpu-small-finetuning"])
def test_the_recipes_of_the_package_are_read(name: str) -> None:
    recipe = load_recipe(FinetuningRecipe, Path(name))
    assert recipe.epochs == 2
    if name.endswith("7b-finetuning"):
        assert (recipe.batches.batch_size, recipe.trainer.learning_rate) == (32, 5e-5)
        assert (recipe.trainer.weight_decay, recipe.trainer.warmup_steps) == (0.01, 100)
        assert recipe.steps(38520) == 2408  # the documents of the paper's table 3


def test_mistakes_are_told_in_one_line(
    refused: Callable[..., str], options: list[Any], data: Path, files: Any, tmp_path: Path
) -> None:
    assert "data must have either a path or sources" in refused("finetune", "--generator", files.generator)
    assert "--output is needed" in refused("finetune", "--generator", files.generator, "--data", data)
    assert "model.name is needed" in refused("finetune", *options[2:])
    assert "batches.batchsize is not a setting; did you mean batches.batch_size?" in refused(
        "finetune", *options, "--set", "batches.batchsize=3"
    )
    assert "batch_size must be at least 1" in refused("finetune", *options, "--batch-size", 0)
    assert "learning_rate must be above 0" in refused("finetune", *options, "--learning-rate", -1)
    assert "epochs must be finite and above 0" in refused("finetune", *options, "--epochs", 0)
    assert "losses must be answers and others" in refused("finetune", *options, "--losses", "completion")
    assert "there is no file or folder" in refused("finetune", *options, "--data", tmp_path / "none.jsonl")
    assert "generator must not be given with start" in refused("finetune", *options, "--set", "generator.rank=4")
    data.write_text('{"text": "x"}\n')
    assert "has no usable record: 1 x record of an unknown form" in refused("finetune", *options)
    assert "line 1 of" in refused("finetune", *options, "--strict")
    assert "is a file" in refused("finetune", *options, "--output", data)


def test_a_token_that_the_model_does_not_know_is_refused_where_it_is_used(
    run: Callable[..., Any], options: list[Any], files: Any, data: Path, tmp_path: Path
) -> None:
    other = tmp_path / "base"
    shutil.copytree(files.base, other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(other)
    first, *rows = data.read_text().splitlines()
    data.write_text("\n".join([json.dumps({**json.loads(first), "context": "w5 more"}), *rows]))
    outcome = run("finetune", *options, "--model", other)
    assert outcome.code == 2
    assert f"has the token 'more' ({VOCABULARY}), but the base model's embedding has {VOCABULARY} rows" in outcome.err


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["replicas", "shards"])
def test_two_processes_do_what_one_does(
    run: Callable[..., Any], options: list[Any], tmp_path: Path, parallel: str
) -> None:
    options = [*options, "--losses", "answers,completion", "--learning-rate", 1e-3, "--set", f"parallel={parallel}"]
    assert run("finetune", *options).code == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "gakernels", "finetune", *map(str, options), "--output", str(tmp_path / "two")]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = (losses_of(tmp_path / name / "log.jsonl") for name in ("out", "two"))
    assert len(one) == 4
    for expected, found in zip(one, two, strict=True):
        assert found == pytest.approx(expected, rel=5e-6)
    ours, theirs = (GenerativeAdapter.from_pretrained(tmp_path / name).generator_tensors() for name in ("out", "two"))
    for name, tensor in ours.items():
        assert (theirs[name] - tensor).norm() <= 1e-3 * tensor.norm()
    assert run("finetune", *options, "--output", tmp_path / "two").code == 0  # resumed by one process


def losses_of(log: Path) -> list[dict[str, float]]:
    return [json.loads(line)["loss"] for line in log.read_text().splitlines()]
