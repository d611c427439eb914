"""`gakernels reproduce`: the tables and figures of the paper, and of later ones about the same questions."""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from time import monotonic
from typing import Any

from rich.console import Console
from tqdm import tqdm

from gakernels.cli.common import add_command, add_model_options, load_generator
from gakernels.cli.eval import add_tasks
from gakernels.cli.eval.running import check_inputs, drawn, only_evaluation, rich_table, run_evaluation
from gakernels.distributed import Ranks, process_group
from gakernels.errors import InputError
from gakernels.evaluation import report as reports
from gakernels.evaluation import reproduction
from gakernels.evaluation.metrics import PROTOCOLS
from gakernels.evaluation.published import SETTINGS, SHAPES, TABLES, Row, Table
from gakernels.evaluation.reproduction import Outcome
from gakernels.model import GenerativeAdapter
from gakernels.paths import user_path

NOT_YET = "not run yet"


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "reproduce",
        run,
        "Run a published table row by row, and write it as Markdown, CSV, JSON, plots and one HTML page. "
        "Rows without data name the missing file and its source. The same command resumes an interrupted run "
        "(docs/evaluation.md).",
        "  gakernels reproduce table5 --generator my-generator --data data --limit 20   # a try\n"
        "  gakernels reproduce table5 --generator my-generator --data data --paper-data",
    )
    titles = "; ".join(f"{name}: {table.title}" for name, table in TABLES.items())
    parser.add_argument("table", choices=TABLES, metavar="TABLE", help=titles)
    add_model_options(parser)
    parser.add_argument(
        "--data", type=user_path, default="data", help="folder of the data files (default: %(default)s)"
    )
    parser.add_argument("--output", type=user_path, default="reproduced", help="folder to write (default: %(default)s)")
    parser.add_argument(
        "--protocol", choices=PROTOCOLS, default="released", help="see docs/evaluation.md (default: %(default)s)"
    )
    parser.add_argument("--limit", type=int, help="for a quick try: the most questions or documents in each row")
    parser.add_argument(
        "--paper-data",
        action="store_true",
        help="declare that the files are the paper's, in its split, to see the published values beside ours",
    )
    parser.add_argument(
        "--setting",
        action="append",
        default=[],
        metavar="NAME=GENERATOR",
        help=f"table2: the generator of one more row ({', '.join(SETTINGS)}); may be repeated",
    )
    parser.add_argument("--chat", action="store_true", help="ask with the tokenizer's chat template")
    parser.add_argument("--static-lora", type=user_path, help="trained static LoRA, as for `gakernels eval`")
    parser.add_argument(
        "--batch-tokens", type=int, default=16_384, help="rows x tokens per batch (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> int:
    """Run the rows that have what they need, and write the page after each."""
    table, page = TABLES[options.table], options.output / f"{options.table}.json"
    generators = _generators(options, table)
    outcomes = [_planned(row, options, generators) for row in table.rows]
    told = {"protocol": options.protocol, "limit": options.limit, "generator": str(options.generator)}
    loaded = _Loaded()
    with process_group(options.device) as ranks, only_evaluation(page, ranks):
        for number in _in_turn(outcomes, options, ranks):
            outcomes[number] = _run_row(outcomes[number], options, loaded, ranks)
            if ranks.rank == 0:
                reproduction.write(reproduction.merge(options.table, table, outcomes, told), table, page, {})
        if ranks.rank == 0:
            _finish(reproduction.merge(options.table, table, outcomes, told), table, page)
    if all(outcome.report is None for outcome in outcomes):
        raise InputError(f"no row of {options.table} could be run; {page.with_suffix('.md')} says what is missing")
    return 0


# Planning


def _generators(options: argparse.Namespace, table: Table) -> dict[str | None, Path]:
    """The generator of each setting; None is the setting of most rows.

    Raises:
        InputError: --setting does not name a setting of the table, or no generator.
    """
    found: dict[str | None, Path] = {None: options.generator}
    known = [row.setting for row in table.rows if row.setting is not None]
    for given in options.setting:
        name, _, folder = given.partition("=")
        if name not in known or not folder:
            names = ", ".join(known) or f"none in {options.table}"
            raise InputError(f"--setting must be NAME=GENERATOR with a name out of {names}, but it is {given!r}")
        found[name] = user_path(folder)
    return found


def _planned(row: Row, options: argparse.Namespace, generators: Mapping[str | None, Path]) -> Outcome:
    """A row that is not run yet, with its command, or what it lacks.

    Raises:
        InputError: the options do not go together.
    """
    lacks = [
        f"{file.name} is missing in {options.data}: {file.source}"
        for file in (row.data, row.train)
        if file is not None and not (options.data / file.name).exists()
    ]
    if row.setting not in generators:
        recipe = f"gakernels pretrain {SETTINGS[row.setting or '']}"
        lacks.append(f"no generator of this setting ({recipe}): name it with --setting '{row.setting}=GENERATOR'")
    if lacks or row.task == SHAPES:
        return Outcome(row, (), reason="; ".join(lacks) or NOT_YET)
    arguments = _arguments(row, options, generators[row.setting])
    _checked(arguments)
    return Outcome(row, arguments, reason=NOT_YET)


def _arguments(row: Row, options: argparse.Namespace, generator: Path) -> tuple[str, ...]:
    """The arguments of the `gakernels eval` that is a row."""
    given = {
        "generator": generator,
        "model": options.model,
        "device": options.device,
        "dtype": options.dtype,
        "static-lora": options.static_lora,
        "batch-tokens": options.batch_tokens,
        "protocol": options.protocol,
        "data": row.data and options.data / row.data.name,
        "train": row.train and options.data / row.train.name,
        **row.options,
        "limit": row.options.get("limit") if options.limit is None else options.limit,
        "paper-data": row.paper_data if options.paper_data else None,
        "json": _report_file(row, options),
    }
    flags = {"--allow-other-base": options.allow_other_base, "--chat": options.chat and row.task != "perplexity"}
    valued = (f"--{name}={value}" for name, value in given.items() if value is not None)
    return row.task, *valued, *(flag for flag, is_set in flags.items() if is_set)


def _report_file(row: Row, options: argparse.Namespace) -> Path:
    """The report of a row."""
    file: Path = options.output / options.table / f"{reproduction.slug(row.name)}.json"
    return file


def _checked(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a `gakernels eval`.

    Raises:
        InputError: they do not go together.
    """
    parser = argparse.ArgumentParser()
    add_tasks(parser)
    options = parser.parse_args(arguments)
    check_inputs(options, options.inputs(options))
    return options


# Running


def _in_turn(outcomes: Sequence[Outcome], options: argparse.Namespace, ranks: Ranks) -> Iterator[int]:
    """The numbers of the rows to run; tells which is next, and how long the rest may take."""
    numbers = [number for number, outcome in enumerate(outcomes) if outcome.reason == NOT_YET]
    seconds: list[float] = []  # of rows that had no report before
    for place, number in enumerate(numbers):
        row, start = outcomes[number].row, monotonic()
        is_new = not _report_file(row, options).exists()
        if ranks.rank == 0:
            left = tqdm.format_interval((len(numbers) - place) * fmean(seconds)) if seconds else None
            about = f"; about {left} left if the rest take as long as those before" if left else ""
            print(f"row {place + 1} of {len(numbers)}: {row.name}{about}", file=sys.stderr)
        yield number
        if is_new:
            seconds.append(monotonic() - start)


class _Loaded:
    """The model of the last row, kept for the next ones with the same generator."""

    def __init__(self) -> None:
        self._model: GenerativeAdapter | None = None
        self._generator: Path | None = None

    def model(self, options: argparse.Namespace) -> GenerativeAdapter:
        """The model that the options name."""
        if self._model is None or self._generator != options.generator:
            self._model = None  # makes room for the next one
            self._model, self._generator = load_generator(options), options.generator
        return self._model


def _run_row(planned: Outcome, options: argparse.Namespace, loaded: _Loaded, ranks: Ranks) -> Outcome:
    """Run a row, and write its report."""
    if planned.row.task == SHAPES:
        return replace(planned, report=reproduction.shapes_report(loaded.model(options)), reason="")
    own = _checked(planned.arguments)
    report = run_evaluation(own, own.inputs(own), loaded.model(own), ranks)
    if ranks.rank == 0:
        reports.write(report, own.json, {})
    return replace(planned, report=report, reason="")


def _finish(report: Mapping[str, Any], table: Table, page: Path) -> None:
    """Print the table and what is missing, and write it with plots."""
    shown = reproduction.main_table(report, table.metrics)
    if shown.rows:
        Console().print(rich_table(shown))
    for reason in dict.fromkeys(row["reason"] for row in report["rows"] if row["reason"]):
        print("not run:", ", ".join(row["row"] for row in report["rows"] if row["reason"] == reason), f"- {reason}")
    plots = drawn(lambda merged: reproduction.all_plots(merged, table.metrics), report)
    for file in reproduction.write(report, table, page, plots):
        print(file)
