"""Recipes from YAML and overrides, and every mistake in them named by its key."""

import math
import re
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from gakernels import InputError
from gakernels.settings import Flag, Int, Number, UserPath, Weights, settings
from gakernels.training.recipes import load_recipe, recipe_text


@settings
class Optimiser:
    steps: Int
    rate: Number = 5e-5
    betas: tuple[Number, Number] = (0.9, 0.999)
    weights: Weights = ()
    ends_early: Flag = False


@settings
class Source:
    path: UserPath
    weight: Number = 1.0


@settings
class Whole:
    optimiser: Optimiser
    name: str = "base"
    layers: tuple[Int, ...] | None = None
    linears: tuple[str, ...] = ("o_proj",)
    cache: UserPath | None = None
    scale: Number | None = None
    sources: Mapping[str, Source] = field(default_factory=dict)


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, text: str, *overrides: str) -> Whole:
    return load_recipe(Whole, write(folder, text), overrides)


def test_a_file_and_overrides_of_which_the_last_wins(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        "name: seven\noptimiser:\n  steps: 7\n  rate: 5e-5\n  weights: {completion: 0, copy: 2e-1}\n"
        "layers: [0, 2]\nsources:\n  books: {path: a/b.txt, weight: 3}\n",
        "optimiser.rate=1e-3",
        "optimiser.rate=2e-3",
        "linears=o_proj, down_proj",
        "optimiser.weights.completion=0.5",
        "sources.news.path=n.txt",
        "cache=elsewhere",
        "scale=.inf",
        "optimiser.ends_early=true",
    )
    assert recipe == Whole(
        optimiser=Optimiser(7, 2e-3, weights=(("completion", 0.5), ("copy", 0.2)), ends_early=True),
        name="seven",
        layers=(0, 2),
        linears=("o_proj", "down_proj"),
        cache=Path("elsewhere"),
        scale=math.inf,
        sources={"books": Source(Path("a/b.txt"), 3.0), "news": Source(Path("n.txt"))},
    )
    assert type(recipe.optimiser.steps) is int
    assert type(recipe.sources["books"].weight) is float


def test_without_a_file_the_defaults_and_overrides_are_all(tmp_path: Path) -> None:
    assert load_recipe(Whole, None, ["optimiser.steps=1e4"]) == Whole(Optimiser(10_000))
    assert load(tmp_path, "", "optimiser.steps=3", "name=12", "layers=4") == Whole(Optimiser(3), "12", (4,))


def test_nothing_can_be_given_where_nothing_is_a_value(tmp_path: Path) -> None:
    text = "layers: [1]\nscale: 2\ncache: c\noptimiser: {steps: 1}\n"
    assert load(tmp_path, text, "layers=null", "scale=none", "cache=") == Whole(Optimiser(1))


names = st.text("abcdefghijklmnopqrstuvwxyz_0123456789", min_size=1, max_size=9)
numbers = st.floats(allow_nan=False)
weights = st.floats(0, allow_nan=False, allow_infinity=False)
recipes = st.builds(
    Whole,
    optimiser=st.builds(
        Optimiser,
        steps=st.integers(),
        rate=numbers,
        betas=st.tuples(numbers, numbers),
        weights=st.dictionaries(names, weights, max_size=3).map(lambda pairs: tuple(pairs.items())),
        ends_early=st.booleans(),
    ),
    name=st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=9),
    layers=st.none() | st.lists(st.integers(), max_size=3).map(tuple),
    linears=st.lists(names, max_size=3).map(tuple),
    cache=st.none() | names.map(Path),
    scale=st.none() | numbers,
    sources=st.dictionaries(names, st.builds(Source, path=names.map(Path), weight=numbers), max_size=2),
)


@hypothesis.settings(deadline=None)  # another process may have the processor
@hypothesis.given(recipes)
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, recipe: Whole) -> None:
    assert load_recipe(Whole, write(tmp_path_factory.getbasetemp(), recipe_text(recipe))) == recipe


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("", [], r"^optimiser\.steps is needed, but it is not given$"),
        ("optimizer: {steps: 1}", [], r"^optimizer is not a setting; did you mean optimiser\?$"),
        ("", ["optimiser.stepps=1"], r"^optimiser\.stepps is not a setting; did you mean optimiser\.steps\?$"),
        ("", ["optimiser.zzz=1"], r"^optimiser\.zzz is not a setting; known are steps, rate, betas"),
        ("", ["sources.books.wait=1"], r"^sources\.books\.wait is not a setting; did you mean sources\.books\.weight"),
        ("", ["optimiser.steps=1", "sources.books.weight=1"], r"^sources\.books\.path is needed"),
        ("optimiser: {steps: 1.5}", [], r"^optimiser\.steps must be an integer, but it is 1\.5$"),
        ("optimiser: {steps: yes}", [], r"^optimiser\.steps must be an integer, but it is True$"),
        ("optimiser: {steps: many}", [], r"^optimiser\.steps must be an integer, but it is 'many'$"),
        ("optimiser: {rate: [1]}", [], r"^optimiser\.rate must be a number, but it is a list$"),
        ("optimiser: {rate: true}", [], r"^optimiser\.rate must be a number, but it is True$"),
        ("optimiser: {rate:}", [], r"^optimiser\.rate must be a number, but it is nothing$"),
        ("optimiser: {betas: [0.9]}", ["optimiser.steps=1"], r"^optimiser\.betas must have 2 entries, but it has 1$"),
        ("optimiser: {betas: [0.9, x]}", [], r"^optimiser\.betas\[1\] must be a number, but it is 'x'$"),
        ("optimiser: {weights: {copy: x}}", [], r"^optimiser\.weights\.copy must be a number, but it is 'x'$"),
        ("optimiser: {ends_early: 1}", [], r"^optimiser\.ends_early must be true or false, but it is 1$"),
        ("optimiser: 5", [], r"^optimiser must be a section of settings, but it is 5$"),
        ("", ["optimiser=5"], r"^optimiser must be a section of settings, but it is 5$"),
        ("sources: [a]", [], r"^sources must be a section of settings, but it is a list$"),
        ("name: 7", [], r"^name must be text, but it is 7$"),
        ("name: no", [], r"^name must be text, but it is False$"),
        ("cache: 3", [], r"^cache must be a path, but it is 3$"),
        ("layers: 0", [], r"^layers must be a list, but it is 0$"),
        ("linears: {a: b}", [], r"^linears must be a list, but it is a section$"),
        ("layers: [0, a]", [], r"^layers\[1\] must be an integer, but it is 'a'$"),
        ("- a", [], r"^config: .*recipe\.yaml must be a mapping of sections, but it is a list$"),
        ("a: [", [], r"^config: .*recipe\.yaml is not YAML: "),
        ("name: 2024-13-01", [], r"^config: .*recipe\.yaml is not YAML: month must be in 1"),
        ("", ["optimiser.steps=2024-13-01"], r"^optimiser\.steps must be an integer, but it is '2024-13-01'$"),
        ("name: a\nname: b", [], r"^the key 'name' occurs twice in one section \(line 1\)$"),
        ("", ["optimiser.steps"], r"must be of the form section\.name=value, but it is 'optimiser\.steps'$"),
        ("", ["=3"], r"must be of the form section\.name=value, but it is '=3'$"),
    ],
)
def test_a_mistake_is_named_by_its_key(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    """And the file, where it stands there."""
    with pytest.raises(InputError) as error:
        load(tmp_path, text, *overrides)
    assert re.search(message, str(error.value).removeprefix(f"{tmp_path / 'recipe.yaml'}: "))
    assert overrides or str(tmp_path / "recipe.yaml") in str(error.value)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(InputError, match=r"recipe\.yaml is not YAML"):
        load_recipe(Whole, tmp_path / "recipe.yaml")


def test_a_file_that_is_not_there_is_told_with_the_names_of_the_recipes() -> None:
    with pytest.raises(InputError, match=r"there is no file nothing\.yaml, nor a recipe of that name.*there are "):
        load_recipe(Whole, Path("nothing.yaml"))
