"""`gakernels pretrain`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from invented import random_text

from gakernels import Adapter, GenerativeAdapter


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
    for name, label in (
        ("none", "base model, no adapter"),
        ("static_lora", "static LoRA, same layers, rank, windows and steps"),
        ("other", "generated adapter of another context"),
        ("own", "generated adapter of its own context"),
    ):
        row = next(line for line in outcome.out.splitlines() if label in line)
        assert f"{report['perplexity'][name]:.3f}" in row
    assert "3 contexts, 42 tokens" in outcome.out
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
    assert outcome.err.endswith("gakernels pretrain: interrupted\n")
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
        (["--learning-rate", -1], "learning_rate must be above 0, but it is -1.0"),
        (["--learning-rate", "inf"], "learning_rate must be above 0, but it is inf"),
        (["--warmup-steps", -1], "warmup_steps must be at least 0, but it is -1"),
        (["--weight-decay", -1], "weight_decay must be at least 0, but it is -1.0"),
        (["--weight-decay", "nan"], "weight_decay must be at least 0, but it is nan"),
        (["--batch-size", 0], "batch_size must be at least 1, but it is 0"),
        (["--held-out", 1], "held_out must be at least 2, but it is 1"),
        (["--chunk-size", 0], "chunk_size must be at least 1, but it is 0"),
        (["--chunk-size", 1], "chunk_size must be at least 2 to train on next tokens, but it is 1"),
        (["--chunks", 0], "chunks must be at least 1, but it is 0"),
        (["--log-every", 0], "log_every must be at least 1, but it is 0"),
        (["--checkpoint-every", 0], "checkpoint_every must be at least 1, but it is 0"),
        (["--seed", -1], "seed must be between 0 and 2^32 - 1, but it is -1"),
        (["--rank", 9], "rank must be between 1 and state_size (8), but it is 9"),
        (["--state-size", 0], "state_size must be at least 1, but it is 0"),
        (["--scale", "nan"], "scale must be finite, but it is nan"),
        (["--norm", "svd"], "argument --norm: invalid choice: 'svd'"),
        (["--reconstruction", "all"], "argument --reconstruction: invalid choice: 'all'"),
        (["--linears", "o_proj,nothing"], "linears: no linear layer is named 'nothing'; there are"),
        (["--linears", ""], "linears: no linear layer is named ''"),
        (["--layers", "0,one"], "--layers must be numbers with commas between them, but it is '0,one'"),
        (["--layers", ""], "--layers must be numbers with commas between them, but it is ''"),
        (["--layers", "0,3"], "layers must be between 0 and 2, but contains 3"),
        (["--layers", "1,1"], "layers must be different numbers"),
        (["--device", "nonsense"], "--device must be a device of this machine, but 'nonsense' is not: "),
        (["--device", "meta"], "--device must be a device of this machine, but 'meta' is not: "),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--held-out", 1000], "and 1000 are held out; more text"),
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
        ("empty.txt", b"", "empty.txt is empty"),
        ("binary.txt", b"\x00\x01\xff", "binary.txt must be "),
        ("lines.jsonl", b'{"text": "w3"}\n{"text"', "line 2 of"),
        ("short.txt", b"w3", "one segment needs 16 tokens, but there are only 3"),
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
    outcome = run("pretrain", *options, "--learning-rate", 1e30, "--steps", 10)
    assert outcome.code == 2
    assert "gakernels pretrain: training stopped: " in outcome.err.splitlines()[-1]
