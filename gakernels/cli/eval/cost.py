"""`gakernels eval cost`: the cost of a context with each method."""

import argparse
import json
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from gakernels.cli.common import add_command, output_file
from gakernels.cost.shapes import SHAPES, ModelShape
from gakernels.errors import InputError, first_line
from gakernels.evaluation.cost import COUNTED_METHODS, CostSettings, MethodCost, all_costs, stream_state
from gakernels.evaluation.paper import QUERY_TOKENS, TableRow, table_1
from gakernels.evaluation.tables import short_count
from gakernels.files import write_text
from gakernels.model.base_model import model_source
from gakernels.model.config import GeneratorConfig
from gakernels.paths import expanded
from gakernels.training.base_model import DTYPES
from gakernels.version import __version__


def add_cost(tasks: Any) -> None:
    """Add the task."""
    parser = add_command(
        tasks,
        "cost",
        run_cost,
        "Operations and storage for a context with each method, from the shapes of a model (docs/evaluation.md).",
        "  gakernels eval cost --model my-model --context 1024,8192,32768 --json cost.json\n"
        "  gakernels eval cost --shape mistral-7b --table-1",
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--model", type=expanded, help="base model: a folder, its config.json, or a hub name; no weights are loaded"
    )
    model.add_argument("--shape", choices=SHAPES, help="or the shape of a well-known model")
    parser.add_argument("--context", default="1024,8192", help="tokens, separated by commas (default: %(default)s)")
    parser.add_argument("--linears", default="o_proj", help="linear layers, separated by commas (default: %(default)s)")
    parser.add_argument("--state-size", type=int, default=1024, help="d_r (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=128, help="r (default: %(default)s)")
    parser.add_argument("--chunk-size", type=int, default=1024, help="tokens per chunk (default: %(default)s)")
    defaults = CostSettings()
    for name, what in (
        ("prompt-tokens", "of a question with its instruction"),
        ("new-tokens", "of an answer"),
        ("retrieved-tokens", "of the passage that retrieval finds"),
    ):
        default = getattr(defaults, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, default=default, help=f"tokens {what} (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=defaults.epochs, help="fine-tuning epochs (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="dtype of what is stored (default: %(default)s)"
    )
    parser.add_argument("--table-1", action="store_true", help="also show table 1 of the paper next to our numbers")
    parser.add_argument("--json", type=output_file, help="also write the results to this file")


def run_cost(options: argparse.Namespace) -> int:
    """Compute and show the costs."""
    contexts = _contexts(options.context)
    config = GeneratorConfig(
        linears=tuple(name.strip() for name in options.linears.split(",")),
        state_size=options.state_size,
        rank=options.rank,
        chunk_size=options.chunk_size,
    )
    settings = CostSettings(
        options.prompt_tokens,
        options.new_tokens,
        options.retrieved_tokens,
        options.epochs,
        DTYPES[options.dtype].itemsize,
    )
    shape = SHAPES[options.shape] if options.shape else _read_shape(options.model)
    costs = all_costs(shape, config, contexts, settings)
    console = Console()
    for context, rows in costs.items():
        console.print(_cost_table(shape, context, rows, settings))
    for method, what in COUNTED_METHODS.items():
        console.print(f"{method}: {what}", highlight=False)
    if options.table_1:
        console.print(_paper_table(table_1()))
    if options.json:
        write_text(options.json, json.dumps(_results(shape, config, settings, costs), indent=2) + "\n")
    return 0


def _contexts(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"--context must be numbers of tokens above 0, separated by commas, but it is {text!r}")
    return list(dict.fromkeys(map(int, parts)))


def _read_shape(name: str) -> ModelShape:
    try:
        config = AutoConfig.from_pretrained(**model_source(name))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"--model: the configuration of {name!r} can't be read: {first_line(error)}") from error
    return ModelShape.from_config(config, name)


def _cost_table(shape: ModelShape, context: int, rows: list[MethodCost], settings: CostSettings) -> Table:
    asked = f"questions of {settings.prompt_tokens} + {settings.new_tokens} tokens"
    table = Table(title=f"{shape.name}: a context of {context:,} tokens, {asked}")
    table.add_column("method", no_wrap=True)
    for heading in ("FLOP to read the context", "FLOP of a question", "numbers kept", "bytes"):
        table.add_column(heading, justify="right")
    table.add_column("of what")
    for row in rows:
        counts = row.contextualization.total, row.query.total, row.storage.numbers, row.storage.bytes
        table.add_row(row.method, *map(short_count, counts), row.storage.kind)
    return table


def _paper_table(rows: list[TableRow]) -> Table:
    table = Table(
        title=f"Table 1 of the paper; estimate (of its released code) and ours for {QUERY_TOKENS} tokens read"
    )
    table.add_column("model", no_wrap=True)
    for heading in ("TFLOPS", "estimate", "ours", "M floats", "ours"):
        table.add_column(heading, justify="right")
    for row in rows:
        values = (f"{row.paper.tera_operations:.3f}", f"{row.estimate:.3f}", f"{row.operations:.3f}")
        table.add_row(row.paper.model, *values, row.paper.floats, f"{row.mega_floats:g}")
    return table


def _results(
    shape: ModelShape, config: GeneratorConfig, settings: CostSettings, costs: dict[int, list[MethodCost]]
) -> dict[str, Any]:
    return {
        "gakernels_version": __version__,
        "model": shape.name,
        "parameters": shape.parameters,
        "generator": config.to_dict(),
        "settings": vars(settings),
        "stream_state": vars(stream_state(shape, config)),
        "contexts": [
            {"tokens": context, "methods": [row.to_dict() for row in rows]} for context, rows in costs.items()
        ],
        "table_1": [row.to_dict() for row in table_1()],
    }
