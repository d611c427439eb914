"""`gakernels data`: data sets in the form that the evaluations read."""

import argparse
import json
from typing import Any

from gakernels.cli.common import add_command, output_file
from gakernels.evaluation.streaming_qa import join_streaming_qa
from gakernels.files import write_text
from gakernels.paths import user_path


def add_parser(commands: Any) -> None:
    """Add the command and its subcommands."""
    parser = add_command(
        commands,
        "data",
        None,  # each data set has its own
        "Prepare data sets for `gakernels eval` (docs/evaluation.md).",
        "  gakernels data streamingqa --questions streaminqa_eval.jsonl.gz \\\n"
        "      --articles news-docs.*.en.filtered.gz --output data/streamingqa/eval.jsonl",
    )
    add_streaming_qa(parser.add_subparsers(dest="dataset", required=True, metavar="DATASET"))


def add_streaming_qa(datasets: Any) -> None:
    """Add the data set `streamingqa`."""
    parser = add_command(
        datasets,
        "streamingqa",
        run_streaming_qa,
        "Join StreamingQA's questions with their articles: flat rows for `gakernels eval docqa`. Questions: "
        "https://github.com/google-deepmind/streamingqa; articles: https://data.statmt.org/news-crawl/README.",
        "  gakernels data streamingqa --questions streaminqa_eval.jsonl.gz \\\n"
        "      --articles news-docs.*.en.filtered.gz --output data/streamingqa/eval.jsonl",
    )
    parser.add_argument(
        "--questions", type=user_path, required=True, help="streaminqa_{train,valid,eval}.jsonl.gz of the repository"
    )
    parser.add_argument(
        "--articles",
        type=user_path,
        required=True,
        nargs="+",
        help="news-docs.YEAR.en.filtered.gz of https://data.statmt.org/news-crawl/doc/en/, for 2007 to 2020",
    )
    parser.add_argument("--output", type=output_file, required=True, help="file of JSON lines to write")


def run_streaming_qa(options: argparse.Namespace) -> int:
    """Join, and tell what is missing."""
    rows, skipped = join_streaming_qa(options.questions, options.articles, progress=True)
    write_text(options.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    articles = len({row["context"] for row in rows})
    print(f"{len(rows):,} questions about {articles:,} articles: {options.output}")
    for reason, count in skipped.counts.items():
        print(f"left out: {count:,} x {reason} (first: {skipped.places[reason][0]})")
    return 0
