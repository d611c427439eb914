"""Series of runs out of their logs, and the figures drawn of them."""

import json
import math
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from gakernels import InputError
from gakernels.cli import main
from gakernels.training.curves import RunSeries, Series, draw_runs, plot_runs, read_runs


def make_log(steps: range, offset: float = 0.0, evaluated: bool = True) -> list[dict[str, Any]]:
    """Lines as a training run writes them."""
    lines: list[dict[str, Any]] = []
    for step in steps:
        line: dict[str, Any] = {
            "step": step,
            "loss": {"reconstruction": 5 / step + offset, "completion": 4.0 + offset},
            "learning_rate": 1e-3 / step,
            "gradient_norm": None if step == steps[1] else 1.0 + step % 3,
            "tokens_per_second": 100.0 + step,
        }
        if evaluated and step % 4 == 0:
            perplexity = {"none": 90.0, "other": 30.0, "own": 20.0 + step}
            line["evaluation"] = {
                "reconstruction": {"perplexity": perplexity},
                "completion": {"perplexity": perplexity},
            }
        lines.append(line)
    return lines


def write(folder: Path, lines: list[dict[str, Any]], torn: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    return folder


def test_every_quantity_is_a_series_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    lines = make_log(range(2, 21, 2))
    lines[3]["skipped"] = [7, 8]
    (run,) = read_runs([write(tmp_path / "run", lines, '{"step": 22, "loss": {"recon')])
    assert run.name == "run"
    assert run.skipped == (7, 8)
    steps = tuple(range(2, 21, 2))
    assert run.series["loss/reconstruction"] == Series(steps, tuple(5 / step for step in steps))
    assert run.series["gradient_norm"].steps == (2, *steps[2:])
    assert run.series["evaluation/completion/perplexity/own"] == Series((4, 8, 12, 16, 20), (24, 28, 32, 36, 40))


def test_what_a_resumed_run_wrote_again_counts_once(tmp_path: Path) -> None:
    lines = [*make_log(range(1, 11)), *make_log(range(6, 13), offset=1.0)]
    (run,) = read_runs([write(tmp_path / "run", lines)])
    found = run.series["loss/completion"]
    assert found.steps == tuple(range(1, 13))
    assert found.values == (4.0,) * 5 + (5.0,) * 7


def test_a_control_follows_its_run_and_names_tell_runs_apart(tmp_path: Path) -> None:
    for place in ("a", "b"):
        write(tmp_path / place / "run", make_log(range(1, 5)))
    write(tmp_path / "a" / "run" / "static_lora", make_log(range(1, 5), evaluated=False))
    runs = read_runs([tmp_path / "a" / "run", tmp_path / "b" / "run" / "log.jsonl"])
    assert [run.name for run in runs] == ["a/run", "a/run, static LoRA", "b/run"]
    assert [run.is_control for run in runs] == [False, True, False]
    same = read_runs([tmp_path / "b" / "run", tmp_path / "b" / "run"])
    assert len({run.name for run in same}) == 2


def test_smoothing_keeps_a_constant_and_follows_a_step() -> None:
    steps = tuple(range(0, 1000, 10))
    assert Series(steps, (3.0,) * 100).smoothed().values == pytest.approx((3.0,) * 100)
    values = tuple(torch.cat([torch.zeros(50), torch.ones(50)]).tolist())
    smooth = Series(steps, values).smoothed().values
    assert smooth[:50] == (0,) * 50
    assert 0.1 < smooth[50] < 0.9
    assert smooth[60] == pytest.approx(1, abs=0.05)
    assert Series((5,), (2.0,)).smoothed().values == (2.0,)


def lines_of(axis: Any) -> list[tuple[list[float], list[float]]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.get_lines()]


def test_each_quantity_is_drawn_with_its_values(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = read_runs([write(tmp_path / name, make_log(range(1, 13))) for name in ("one", "two")])
    axes = {axis.get_title(loc="left"): axis for axis in draw_runs(runs).axes if axis.get_visible()}
    assert [title.split(",")[0] for title in axes] == [
        "reconstruction loss",
        "completion loss",
        "held-out reconstruction perplexity",
        "held-out completion perplexity",
        "learning rate",
        "gradient norm",
        "tokens a second",
    ]
    for title, quantity in (("learning rate", "learning_rate"), ("tokens a second", "tokens_per_second")):
        expected = runs[0].series[quantity]
        assert lines_of(axes[title])[0] == (list(expected.steps), list(expected.values))
    drawn = lines_of(axes["held-out completion perplexity"])
    for adapter in ("none", "other", "own"):
        expected = runs[1].series[f"evaluation/completion/perplexity/{adapter}"]
        assert (list(expected.steps), list(expected.values)) in drawn


def test_a_spike_does_not_flatten_the_curve() -> None:
    pytest.importorskip("matplotlib")
    values = [3.0 + math.sin(step) for step in range(500)]
    values[250] = 1e9
    run = RunSeries("run", {"loss/completion": Series(tuple(range(500)), tuple(values))})
    low, high = draw_runs([run]).axes[0].get_ylim()
    assert low < min(values)
    assert high < 5


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_command_writes_a_picture(tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    folders = [write(tmp_path / name, make_log(range(1, 9))) for name in ("first", "second")]
    output = tmp_path / f"curves{suffix}"
    assert main(["plot", *map(str, folders), "--output", str(output)]) == 0
    assert "first, second: " in capsys.readouterr().out
    if suffix == ".svg":
        assert ElementTree.parse(output).getroot().tag.endswith("svg")
    else:
        assert output.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == [output.name, "first", "second"]


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("curves.gif", make_log(range(1, 5)), "output must end in .png, .svg, .pdf"),
        ("c.png", [], "has no whole line yet"),
    ],
)
def test_what_can_not_be_drawn_is_refused(tmp_path: Path, name: str, lines: list[Any], message: str) -> None:
    folder = write(tmp_path / "run", lines)
    with pytest.raises(InputError, match=message):
        plot_runs(read_runs([folder]), tmp_path / name)
    assert not (tmp_path / name).exists()


def test_a_folder_without_a_log_and_a_missing_matplotlib_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plot", str(tmp_path / "nothing"), "--output", "c.png"]) == 2
    assert "there is no file" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    folder = write(tmp_path / "run", make_log(range(1, 5)))
    assert main(["plot", str(folder), "--output", str(tmp_path / "c.png")]) == 2
    error = capsys.readouterr().err
    assert error == "gakernels plot: plots need the package matplotlib: pip install 'gakernels[plots]'\n"
