"""Pretraining from text files to the report."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from invented import make_tokenizer, random_text
from regression import InterruptionError, log_of
from tiny import make_base, make_config
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from gakernels import FormatError, GenerativeAdapter, InputError
from gakernels.evaluation.perplexity import context_perplexity
from gakernels.training import pretraining
from gakernels.training.pretraining import PretrainingConfig, load_data, pretrain
from gakernels.training.trainer import TrainerConfig

CHUNK, CHUNKS = 16, 2


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text(random_text(300))
    return folder


def start(base: PreTrainedModel | None = None, tokenizer: PreTrainedTokenizerFast | None = None) -> GenerativeAdapter:
    """The same untrained generator at each call on the same base."""
    return GenerativeAdapter(
        make_base() if base is None else base, make_config(chunk_size=CHUNK), tokenizer or make_tokenizer()
    )


def settings(data: Path, **changes: Any) -> PretrainingConfig:
    return PretrainingConfig(**{"data": data, "chunks": CHUNKS, "batch_size": 4, "held_out": 5, **changes})


def optimiser(**changes: Any) -> TrainerConfig:
    return TrainerConfig(
        **{"steps": 30, "learning_rate": 0.02, "warmup_steps": 3, "log_every": 5, "checkpoint_every": 10, **changes}
    )


def test_both_losses_fall_and_everything_is_written(data: Path, tmp_path: Path) -> None:
    model, out = start(), tmp_path / "out"
    model.base.save_pretrained(tmp_path / "base")
    model.tokenizer.save_pretrained(tmp_path / "base")
    model.base.config.name_or_path = str(tmp_path / "base")
    report = pretrain(model, settings(data, static_lora=True), optimiser(), out, progress=False)
    for lines in (log_of(out), log_of(out / "static_lora")):
        assert [line["step"] for line in lines] == list(range(5, 31, 5))
        for name in ("reconstruction", "completion"):
            assert lines[-1]["loss"][name] < lines[0]["loss"][name] - 0.1
    assert json.loads((out / "report.json").read_text()) == report.to_dict()
    assert set(report.perplexity) == {"none", "own", "other", "static_lora"}
    assert report.perplexity["own"] < report.perplexity["none"]
    assert report.contexts == 5
    again = GenerativeAdapter.from_pretrained(out)
    held_out = load_data(again, settings(data), progress=False).held_out
    scored = context_perplexity(again, held_out, CHUNKS)
    assert scored.perplexity == {name: report.perplexity[name] for name in ("none", "own", "other")}


def test_data_held_out_is_never_trained_on(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    plain = pretraining.window_losses

    def spy(model: GenerativeAdapter, batch: Any) -> Any:
        seen.extend(batch.input_ids[:, :CHUNKS].flatten(1))
        return plain(model, batch)

    monkeypatch.setattr(pretraining, "window_losses", spy)
    model = start()
    parts = load_data(model, settings(data), progress=False)
    assert len(parts.held_out) == 5
    pretrain(model, settings(data), optimiser(steps=9), tmp_path / "out", progress=False)
    trained = {tuple(row.tolist()) for row in seen}
    assert trained == {tuple(row.tolist()) for row in parts.training}  # 36 of 23 segments: every one
    assert not trained & {tuple(row.tolist()) for row in parts.held_out}


def test_held_out_segments_are_the_last_of_the_data(data: Path) -> None:
    parts = load_data(start(), settings(data), progress=False)
    words = [[1, *[int(word[1:]) for word in path.read_text().split()], 2] for path in sorted(data.iterdir())]
    tokens = [token for document in words for token in document]
    joined = torch.cat([parts.training, parts.held_out]).flatten().tolist()
    assert joined == tokens[: len(joined)]
    assert len(tokens) - len(joined) < CHUNK * CHUNKS


@pytest.mark.parametrize("stage", ["generator", "static_lora"])
def test_a_resumed_run_equals_the_uninterrupted_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    models = [start(base) for base in copies(make_base(), 3)]
    config, trainer = settings(data, static_lora=True), optimiser(steps=11, log_every=4, checkpoint_every=5)
    whole = pretrain(models[0], config, trainer, tmp_path / "whole", progress=False)
    target = pretraining if stage == "generator" else pretraining.StaticLora
    plain, calls = target.window_losses, iter(range(7))

    def failing(*arguments: Any) -> Any:
        if next(calls, None) is None:
            raise InterruptionError
        return plain(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(target, "window_losses", failing)
        with pytest.raises(InterruptionError):
            pretrain(models[1], config, trainer, tmp_path / "parts", progress=False)
    torch.manual_seed(0)  # whatever random numbers are drawn elsewhere
    assert pretrain(models[2], config, trainer, tmp_path / "parts", progress=False) == whole
    ours, expected = models[2].generator_tensors(), models[0].generator_tensors()
    assert all(ours[name].equal(expected[name]) for name in expected)
    for folder in ("", "static_lora"):
        assert log_of(tmp_path / "parts" / folder) == log_of(tmp_path / "whole" / folder)


def copies(base: PreTrainedModel, count: int) -> Iterator[PreTrainedModel]:
    for _ in range(count):
        copy = make_base()
        copy.load_state_dict(base.state_dict())
        yield copy


@pytest.mark.parametrize(
    ("changes", "trainer", "message"),
    [
        ({"batch_size": 3}, {}, r"pretraining\.batch_size was 4 and is 3"),
        ({"seed": 1}, {}, r"pretraining\.seed was 0 and is 1"),
        ({"reconstruction": "copy"}, {}, r"pretraining\.reconstruction was 'random_slice' and is 'copy'"),
        ({}, {"weight_decay": 0.5}, r"trainer\.weight_decay was 0\.01 and is 0\.5"),
    ],
)
def test_a_run_with_other_settings_is_not_gone_on_with(
    data: Path, tmp_path: Path, changes: dict[str, Any], trainer: dict[str, Any], message: str
) -> None:
    first, second = (start(base) for base in copies(make_base(), 2))
    pretrain(first, settings(data), optimiser(steps=1), tmp_path / "out", progress=False)
    with pytest.raises(FormatError, match=message):
        pretrain(second, settings(data, **changes), optimiser(steps=1, **trainer), tmp_path / "out", progress=False)


def test_other_data_base_dtype_or_generator_are_refused(data: Path, tmp_path: Path) -> None:
    base = make_base()
    one, two, three, four = copies(base, 4)
    config, trainer, out = settings(data), optimiser(steps=1), tmp_path / "out"
    pretrain(start(one), config, trainer, out, progress=False)
    with pytest.raises(FormatError, match=r"base\.dtype was 'torch.float32' and is 'torch.bfloat16'"):
        pretrain(start(two.bfloat16()), config, trainer, out, progress=False)
    other = GenerativeAdapter(three, replace(make_config(chunk_size=CHUNK), power_iterations=2), make_tokenizer())
    with pytest.raises(FormatError, match=r"generator\.power_iterations was 1 and is 2"):
        pretrain(other, config, trainer, out, progress=False)
    with pytest.raises(FormatError, match=r"base\.fingerprint was"):
        pretrain(start(), config, trainer, out, progress=False)
    (data / "0.txt").write_text(random_text(300))
    with pytest.raises(FormatError, match=r"pretraining\.data was"):
        pretrain(start(four), config, trainer, out, progress=False)


def test_the_same_data_in_another_place_can_be_gone_on_with(data: Path, tmp_path: Path) -> None:
    first, second = (start(base) for base in copies(make_base(), 2))
    report = pretrain(first, settings(data), optimiser(steps=1), tmp_path / "out", progress=False)
    moved = data.rename(tmp_path / "elsewhere")
    assert pretrain(second, settings(moved), optimiser(steps=1), tmp_path / "out", progress=False) == report


def test_too_little_data_is_told_with_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(random_text(5 * CHUNK * CHUNKS - 2))
    with pytest.raises(InputError, match=r"a\.txt gives 5 segments of 32 tokens, and 5 are held out; more text"):
        load_data(start(), settings(tmp_path / "a.txt"), progress=False)
    (tmp_path / "a.txt").write_text("w3")
    with pytest.raises(InputError, match="data: one segment needs 32 tokens, but there are only 3"):
        load_data(start(), settings(tmp_path / "a.txt"), progress=False)


def test_a_model_without_tokenizer_is_refused(data: Path) -> None:
    model = GenerativeAdapter(make_base(), make_config())
    with pytest.raises(InputError, match="tokenizer is needed to pretrain on text"):
        load_data(model, settings(data), progress=False)


def test_chunks_of_one_token_are_refused(data: Path) -> None:
    model = GenerativeAdapter(make_base(), make_config(chunk_size=1), make_tokenizer())
    with pytest.raises(InputError, match="chunk_size must be at least 2 to train on next tokens, but it is 1"):
        load_data(model, settings(data), progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunks": 0}, "chunks must be at least 1, but it is 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, but it is 0"),
        ({"held_out": 1}, "held_out must be at least 2, but it is 1"),
        ({"seed": -1}, r"seed must be between 0 and 2\^32 - 1, but it is -1"),
        ({"reconstruction": "all"}, "reconstruction must be one of .*, but it is 'all'"),
    ],
)
def test_a_setting_out_of_range_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings(tmp_path, **changes)
