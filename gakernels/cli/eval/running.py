"""Shared by all evaluations on a model: options, the run, and the report."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from gakernels.cli.common import add_command, add_model_options, load_generator, output_file
from gakernels.distributed import Ranks, process_group
from gakernels.errors import InputError
from gakernels.evaluation import paper
from gakernels.evaluation import report as reports
from gakernels.evaluation.answer_log import AnswerLog
from gakernels.evaluation.methods import MethodSettings
from gakernels.evaluation.metrics import PROTOCOLS
from gakernels.evaluation.plots import plots
from gakernels.evaluation.prompts import STYLES
from gakernels.evaluation.runner import METHODS, Runner, RunSettings
from gakernels.evaluation.scenarios import AskSettings, Scenario
from gakernels.evaluation.tables import ReportTable, own_tables
from gakernels.model import GenerativeAdapter
from gakernels.model.static_lora import STATIC_LORA_FILE
from gakernels.paths import expanded, user_path
from gakernels.training.run_folder import only_process

DEFAULT_METHODS = "closed_book,prompt,retrieval,adapter"
NO_STATIC_LORA = (
    "No static LoRA trained with the generator's budget was given (--static-lora), so that control is missing: "
    "what the adapter gains over the base model may come from the training."
)


def add_run_options(
    parser: argparse.ArgumentParser, methods: str = DEFAULT_METHODS, generator_required: bool = True
) -> None:
    """Add the options of every evaluation on a model."""
    add_model_options(parser, generator_required)
    parser.add_argument(
        "--methods",
        default=methods,
        help=f"separated by commas, out of: {', '.join(METHODS)} (default: %(default)s); an adapter adds its controls",
    )
    parser.add_argument(
        "--protocol", choices=PROTOCOLS, default="official", help="see docs/evaluation.md (default: %(default)s)"
    )
    parser.add_argument(
        "--limit", type=int, help="most questions or documents per cell of the results, drawn at random (default: all)"
    )
    parser.add_argument("--sample-seed", type=int, default=0, help="seed of the draw of --limit (default: %(default)s)")
    parser.add_argument(
        "--json",
        type=output_file,
        help="write the report here, with .md, .html, plots and the answers next to it",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of fine-tuning (default: %(default)s)")
    parser.add_argument(
        "--static-lora",
        type=user_path,
        help=f"trained static LoRA (default: {STATIC_LORA_FILE} in the generator's folder)",
    )
    parser.add_argument("--learning-rate", type=float, help="for fine-tuned methods (default: see docs/evaluation.md)")
    parser.add_argument(
        "--epochs", type=int, help="most epochs for fine-tuned methods (default: see docs/evaluation.md)"
    )
    parser.add_argument(
        "--truncate-to",
        type=int,
        help="tokens of a truncated prompt (default: as many as have keys and values of the size of an adapter)",
    )
    parser.add_argument(
        "--batch-tokens", type=int, default=16_384, help="rows x tokens per batch (default: %(default)s)"
    )


def add_question_options(parser: argparse.ArgumentParser, training: bool = True) -> None:
    """Add the options of evaluations that ask questions, for which there may be others to train on."""
    if training:
        parser.add_argument(
            "--train", type=user_path, help="questions of the same form to tune on, for the sft and cpt methods"
        )
    parser.add_argument("--passages", type=int, default=1, help="100-word passages to retrieve (default: %(default)s)")
    parser.add_argument(
        "--embedding-model", type=expanded, help="folder or hub name of the model for retrieval_embedding"
    )
    parser.add_argument("--new-tokens", type=int, help="most tokens per answer (default: the paper's)")
    parser.add_argument(
        "--chat", action="store_true", help="ask with the tokenizer's chat template, as in instruction tuning"
    )
    parser.add_argument("--style", choices=STYLES, help="prompt style of the base model (default: the protocol's)")
    parser.add_argument(
        "--adapted-style", choices=STYLES, help="prompt style of adapted models (default: the protocol's)"
    )


def add_paper_option(parser: argparse.ArgumentParser, task: str) -> None:
    """Add the option that says that the data is the paper's."""
    parser.add_argument(
        "--paper-data",
        choices=paper.DATA[task],
        help="say that --data is this data set in the paper's split, to see the paper's numbers beside; "
        "with --protocol released and nothing that changes it",
    )


_TOLD = ("seed", "passages", "truncate_to", "chat", "learning_rate", "epochs")  # of the methods, in a report
_NOT_THE_PAPERS = ("limit", "pieces", "part", "style", "adapted_style", "chat", "new_tokens")


def _paper_data(options: argparse.Namespace) -> str | None:
    """The paper's data, if that is what is evaluated.

    Raises:
        InputError: the protocol or what is asked is not the paper's.
    """
    data: str | None = getattr(options, "paper_data", None)
    changed = [f"--{name.replace('_', '-')}" for name in _NOT_THE_PAPERS if getattr(options, name, None)]
    if data is not None and (options.protocol != "released" or changed):
        found = ", ".join([f"--protocol {options.protocol}", *changed])
        raise InputError(f"--paper-data needs --protocol released and nothing that changes it, but there is {found}")
    return data


def ask_settings(options: argparse.Namespace) -> AskSettings:
    """How questions are asked."""
    return AskSettings(options.style, options.adapted_style, options.new_tokens, options.limit, options.sample_seed)


def numbers(text: str, option: str, least: int = 1) -> list[int]:
    """Comma-separated numbers, each at least `least` (0 or 1).

    Raises:
        InputError: the text is something else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= least for part in parts):
        raise InputError(f"{option} must be numbers above {least - 1}, separated by commas, but it is {text!r}")
    return list(dict.fromkeys(map(int, parts)))


def refuse(options: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Raises: InputError: --methods names one of these, which the evaluation can't use."""
    for name in _listed(options):
        if name in names:
            raise InputError(f"--methods: {name} can't be used in {options.task}: {why}")


class Inputs(NamedTuple):
    """What an evaluation reads and asks.

    Attributes:
        files: data files that the answers depend on.
        make: reads them and makes the scenario; called once the model is there.
    """

    files: Sequence[Path]
    make: Callable[[GenerativeAdapter], Scenario]


def add_task(
    tasks: Any, name: str, inputs: Callable[[argparse.Namespace], Inputs], summary: str, example: str
) -> argparse.ArgumentParser:
    """Add a subcommand that evaluates; `inputs` takes its options."""
    parser = add_command(tasks, name, lambda options: evaluate(options, inputs(options)), summary, example)
    parser.set_defaults(inputs=inputs)
    return parser


def evaluate(options: argparse.Namespace, inputs: Inputs) -> int:
    """Run an evaluation, print it and write its report. Returns the exit code."""
    if options.json is not None and options.json.suffix != ".json":
        raise InputError(f"--json must be a file whose name ends in .json, but it is {options.json}")
    check_inputs(options, inputs)
    with process_group(options.device) as ranks, only_evaluation(options.json, ranks):
        report = run_evaluation(options, inputs, load_generator(options), ranks)
        if ranks.rank == 0:
            _finish(report, options.json)
    return 0


def check_inputs(options: argparse.Namespace, inputs: Inputs) -> None:
    """Raises: InputError: a file is missing, or --paper-data does not go with the other options."""
    _paper_data(options)
    for file in inputs.files:
        if not file.exists():
            raise InputError(f"there is no file {file}")


def run_evaluation(
    options: argparse.Namespace, inputs: Inputs, model: GenerativeAdapter, ranks: Ranks
) -> dict[str, Any]:
    """Run what is left of an evaluation; its report, see `report.build`. Call it in all processes."""
    names, static_lora, notes = _methods(options)
    notes += _sampling(options)
    scenario = inputs.make(model)
    method_settings = _method_settings(options, static_lora)
    settings = _settings(options, model, scenario, inputs.files, method_settings)
    log = AnswerLog(options.json, settings, ranks.rank)
    runner = Runner(model, scenario, names, log, method_settings, RunSettings(options.batch_tokens), ranks)
    _run(runner, options.json)
    return reports.build(runner, {**settings, "processes": ranks.world}, notes, _paper_data(options))


def only_evaluation(report: Path | None, ranks: Ranks) -> AbstractContextManager[None]:
    """Keep out other evaluations that would write the same report."""
    if report is None or ranks.rank > 0:
        return nullcontext()
    return only_process(report.with_suffix(".lock"), f"another evaluation writes to {report}", "choose another --json")


def _methods(options: argparse.Namespace) -> tuple[list[str], Path | None, list[str]]:
    """The names of the methods, including the controls of an adapter; the static LoRA; and remarks."""
    names = _listed(options)
    beside = options.generator / STATIC_LORA_FILE
    static_lora = options.static_lora or (beside if beside.is_file() else None)
    notes = []
    if any(name.startswith("adapter") for name in names):
        controls = ["other_adapter"] + (["static_lora"] if static_lora is not None else [])
        names += [name for name in controls if name not in names]
        notes = [] if static_lora is not None else [NO_STATIC_LORA]
    return names, static_lora, notes


def _sampling(options: argparse.Namespace) -> list[str]:
    """How many questions or documents were drawn, and how."""
    if options.limit is None:
        return []
    drawn = "documents" if options.task == "perplexity" else "questions, in proportion to their categories,"
    return [f"A cell has at most {options.limit} {drawn} drawn at random with the seed {options.sample_seed}."]


def _listed(options: argparse.Namespace) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in options.methods.split(",") if name.strip()))


def _settings(
    options: argparse.Namespace,
    model: GenerativeAdapter,
    scenario: Scenario,
    files: Sequence[Path],
    settings: MethodSettings,
) -> dict[str, Any]:
    """Everything that the answers depend on. Methods may be added to a run later."""
    return {
        "scenario": scenario.name,
        "protocol": scenario.protocol,
        **scenario.settings,
        "new_tokens": scenario.new_tokens,
        "limit": options.limit,
        "sample_seed": options.sample_seed,
        **{name: getattr(settings, name) for name in _TOLD},
        "embedding_model": _embedding_model(settings.embedding_model),
        "static_lora": None if settings.static_lora is None else reports.data_hash(settings.static_lora),
        "data": {name: reports.data_hash(file) for name, file in _names(files).items()},
        **reports.describe_model(model),
    }


def _embedding_model(name: str | None) -> str | None:
    """Its name on the hub, or what is in its folder."""
    return name if name is None or not Path(name).exists() else reports.data_hash(Path(name))


def _names(files: Sequence[Path]) -> dict[str, Path]:
    """The files by name, or by path if names occur twice."""
    names = {file.name: file for file in files}
    return names if len(names) == len(files) else {str(file): file for file in files}


def _method_settings(options: argparse.Namespace, static_lora: Path | None) -> MethodSettings:
    return MethodSettings(
        passages=getattr(options, "passages", 1),
        embedding_model=getattr(options, "embedding_model", None),
        truncate_to=options.truncate_to,
        chat=getattr(options, "chat", False),
        static_lora=static_lora,
        learning_rate=options.learning_rate,
        epochs=options.epochs,
        seed=options.seed,
        batch_tokens=options.batch_tokens,
    )


def _run(runner: Runner, report: Path | None) -> None:
    try:
        runner.run()
    except KeyboardInterrupt:
        if report is not None:
            print(f"the answers so far are stored next to {report}; run the command again to resume", file=sys.stderr)
        raise


def _finish(report: Mapping[str, Any], path: Path | None) -> None:
    console = Console()
    for table in own_tables(report):
        console.print(rich_table(table))
    for note in report["notes"]:
        console.print(note, highlight=False)
    if path is not None:
        for file in reports.write(report, path, drawn(plots, report)):
            print(file)


def drawn(draw: Callable[[Mapping[str, Any]], dict[str, str]], report: Mapping[str, Any]) -> dict[str, str]:
    """The plots of a report; none, with a message, without matplotlib."""
    try:
        return draw(report)
    except ImportError:
        print("no plots: matplotlib is not installed (pip install 'gakernels[plots]')", file=sys.stderr)
        return {}


def rich_table(table: ReportTable) -> Table:
    """A table for the terminal."""
    shown = Table(title=table.title, caption=table.note or None)
    for place, heading in enumerate(table.headings):
        shown.add_column(heading, justify="right" if place else "left", no_wrap=not place)
    for row in table.rows:
        shown.add_row(*(cell.replace("[", "\\[") for cell in row))
    return shown
