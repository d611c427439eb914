"""The small-scale study: the ablation of the paper's table 2, and recall against context length, on the demo's base.

    python -m studies.small_scale_training --output GENERATORS
    python -m studies.small_scale --generators GENERATORS --json RESULTS.json --plots FOLDER

Ablation    reconstruction and completion perplexity of texts about new people, and recall of their facts, for every
            trained variant; each compared with `default`, paired, on the same texts.
Recall      against context length for `default`, with all methods, and for the package's generator; the other
            tests of `gakernels eval recall` for the latter.

Every part is stored as soon as it is finished; the same command continues with what is missing.
"""

import argparse
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers

from gakernels.evaluation.answer_log import AnswerLog
from gakernels.evaluation.methods import MethodSettings
from gakernels.evaluation.metrics import compare, score
from gakernels.evaluation.perplexity import CutDocument, perplexity
from gakernels.evaluation.recall import RecallSettings, recall
from gakernels.evaluation.report import build, describe_model
from gakernels.evaluation.runner import Runner
from gakernels.evaluation.scenarios import Measurements, Scenario
from gakernels.files import write_text
from gakernels.model import GenerativeAdapter
from gakernels.model.static_lora import STATIC_LORA_FILE
from studies.small_scale_report import draw, tables
from studies.small_scale_training import STATIC, VARIANTS, draw_texts

PACKAGED = Path(str(files("gakernels.demo") / "assets" / "generator"))
TEXTS, FACTS, SEED = 48, 12, 1_000_000
CONTEXTS = 20
LENGTHS = (128, 256, 512, 1024)
OTHER_TESTS = ("facts", "position", "distractors", "overwritten", "needle")
# A LoRA for each context takes long, so it gets fewer contexts.
TUNED_CONTEXTS, TUNED_LENGTHS, TUNING_RATE, TUNING_STEPS = 6, (128, 256, 512), 3e-3, 40

StudyRow = dict[str, Any]


def main() -> None:
    """Evaluate what is missing, write it and draw it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--generators", type=Path, required=True, help="folder of small_scale_training.py")
    parser.add_argument("--json", type=Path, required=True, help="results")
    parser.add_argument("--plots", type=Path, required=True, help="folder for the plots")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(arguments.json)
    default = arguments.generators / f"default-{arguments.seeds[0]}"
    control = arguments.generators / f"{STATIC}-{arguments.seeds[0]}" / STATIC_LORA_FILE
    results.add("length packaged", lambda: lengths(PACKAGED, None))
    results.add("tests packaged", lambda: tests(PACKAGED))
    results.add("length default", lambda: lengths(default, control))
    for seed in arguments.seeds:
        results.add(f"ablation {seed}", lambda seed=seed: ablation(arguments.generators, seed))
    draw(results.parts, arguments.plots)
    for table in tables(results.parts):
        print(table.markdown())


class Results:
    """The parts of the study, in a JSON file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.parts: dict[str, Any] = json.loads(path.read_text())["parts"] if path.exists() else {}

    def add(self, name: str, make: Any) -> None:
        """Make a part, if it is missing, and write it."""
        if name in self.parts:
            return
        self.parts[name] = make()
        environment = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "device": platform.machine(),
            "threads": torch.get_num_threads(),
        }
        write_text(self._path, json.dumps({"environment": environment, "parts": self.parts}, indent=1) + "\n")
        print(f"{name} done", flush=True)


def ablation(generators: Path, seed: int) -> dict[str, Any]:
    """The scores of the trained variants of a seed; `default` compared with all others, and the others with it."""
    rows, comparisons = [], []
    reference: Mapping[str, Mapping[str, Measurements]] = {}
    control = generators / f"{STATIC}-{seed}" / STATIC_LORA_FILE
    for name in (name for name in VARIANTS if (generators / f"{name}-{seed}").exists()):
        model = GenerativeAdapter.from_pretrained(generators / f"{name}-{seed}")
        beside = ["closed_book", "prompt", *(["static_lora"] if control.exists() else [])] if name == "default" else []
        settings = MethodSettings(static_lora=control if "static_lora" in beside else None)
        found = measured(model, ["adapter", "other_adapter", *beside], settings)
        rows += [
            {
                "variant": name,
                "scenario": scenario,
                "method": method,
                "metric": metric,
                **vars(score(metric, samples)),
            }
            for scenario, methods in found.items()
            for method, by_metric in methods.items()
            for (_, metric), samples in by_metric.items()
        ]
        reference = reference or found
        comparisons += [
            {"variant": name, "against": f"default: {method}", "scenario": scenario, "metric": metric, **vars(compared)}
            for scenario, methods in reference.items()
            for method, by_metric in methods.items()
            for (cell, metric), samples in by_metric.items()
            if (method == "adapter") != (name == "default")
            and (compared := compare(metric, found[scenario]["adapter"][cell, metric], samples)) is not None
        ]
    return {"rows": rows, "comparisons": comparisons, **describe_model(model)}


def measured(
    model: GenerativeAdapter, names: Sequence[str], settings: MethodSettings
) -> dict[str, dict[str, Measurements]]:
    """The measurements by scenario and method."""
    found = {}
    for name, scenario in (
        ("perplexity", text_perplexity(model)),
        *((f"recall {form}", _recall(model, tests=("facts",), facts=(FACTS,), form=form)) for form in FORMS),
    ):
        found[name] = run(model, scenario, names, settings).measurements()
    return found


FORMS = ("question", "statement")


def text_perplexity(model: GenerativeAdapter) -> Scenario:
    """The perplexity of new texts and of their continuations."""
    rng = Random(SEED)
    texts = [[part.text() for part in draw_texts(rng, FACTS, "test")] for _ in range(TEXTS)]

    def tokens(text: str) -> tuple[int, ...]:
        assert model.tokenizer is not None
        return tuple(model.tokenizer(text, add_special_tokens=False)["input_ids"])

    documents = [
        CutDocument(str(number), told, tokens(told), tokens(after)) for number, (told, after) in enumerate(texts)
    ]
    return perplexity(documents, model.config.chunk_size)


def _recall(model: GenerativeAdapter, contexts: int = CONTEXTS, **settings: Any) -> Scenario:
    def measure(text: str) -> int:
        assert model.tokenizer is not None
        return len(model.tokenizer(text, add_special_tokens=False)["input_ids"])

    return recall(RecallSettings(contexts=contexts, seed=SEED, **settings), measure)


def run(model: GenerativeAdapter, scenario: Scenario, names: Sequence[str], settings: MethodSettings) -> Runner:
    """A finished run."""
    runner = Runner(model, scenario, names, AnswerLog(None, {}), settings)
    runner.run()
    return runner


def lengths(generator: Path, static: Path | None) -> dict[str, Any]:
    """Recall against the length of the context, with costs."""
    model = GenerativeAdapter.from_pretrained(generator)
    scenario = _recall(model, tests=("length",), lengths=LENGTHS)
    names = ["closed_book", "prompt", "adapter", "other_adapter", *(["static_lora"] if static else [])]
    found = _report(run(model, scenario, names, MethodSettings(static_lora=static)))
    if static:
        few = _recall(model, TUNED_CONTEXTS, tests=("length",), lengths=TUNED_LENGTHS)
        settings = MethodSettings(learning_rate=TUNING_RATE, epochs=TUNING_STEPS)
        tuned = _report(run(model, few, ["context_lora"], settings))
        found = {**found, **{key: found[key] + tuned[key] for key in ("results", "methods", "costs")}}
    return found


def tests(generator: Path) -> dict[str, Any]:
    """The other tests of recall."""
    model = GenerativeAdapter.from_pretrained(generator)
    scenario = _recall(model, tests=OTHER_TESTS, lengths=LENGTHS)
    names = ["closed_book", "prompt", "adapter", "other_adapter"]
    return _report(run(model, scenario, names, MethodSettings()))


def _report(runner: Runner) -> dict[str, Any]:
    report = build(runner, runner.scenario.settings)
    return {
        key: report[key] for key in ("settings", "generator", "contexts", "results", "comparisons", "methods", "costs")
    }


if __name__ == "__main__":
    main()
