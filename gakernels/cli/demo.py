"""`gakernels demo`: a frozen model knows a new document after one forward pass."""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from gakernels.cli.common import (
    add_command,
    add_device_options,
    add_other_base_option,
    load_generator,
    output_file,
    read_text,
)
from gakernels.demo.experiment import (
    WAYS,
    DemoResult,
    SizeResult,
    peak_rss_bytes,
    perplexities,
)
from gakernels.demo.experiment import (
    run as run_experiment,
)
from gakernels.demo.questions import answer
from gakernels.errors import InputError
from gakernels.files import write_text
from gakernels.model import GenerativeAdapter
from gakernels.paths import expanded, user_path

LABELS = {
    "closed_book": "closed-book",
    "prompt": "document in the prompt",
    "adapter": "generated adapter, closed-book",
    "other_adapter": "adapter of another document",
}


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "demo",
        run,
        "Show a frozen model answer questions about new documents: closed-book, with the document in its prompt, and "
        "closed-book with the generated adapter. Without options it uses the small model that is part of the package.",
        "  gakernels demo --seed 7\n"
        "  gakernels demo --generator my-generator --document report.txt --question 'Question: Who wrote it? Answer:'",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed for drawing the people and facts (default: %(default)s)"
    )
    parser.add_argument(
        "--questions", type=int, default=200, help="at least this many per table row (default: %(default)s)"
    )
    parser.add_argument("--document", type=user_path, help="a document of your own, instead of invented people")
    parser.add_argument("--question", action="append", default=[], help="a prompt about --document; repeat for several")
    parser.add_argument("--generator", type=user_path, help="folder of a generator (default: the one in the package)")
    parser.add_argument(
        "--model",
        type=expanded,
        help="base model: a folder, GGUF file or hub name (default: the one that the generator names)",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=16, help="longest answer, with --document (default: %(default)s)"
    )
    parser.add_argument("--json", type=output_file, help="also write the results to this file")
    add_other_base_option(parser)
    add_device_options(parser)


def run(options: argparse.Namespace) -> int:
    """Run the experiment, or read the user's document, and show the results."""
    document = read_text(options.document) if options.document else None
    if options.question and document is None:
        raise InputError("--question needs --document")
    if options.questions < 1:
        raise InputError(f"--questions must be at least 1, but it is {options.questions}")
    embedded = options.generator is None
    if embedded:
        options.generator = Path(str(files("gakernels.demo") / "assets" / "generator"))
    with one_thread() if embedded else nullcontext():
        model = load_generator(options)
        if document is not None:
            results = _own_document(model, document, options)
        else:
            result = run_experiment(model, options.seed, options.questions)
            _show(result)
            results = result.to_dict()
    if options.json:
        write_text(options.json, json.dumps(results, indent=2) + "\n")
    return 0


@contextmanager
def one_thread() -> Iterator[None]:
    """The embedded models are too small for several threads: they would only wait for each other, and long if
    other programs use the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _own_document(model: GenerativeAdapter, document: str, options: argparse.Namespace) -> dict[str, Any]:
    console, started = Console(), time.perf_counter()
    adapter = model.stream().append(document).adapter()
    console.print(f"{adapter.tokens_seen} tokens became an adapter in {time.perf_counter() - started:.2f} s\n")
    asked = {
        "closed_book": (options.question, None),
        "prompt": ([f"{document} {question}" for question in options.question], None),
        "adapter": (options.question, [adapter] * len(options.question)),
    }
    given = {
        way: answer(model, prompts, adapters, batch_size=1, max_new_tokens=options.max_new_tokens)
        for way, (prompts, adapters) in asked.items()
    }
    for number, question in enumerate(options.question):
        table = Table(title=question)
        table.add_column("way")
        table.add_column("answer")
        for way, answers in given.items():
            table.add_row(LABELS[way], answers[number])
        console.print(table)
    perplexity = perplexities(model, [document])
    del perplexity["other_adapter"]  # there is no other document
    console.print(f"perplexity of the document: {perplexity['none']:.3f} without, {perplexity['adapter']:.3f} with it")
    return {
        "answers": given,
        "perplexity": perplexity,
        "seconds": time.perf_counter() - started,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _show(result: DemoResult) -> None:
    console = Console()
    first = next(iter(result.by_people.values()))
    console.print("[bold]A new document, about a person that the model has never seen:[/bold]")
    console.print(first.documents[0].text() + "\n")
    console.print(_example_table(first))
    console.print(_accuracy_table(result))
    ppl = result.perplexity
    console.print(
        f"Perplexity of the documents about one person: {ppl['none']:.2f} with no adapter, {ppl['adapter']:.2f} with "
        f"their own, {ppl['other_adapter']:.2f} with another document's.\n"
    )
    console.print(_cost_table(first, result))
    console.print(f"{result.seconds:.1f} s in all; peak resident memory {result.peak_rss_bytes / 2**20:.0f} MiB")


def _example_table(size: SizeResult) -> Table:
    table = Table(title="Some questions about it")
    for heading in ("question", "expected", *[LABELS[way] for way in WAYS[:3]]):
        table.add_column(heading)
    for example in size.examples[:5]:
        table.add_row(example["question"], example["expected"], *[_marked(example, way) for way in WAYS[:3]])
    return table


def _marked(example: dict[str, str], way: str) -> str:
    colour = "green" if example[way] == example["expected"] else "red"
    return f"[{colour}]{example[way]}[/{colour}]"


def _accuracy_table(result: DemoResult) -> Table:
    table = Table(title="Accuracy on new people")
    table.add_column("people in the document", justify="right")
    table.add_column("questions", justify="right")
    for way in WAYS:
        table.add_column(LABELS[way], justify="right")
    table.add_column("right attribute, any person", justify="right")
    for people, size in result.by_people.items():
        cells = [f"{size.accuracy[way]:.1%}" for way in WAYS]
        table.add_row(str(people), str(size.questions), *cells, f"{size.any_person_level:.1%}")
    return table


def _cost_table(size: SizeResult, result: DemoResult) -> Table:
    table = Table(title=f"Cost, {size.questions} questions about {len(size.documents)} documents of one person")
    for heading in ("way", "seconds to read the documents", "seconds to answer", "bytes kept for a document"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    table.add_row(LABELS["closed_book"], "-", f"{size.seconds['closed_book']:.2f}", "-")
    kept = {way: f"{count:,}" for way, count in result.context_bytes.items()}
    table.add_row(LABELS["prompt"], "with each question", f"{size.seconds['prompt']:.2f}", kept["prompt"])
    reading = f"{size.seconds['contextualise']:.2f}"
    table.add_row(LABELS["adapter"], reading, f"{size.seconds['adapter']:.2f}", kept["adapter"])
    return table
