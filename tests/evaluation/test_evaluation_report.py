"""Reports say what was measured, beside what the paper reports."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from worlds import BARE, make, run, scenario

from gakernels import GeneratorConfig, __version__
from gakernels.cost.shapes import ModelShape
from gakernels.data.bad_records import BadRecords
from gakernels.evaluation import paper, report
from gakernels.evaluation.cost import CostSettings, method_cost
from gakernels.evaluation.datasets import Dataset
from gakernels.evaluation.metrics import compare, score
from gakernels.evaluation.plots import plots
from gakernels.evaluation.scenarios import docqa
from gakernels.evaluation.tables import ReportTable, own_tables, short_count, short_seconds
from gakernels.evaluation.tables import tables as all_tables

SETTINGS = {"data": {"a.json": "0" * 64}, "base_fingerprint": "f", "limit": None, "seed": 3}
PAPER_MODELS = ("Mistral-7B-Instruct", "Llama2-7B-Chat")
NAMES = ("closed_book", "prompt", "adapter", "other_adapter")


def test_it_holds_scores_comparisons_costs_and_times() -> None:
    model, asked = make(), scenario(4)
    runner = run(model, asked, *NAMES)
    made = json.loads(json.dumps(report.build(runner, SETTINGS, ["a remark"])))
    assert (made["kind"], made["scenario"], made["protocol"]) == (report.KIND, "docqa", "official")
    assert made["versions"]["gakernels"] == __version__
    assert made["notes"] == ["a remark"]
    assert GeneratorConfig.from_dict(made["generator"]) == model.config
    measured = runner.measurements()
    for row in made["results"]:
        samples = measured[row["method"]][tuple(row["cell"].items()), row["metric"]]
        assert row == {**row, **vars(score(row["metric"], samples)), "unit": "fraction", "resampled": "contexts"}
    assert {row["method"] for row in made["results"]} == set(NAMES)
    assert {row["against"] for row in made["comparisons"]} == set(NAMES) - {"adapter"}
    for row in made["comparisons"]:
        key = tuple(row["cell"].items()), row["metric"]
        found = compare(row["metric"], measured["adapter"][key], measured[row["against"]][key])
        assert found is not None
        assert row == {**row, **vars(found), "unit": "fraction", "resampled": "contexts"}
    assert {row["method"] for row in made["methods"]} == set(NAMES)
    assert [(row["cell"], row["method"]) for row in made["measured_costs"]] == [({"length": 1}, name) for name in NAMES]


def test_without_an_adapter_the_first_method_is_compared_with_the_others() -> None:
    made = report.build(run(make(), scenario(3), "prompt", "closed_book"), SETTINGS)
    assert {(row["method"], row["against"]) for row in made["comparisons"]} == {("prompt", "closed_book")}
    assert "f1: prompt minus the others (%)" in {table.title for table in all_tables(made)}


def test_quality_is_in_percent_and_says_what_was_resampled() -> None:
    """Perplexities are not; one context has no interval."""
    row = {"cell": {}, "method": "adapter", "metric": "f1", "unit": "fraction", "resampled": "contexts"}
    row |= {"value": 0.5, "low": 0.25, "high": 0.6666, "count": 1200, "clusters": 40}
    alone = {**row, "cell": {"length": 9}, "low": None, "high": None, "clusters": 1}
    loss = {**row, "metric": "completion_perplexity", "unit": "perplexity", "value": 7.4, "low": 7, "high": 8}
    made = {
        "results": [row, alone, loss],
        "comparisons": [],
        "skipped": {},
        "methods": [],
        "measured_costs": [],
        "device": "x",
    }
    first, second = own_tables(made)
    assert first.title == "f1 (%)"
    assert first.rows == (
        ("all", "50.0 [25.0, 66.7]", "1,200 / 40 contexts"),
        ("length 9", "50.0 (n = 1)", "1,200 / 1 contexts"),
    )
    assert second.title == "completion perplexity"
    assert second.rows == (("all", "7.400 [7.000, 8.000]", "1,200 / 40 contexts"),)


def test_costs_are_those_of_the_shapes() -> None:
    model, asked = make(), scenario(4)
    made = report.build(run(model, asked, "adapter", "prompt"), SETTINGS)
    shape = ModelShape.from_config(model.base.config)
    contexts = [len(model.tokenizer(case.context.text)["input_ids"]) for case in asked.cases]
    tokens = round(sum(contexts) / 4)
    questions = [q.text for case in asked.cases for q in case.context.questions]
    prompt = round(sum(len(model.tokenizer(question)["input_ids"]) for question in questions) / len(questions))
    settings = CostSettings(prompt, 5, min(tokens, 133), number_bytes=8)
    for row in made["costs"]:
        expected = method_cost(row["method"], shape, model.config, tokens, settings).to_dict()
        assert row == {**row, **expected}
    assert {row["method"] for row in made["costs"]} == {"adapter", "prompt"}


class Page(HTMLParser):
    """Counts tags and notes those that are not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_files_are_written_beside_the_json(tmp_path: Path) -> None:
    drawn = [case.context for case in scenario(6).cases]
    asked = docqa(
        Dataset(tuple(drawn), BadRecords.from_dict({"bad <line>": {"count": 2, "first": ["f:3", "f:4"]}})),
        len,
        [20, 60],
        settings=BARE,
    )
    made = report.build(run(make(), asked, *NAMES), SETTINGS)
    pictures = plots(made)
    assert set(pictures) == {"f1", "exact_match", "cost"}
    files = report.write(made, tmp_path / "r.json", pictures)
    assert {file.name for file in files} == {"r.json", "r.md", "r.html", *(f"r.{name}.svg" for name in pictures)}
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(json.dumps(made))
    page = Page()
    html = (tmp_path / "r.html").read_text()
    page.feed(html)
    assert page.open == []
    shown = all_tables(made)
    assert page.count["svg"] == 3
    assert page.count["table"] == len(shown)
    assert page.count["h2"] == len(shown)
    assert "bad &lt;line&gt;" in html
    text = (tmp_path / "r.md").read_text()
    for table in shown:
        assert f"## {table.title}\n" in text
        assert all(len(row) == len(table.headings) for row in table.rows)
    assert "![r.f1.svg](r.f1.svg)" in text
    assert "| bad <line> | 2 | f:3 |" in text
    assert "Paper" not in text + html + "".join(pictures.values())


@pytest.mark.parametrize(
    ("scenario", "data", "cell", "titles"),
    [
        ("docqa", "SQuAD", {"length": 512}, [f"Paper, table 5: F1 (%), {m}, SQuAD" for m in PAPER_MODELS]),
        ("docqa", "StreamingQA", {"length": 512}, [f"Paper, table 5: F1 (%), {m}, StreamingQA" for m in PAPER_MODELS]),
        ("dialog", "MSC-Self-Instruct", {}, ["Paper, table 1: Mistral-7B-Instruct, MSC-Self-Instruct"]),
        ("icl", "MetaICL", {}, ["Paper, abstract: Mistral-7B-Instruct, MetaICL"]),
        ("perplexity", "SlimPajama", {}, ["Paper, table 2: Mistral-7B-Instruct, SlimPajama"]),
        ("recall", None, {}, []),
    ],
)
def test_the_papers_values_stand_beside_the_same_data_alone(
    scenario: str, data: str | None, cell: dict[str, int], titles: list[str]
) -> None:
    assert data is None or data in paper.DATA[scenario]
    row = {"cell": cell, "method": "adapter", "metric": "f1", "unit": "fraction", "resampled": "contexts"}
    row |= {"value": 0.5, "low": 0.4, "high": 0.6, "count": 9, "clusters": 3}
    made = {"scenario": scenario, "paper": data, "results": [row], "device": "x"}
    made |= {"comparisons": [], "skipped": {}, "methods": [], "measured_costs": [], "costs": []}
    found = [table for table in all_tables(made) if table.title.startswith("Paper")]
    assert [table.title for table in found] == titles
    if scenario == "docqa":
        assert [table.rows[0][0] for table in found] == ["length 512"] * 2
        assert all(len(table.rows) == 1 for table in found)
    assert not any(table.title.startswith("Paper") for table in all_tables({**made, "paper": None}))


def test_a_report_can_be_written_again_and_is_the_same(tmp_path: Path) -> None:
    made = report.build(run(make(), scenario(3), "closed_book", "adapter"), SETTINGS)
    first = {file.name: file.read_text() for file in report.write(made, tmp_path / "r.json", plots(made))}
    again = json.loads((tmp_path / "r.json").read_text())
    second = {file.name: file.read_text() for file in report.write(again, tmp_path / "r.json", plots(again))}
    assert first == second


def test_the_papers_tables_are_complete() -> None:
    assert [row.model for row in paper.TABLE_1] == list(paper.TABLE_1_F1)
    assert {(part.model[:5], part.data) for part in paper.TABLE_5} == {
        (model, data) for model in ("Mistr", "Llama") for data in ("SQuAD", "StreamingQA")
    }
    for part in paper.TABLE_5:
        for length in paper.LENGTHS:
            assert set(part.values(length)) == {"closed_book", "sft_full", "cpt_full", "prompt", "adapter"}
        # longer contexts are harder, but for a few tenths
        assert all(a > b - 2.0 for a, b in zip(part.adapter, part.adapter[1:], strict=False))
    assert paper.TABLE_5[0].values(512)["adapter"] == 48.8
    assert paper.TABLE_5[2].values(32768)["prompt"] == 6.4


def test_tables_are_escaped() -> None:
    table = ReportTable("a", ("", "x|y"), (("<b>", "1|2\n3"),), "a & b")
    assert "| <b> | 1\\|2 3 |" in table.markdown()
    assert "<td>&lt;b&gt;</td><td>1|2\n3</td>" in table.html()
    assert "<p>a &amp; b</p>" in table.html()


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0"), (999, "999"), (1000, "1.000 k"), (123_456_789, "123.457 M"), (10**19, "10000.000 P")]
)
def test_short_counts(count: int, shown: str) -> None:
    assert short_count(count) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(None, "-"), (0.0, "0 ms"), (0.25, "250 ms"), (0.01234, "12.3 ms"), (61.5, "61.50 s")]
)
def test_short_seconds(seconds: float | None, shown: str) -> None:
    assert short_seconds(seconds) == shown


def test_hashes_are_of_content_and_names(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a").write_text("x")
    first = report.data_hash(tmp_path / "one")
    assert report.data_hash(tmp_path / "one") == first
    (tmp_path / "one" / "a").rename(tmp_path / "one" / "b")
    assert report.data_hash(tmp_path / "one") != first
    assert report.data_hash(tmp_path / "one" / "b") != first
