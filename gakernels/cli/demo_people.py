"""`gakernels demo --tiny`: the models that are part of the package answer questions about people invented just now."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from gakernels.demo import TINY_GENERATOR
from gakernels.demo.experiment import WAYS, DemoResult, SizeResult, run
from gakernels.model import GenerativeAdapter

LABELS = {
    "closed_book": "closed-book",
    "prompt": "document in the prompt",
    "adapter": "generated adapter, closed-book",
    "other_adapter": "adapter of another document",
}


def show_people(seed: int, questions: int) -> dict[str, Any]:
    """Run the experiment, show it, and return its results."""
    with one_thread():
        generator = TINY_GENERATOR
        result = run(GenerativeAdapter.from_pretrained(generator).eval(), seed, questions)
    _show(result)
    return result.to_dict()


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
