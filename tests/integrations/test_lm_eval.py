"""The model type of lm-evaluation-harness: answers under the adapter of each document's field, against the library."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from invented import make_tokenizer
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tiny import make_base, make_config, make_trained, random_ids
from transformers import AutoModelForCausalLM, PreTrainedModel

from gakernels import GenerativeAdapter, InputError
from gakernels.integrations.lm_eval import GenerativeAdapterLM, cli_evaluate

TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{passage}}}}\\nQuestion {{{{question}}}}\\nAnswer"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc}}]
"""
TOLERANCE = 1e-4  # of a sum of a few logits in float32, of which some are padded to a batch


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base model and a generator for it."""
    base = make_base()
    base.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    make_trained(GenerativeAdapter(base, make_config(), make_tokenizer())).save_pretrained(
        tmp_path / "generator", "../base"
    )
    return tmp_path


def words(count: int) -> str:
    return " ".join(f"w{token}" for token in random_ids(count).tolist())


def make_lm(folder: Path, context_field: str | None = "passage", **options: Any) -> GenerativeAdapterLM:
    options = {"batch_size": 3, "device": "cpu", **options}
    return GenerativeAdapterLM(str(folder / "generator"), context_field=context_field, **options)


def plain_model(folder: Path, context: str) -> PreTrainedModel:
    """A plain model of transformers with the adapter of a context in its weights; the base if there is none."""
    if not context:
        return AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    model = GenerativeAdapter.from_pretrained(folder / "generator")
    model.save_merged(model.adapt(context), folder / "merged")
    return AutoModelForCausalLM.from_pretrained(folder / "merged").eval()


def log_likelihood(model: PreTrainedModel, prompt: str, continuation: str) -> tuple[float, bool]:
    tokenizer = make_tokenizer()
    ids = torch.tensor(tokenizer(prompt + continuation)["input_ids"])
    start = len(tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        logits = model(ids[None, :-1]).logits[0, start - 1 :]
    wanted = ids[start:]
    chosen = logits.log_softmax(-1).gather(1, wanted[:, None])
    return float(chosen.sum()), bool((logits.argmax(-1) == wanted).all())


def ask(kind: str, rows: Sequence[dict[str, Any]], *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, row, given, number) for number, (row, given) in enumerate(zip(rows, arguments, strict=True))]


def test_log_likelihoods_under_the_adapter_of_each_context(folder: Path) -> None:
    passages = [words(20), words(9), "", words(20)]
    rows = [{"passage": passages[number % 4]} for number in range(10)]
    pairs = [(words(3), " " + words(1 + number % 3)) for number in range(10)]
    held = [(f"{row['passage']}\n\n{prompt}", said) for row, (prompt, said) in zip(rows, pairs, strict=True)]
    lm = make_lm(folder)
    found = lm.loglikelihood(ask("loglikelihood", rows, *held))
    for passage in passages:
        model = plain_model(folder, passage)
        for row, pair, (value, greedy) in zip(rows, pairs, found, strict=True):
            if row["passage"] == passage:
                wanted, likeliest = log_likelihood(model, *pair)
                assert value == pytest.approx(wanted, abs=TOLERANCE)
                assert greedy == likeliest
    closed = make_lm(folder, None).loglikelihood(ask("loglikelihood", rows, *pairs))
    assert [value for value, _ in closed] != pytest.approx([value for value, _ in found], abs=0.01)
    base = HFLM(plain_model(folder, ""), tokenizer=make_tokenizer(), batch_size=3)
    same = base.loglikelihood(ask("loglikelihood", rows, *pairs))
    assert [value for value, _ in closed] == pytest.approx([value for value, _ in same], abs=TOLERANCE)


def test_a_whole_text_is_scored_and_texts_are_generated_under_the_adapter(folder: Path) -> None:
    lines, text, prompt = [words(6), words(7)], words(8), words(3)
    lm, rows = make_lm(folder), [{"passage": lines}]
    model = plain_model(folder, "\n".join(lines))
    (found,) = lm.loglikelihood_rolling(ask("loglikelihood_rolling", rows, (text,)))
    ids = torch.tensor(make_tokenizer()(text)["input_ids"])  # <s>, which is the prefix too, then the words
    with torch.no_grad():
        logits = model(torch.cat([ids[:1], ids])[None, :-1]).logits[0]
    assert found == pytest.approx(float(logits.log_softmax(-1).gather(1, ids[:, None]).sum()), abs=TOLERANCE)
    options = {"until": ["</s>"], "max_gen_toks": 5}
    (said,) = lm.generate_until(ask("generate_until", rows, (prompt, options)))
    start = torch.tensor([make_tokenizer()(prompt)["input_ids"]])
    wanted = model.generate(start, max_new_tokens=5, do_sample=False, eos_token_id=2)[0, start.shape[1] :]
    assert said.split() == make_tokenizer().decode(wanted, skip_special_tokens=True).split()


def test_the_command_evaluates_a_task_of_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"passage": words(20), "question": words(2), "choices": [words(1), words(2)], "label": number % 2}
        for number in range(4)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "tiny.yaml").write_text(TASK.format(folder=folder))
    model_args = f"generator={folder}/generator,pretrained={folder}/base,context_field=passage"
    options = ["--model", "gakernels", "--model_args", model_args, "--tasks", "tiny", "--device", "cpu"]
    files = ["--include_path", str(folder / "tasks"), "--output_path", str(folder / "out"), "--log_samples"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *options, *files, "--batch_size", "2"])
    cli_evaluate()
    (samples,) = (folder / "out").rglob("samples_tiny_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(lines) == len(rows)
    right = []
    for line in lines:
        row = line["doc"]
        model, prompt = plain_model(folder, row["passage"]), f"Question {row['question']}\nAnswer"
        wanted = [log_likelihood(model, prompt, f" {choice}")[0] for choice in row["choices"]]
        assert [float(resp[0][0]) for resp in line["resps"]] == pytest.approx(wanted, abs=TOLERANCE)
        right.append(max(range(2), key=wanted.__getitem__) == row["label"])
    (results,) = (folder / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["tiny"]["acc,none"] == sum(right) / len(right)


def test_what_cannot_be_answered_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make_lm(folder)
    for row, message in (
        ({"text": "w3", "question": "w4"}, r"a field of the documents \(text, question\), but is passage"),
        ({"passage": 3}, "must hold a text or a list of them, but is 3"),
    ):
        with pytest.raises(InputError, match=message):
            lm.loglikelihood(ask("loglikelihood", [row], ("w3", " w4")))
    with pytest.raises(InputError, match="use_cache must be off with context_field"):
        lm.set_cache_hook(None)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="runs in one process"):
        make_lm(folder)
