"""`gakernels pretrain`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from invented import random_text
from transformers import AutoModelForCausalLM

from gakernels import Adapter, GenerativeAdapter
from gakernels.training.pretraining_recipe import PretrainingRecipe
from gakernels.training.recipes import load_recipe


@pytest.fixture(autouse=True)
def token_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    for number in range(2):
        (tmp_path / "texts" / f"{number}.txt").write_text(random_text(150))
    return tmp_path / "texts"


@pytest.fixture
def options(files: Any, data: Path, tmp_path: Path) -> list[Any]:
    """A run of a moment."""
    values = {
        "model": files.base,
        "data": data,
        "output": tmp_path / "out",
        "state-size": 8,
        "rank": 4,
        "chunk-size": 8,
        "chunks": 2,
        "batch-size": 2,
        "held-out": 3,
        "warmup-steps": 1,
        "learning-rate": 0.01,
        "steps": 4,
        "log-every": 1,
        "checkpoint-every": 2,
    }
    return [part for name, value in values.items() for part in (f"--{name}", value)]


def tensors_of(folder: Path) -> dict[str, Any]:
    return GenerativeAdapter.from_pretrained(folder).generator_tensors()


def test_it_trains_reports_and_writes_a_generator_that_adapt_uses(
    run: Callable[..., Any], options: list[Any], document: Path, tmp_path: Path
) -> None:
    outcome = run("pretrain", *options, "--static-lora", "--linears", "o_proj, down_proj", "--layers", "0,2")
    assert outcome.code == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    parts = outcome.out.split("Completion: what follows them")
    for task, part in zip(("reconstruction", "completion"), parts, strict=True):
        for name, label in (
            ("none", "base model, no adapter"),
            ("static_lora", "static LoRA, trained as long"),
            ("other", "adapter of another context"),
            ("own", "adapter of its own context"),
        ):
            row = next(line for line in part.splitlines() if label in line)
            assert f"{report[task]['perplexity'][name]:.3f}" in row
            assert name == "own" or f"{report[task]['own_over'][name]['high']:.3f})" in row
    assert "3 held-out contexts of 16 tokens" in outcome.out
    assert "Traceback" not in outcome.err
    adapter = tmp_path / "a.safetensors"
    assert run("adapt", "--generator", tmp_path / "out", "--document", document, "--output", adapter).code == 0
    parts = [f"model.layers.{i}.{name}" for i in (0, 2) for name in ("self_attn.o_proj", "mlp.down_proj")]
    assert sorted(Adapter.load(adapter).lora_a) == sorted(parts)


def test_started_again_it_goes_on_where_it_stopped(
    run: Callable[..., Any], options: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gakernels.training import pretraining

    with monkeypatch.context() as patch:
        plain, calls = pretraining.window_losses, iter(range(3))

        def failing(*arguments: Any) -> Any:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return plain(*arguments)

        patch.setattr(pretraining, "window_losses", failing)
        outcome = run("pretrain", *options)
    assert outcome.code == 130
    assert not (tmp_path / "out" / "report.json").exists()
    assert run("pretrain", *options).code == 0
    report = (tmp_path / "out" / "report.json").read_text()
    tensors = tensors_of(tmp_path / "out")
    whole = [tmp_path / "whole" if value == tmp_path / "out" else value for value in options]
    assert run("pretrain", *whole).code == 0
    assert (tmp_path / "whole" / "report.json").read_text() == report
    assert all(value.equal(tensors[name]) for name, value in tensors_of(tmp_path / "whole").items())


def test_a_run_with_other_options_is_not_gone_on_with(run: Callable[..., Any], options: list[Any]) -> None:
    assert run("pretrain", *options).code == 0
    outcome = run("pretrain", *options, "--learning-rate", 0.5)
    assert outcome.code == 2
    last = outcome.err.splitlines()[-1]
    assert "belongs to a run with other settings: trainer.learning_rate was 0.01 and is 0.5" in last


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--steps", 0], "steps must be at least 1, but it is 0"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--learning-rate", -1], "learning_rate must be above 0 and at most 1, but it is -1.0"),
        (["--learning-rate", "inf"], "learning_rate must be above 0 and at most 1, but it is inf"),
        (["--warmup-steps", -1], "warmup_steps must be at least 0, but it is -1"),
        (["--weight-decay", -1], "weight_decay must be finite and at least 0, but it is -1.0"),
        (["--weight-decay", "nan"], "weight_decay must be finite and at least 0, but it is nan"),
        (["--batch-size", 0], "batch_size must be at least 1, but it is 0"),
        (["--held-out", 1], "evaluation.contexts must be at least 2, but it is 1"),
        (["--chunk-size", 0], "chunk_size must be at least 1, but it is 0"),
        (["--chunk-size", 1], "chunk_size must be at least 2 to train on next tokens, but it is 1"),
        (["--chunks", 0], "chunks must be at least 1, but it is 0"),
        (["--log-every", 0], "log_every must be at least 1, but it is 0"),
        (["--checkpoint-every", 0], "checkpoint_every must be at least 1, but it is 0"),
        (["--seed", -1], "seed must be between 0 and 4294967295, but it is -1"),
        (["--rank", 9], "rank must be between 1 and state_size (8), but it is 9"),
        (["--state-size", 0], "state_size must be at least 1, but it is 0"),
        (["--scale", "nan"], "scale must be finite, but it is nan"),
        (["--norm", "svd"], "argument --norm: invalid choice: 'svd'"),
        (["--reconstruction", "all"], "argument --reconstruction: invalid choice: 'all'"),
        (["--linears", "o_proj,nothing"], "linears: no linear layer is named 'nothing'; there are"),
        (["--linears", ""], "linears: no linear layer is named ''"),
        (["--layers", "0,one"], "generator.layers[1] must be an integer, but it is 'one'"),
        (["--layers", "0,3"], "layers must be between 0 and 2, but contains 3"),
        (["--layers", "1,1"], "layers must be different numbers"),
        (["--device", "nonsense"], "--device must be a device of this machine, but 'nonsense' is not: "),
        (["--device", "meta"], "--device must be a device of this machine, but 'meta' is not: "),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--held-out", 1000], "of which 32000 are held out (1000 contexts of 16"),
        (["--set", "trainer.stepps=3"], "trainer.stepps is not a setting; did you mean trainer.steps?"),
        (["--set", "trainer.clip=big"], "trainer.clip must be a number, but it is 'big'"),
        (["--set", "trainer.clip"], "must be of the form section.name=value, but it is 'trainer.clip'"),
        (["--set", "windows.segments_at_once=3"], "segments_at_once must divide the 2 segments"),
        (["--config", "nothing.yaml"], "config: there is no file nothing.yaml, nor a recipe of that name"),
    ],
)
def test_a_mistake_in_an_option_is_told_in_one_line(
    run: Callable[..., Any], options: list[Any], tmp_path: Path, changes: list[Any], message: str
) -> None:
    outcome = run("pretrain", *options, *changes)
    lines = [line for line in outcome.err.split("\n") if line and "tokenising" not in line]
    assert outcome.code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert lines[0].startswith("gakernels pretrain: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nothing.txt", None, "there is no file or folder"),
        ("empty.txt", b"", "empty.txt holds no text that can be used"),
        ("binary.txt", b"\x00\x01\xff", "binary.txt holds no text that can be used"),
        ("lines.jsonl", b'{"body": "w3"}', "lines.jsonl holds no text that can be used"),
        ("short.txt", b"w3", "one segment needs 32 tokens, but "),
    ],
)
def test_data_that_can_not_be_used_is_named(
    run: Callable[..., Any], options: list[Any], tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    outcome = run("pretrain", *options, "--data", tmp_path / name)
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].startswith("gakernels pretrain: data: ")
    assert message in outcome.err.splitlines()[-1]
    assert "Traceback" not in outcome.err


def test_an_output_that_is_a_file_is_refused(refused: Callable[..., str], options: list[Any], document: Path) -> None:
    before = document.read_text()
    assert "--output must be a folder, but" in refused("pretrain", *options, "--output", document)
    assert document.read_text() == before


def test_a_diverged_run_is_told_in_one_line(run: Callable[..., Any], options: list[Any]) -> None:
    outcome = run("pretrain", *options, "--set", "trainer.learning_rate_factors={'*': 1e30}", "--steps", 10)
    assert outcome.code == 2
    assert "gakernels pretrain: training stopped: " in outcome.err.splitlines()[-1]


def test_a_run_is_repeated_from_its_recipe(run: Callable[..., Any], options: list[Any], tmp_path: Path) -> None:
    assert run("pretrain", *options, "--set", "trainer.clip=0.5", "--seed", 7).code == 0
    recipe = tmp_path / "out" / "recipe.yaml"
    assert run("pretrain", "--config", recipe, "--output", tmp_path / "again").code == 0
    assert (tmp_path / "again" / "report.json").read_text() == (tmp_path / "out" / "report.json").read_text()
    assert (tmp_path / "again" / "recipe.yaml").read_text() == recipe.read_text()
    values = load_recipe(PretrainingRecipe, recipe)
    assert (values.seed, values.generator.seed, values.trainer.seed, values.trainer.clip) == (7, 7, 7, 0.5)


def test_options_stand_over_the_file_and_set_over_options(
    run: Callable[..., Any], options: list[Any], tmp_path: Path
) -> None:
    config = tmp_path / "recipe.yaml"
    config.write_text("trainer: {steps: 1, learning_rate: 5e-3}\ngenerator: {rank: 3, static_rank: 2}\n")
    outcome = run("pretrain", *options, "--config", config, "--rank", 4, "--set", "generator.rank=2")
    assert outcome.code == 0
    values = load_recipe(PretrainingRecipe, tmp_path / "out" / "recipe.yaml")
    assert (values.trainer.steps, values.trainer.learning_rate) == (4, 0.01)
    assert (values.generator.rank, values.generator.static_rank) == (2, 2)
    assert "adapter of an empty context" in outcome.out


def test_what_is_needed_is_named(refused: Callable[..., str], files: Any, options: list[Any]) -> None:
    assert "model.name is needed, but it is not given" in refused("pretrain", "--data", "x", "--steps", 1)
    assert "data must have either a path or sources" in refused("pretrain", "--model", files.base, "--steps", 1)
    assert "trainer.steps is needed" in refused("pretrain", "--model", files.base, "--data", "x")
    at = options.index("--output")
    assert "--output is needed" in refused("pretrain", *options[:at], *options[at + 2 :])


def test_a_plan_needs_no_weights_and_writes_nothing(
    run: Callable[..., Any], options: list[Any], files: Any, tmp_path: Path
) -> None:
    (tmp_path / "only-config").mkdir()
    (tmp_path / "only-config" / "config.json").write_text((files.base / "config.json").read_text())
    outcome = run("pretrain", *options, "--model", tmp_path / "only-config", "--dry-run", "--tflops", 1e-3)
    assert outcome.code == 0, outcome
    base = AutoModelForCausalLM.from_pretrained(files.base)
    recipe = load_recipe(PretrainingRecipe, None, [f"{key}" for key in RECIPE])
    model = GenerativeAdapter(base, recipe.generator)
    trained = sum(parameter.numel() for parameter in model.generators.parameters())
    assert f"{sum(parameter.numel() for parameter in base.parameters()):,}" in outcome.out
    assert f"{trained:,}" in outcome.out
    assert "tokens of the run" in outcome.out
    assert "at 0.001 TFLOP/s per process" in outcome.out
    assert "fits a GPU of 24 GB" in outcome.out
    assert not (tmp_path / "out").exists()


RECIPE = (
    "model.name=x",
    "data.path=x",
    "trainer.steps=4",
    "generator.state_size=8",
    "generator.rank=4",
    "generator.chunk_size=8",
)


def test_a_plan_knows_the_epochs_of_tokens_that_are_cached(run: Callable[..., Any], options: list[Any]) -> None:
    assert "not known before" in run("pretrain", *options, "--dry-run").out
    assert run("pretrain", *options).code == 0
    assert "0.42" in run("pretrain", *options, "--dry-run").out  # 4 steps of 2 segments, 304 tokens are 19 segments


def test_a_plan_of_more_processes_than_divide_the_batch_is_refused(
    refused: Callable[..., str], options: list[Any]
) -> None:
    message = refused("pretrain", *options, "--dry-run", "--processes", 3)
    assert "batch_size must be a multiple of the number of processes, 3, but it is 2" in message


@pytest.mark.parametrize(("option", "value"), [("--processes", 0), ("--tflops", 0), ("--tflops", "nan")])
def test_a_plan_for_nothing_is_refused(
    refused: Callable[..., str], options: list[Any], option: str, value: object
) -> None:
    assert f"{option} must be above 0" in refused("pretrain", *options, "--dry-run", option, value)
