"""Recipes: the settings of a run as nested classes, read from YAML with overrides from the command line.

In a file a recipe is a mapping of the names of its class's fields; `section.name=value` overrides one entry
(docs/training.md).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from gakernels.errors import InputError
from gakernels.settings import Place, as_input_error, shown
from gakernels.user_text import read_user_text

CONFIGS = Path(__file__).parent.parent / "configs"  # the recipes that come with the package

Recipe = TypeVar("Recipe")


def load_recipe(
    kind: type[Recipe],
    path: Path | None = None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> Recipe:
    """A recipe of a class, from a file (`recipe_file`), then flags, then overrides; later ones win.

    Args:
        kind: made by `settings`.
        path: YAML file, or the name of a recipe that comes with the package; None for the defaults alone.
        overrides: `section.name=value`; the value is YAML, and a list may be written with commas alone.
        flags: values by `section.name`; texts are parsed like overrides.

    Raises:
        InputError: there is no such file, it is not YAML, a key is unknown, a required key is missing, or a value is
            of the wrong type or out of range.
    """
    values: dict[str, Any] = {} if path is None else _read(recipe_file(path))
    texts: dict[Place, str] = {}
    for key, value in [*(flags or {}).items(), *map(_override, overrides)]:
        place = tuple(key.split("."))
        texts[place] = str(value)
        _put(values, place, _parsed(value) if isinstance(value, str) else value)
    names = [name for place in texts for name in (".".join(map(str, place)), str(place[-1]))]
    _add_sections(values, kind)
    try:
        return _validated(kind, values, texts)
    except InputError as error:
        if path is None or str(error).startswith(tuple(names)):
            raise
        raise InputError(f"{path}: {error}") from error


def recipe_file(path: Path) -> Path:
    """The file itself, or, if it does not exist, the recipe `name.yaml` that comes with the package.

    Raises:
        InputError: neither exists.
    """
    if path.exists() and not path.is_dir():  # a file, or a shell's process substitution <(...)
        return path
    ours = CONFIGS / f"{path.name.removesuffix('.yaml')}.yaml"
    if len(path.parts) == 1 and ours.is_file():
        return ours
    names = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.yaml")))
    raise InputError(f"config: there is no file {path}, nor a recipe of that name in the package; there are {names}")


def recipe_values(recipe: Any) -> dict[str, Any]:
    """All settings of a recipe in plain YAML types, including defaults; `load_recipe` reads them back."""
    return {field.name: _plain(getattr(recipe, field.name)) for field in dataclasses.fields(recipe)}


def recipe_text(recipe: Any) -> str:
    """A recipe as YAML."""
    text: str = yaml.safe_dump(recipe_values(recipe), sort_keys=False, allow_unicode=True)
    return text


class _Loader(yaml.SafeLoader):
    """YAML that refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for number, key in enumerate(keys) if key in keys[:number]), None)
        if twice is not None:
            raise InputError(f"the key {twice!r} occurs twice in one section (line {node.start_mark.line + 1})")
        return super().construct_mapping(node, deep)

    def construct_yaml_timestamp(self, node: yaml.ScalarNode) -> str:
        """Keep dates as text: YAML would read 2026-01-31 as a date."""
        return super().construct_yaml_timestamp(node).isoformat()


_Loader.add_constructor("tag:yaml.org,2002:timestamp", _Loader.construct_yaml_timestamp)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = read_user_text(path)
    except InputError as error:
        raise InputError(f"config: {path} is not YAML: {error}") from error
    try:
        values = yaml.load(text, _Loader)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date like 2024-13-01
        raise InputError(f"config: {path} is not YAML: {' '.join(str(error).split())}") from error
    if values is not None and not isinstance(values, dict):
        raise InputError(f"config: {path} must be a mapping of sections, but it is {shown(values)}")
    return values or {}


def _override(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise InputError(f"an override must be of the form section.name=value, but it is {text!r}")
    return key.strip(), value.strip()


def _parsed(text: str) -> Any:
    try:
        return None if text in ("none", "None") else yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError):
        return text


def _put(values: dict[str, Any], place: Place, value: Any) -> None:
    for name in map(str, place[:-1]):
        inner = values.get(name)
        values[name] = values = dict(inner) if isinstance(inner, Mapping) else {}
    values[str(place[-1])] = value


def _add_sections(values: dict[str, Any], kind: Any) -> None:
    """Add required sections that are missing; the defaults of their fields may make them complete."""
    for name, info in kind.__pydantic_fields__.items():
        is_section = hasattr(info.annotation, "__pydantic_fields__")
        if is_section and values.get(name) is None and (info.is_required() or name in values):
            values[name] = {}


def _validated(kind: type[Recipe], values: dict[str, Any], texts: dict[Place, str]) -> Recipe:
    """The recipe; an override that YAML reads as another type is parsed again if text or a list is expected."""
    while True:
        try:
            return TypeAdapter(kind).validate_python(values)
        except ValidationError as error:
            if not any(_read_again(values, fault, texts) for fault in error.errors(include_url=False)):
                raise as_input_error(kind, error) from None


def _read_again(values: dict[str, Any], fault: Any, texts: dict[Place, str]) -> bool:
    text = texts.pop(fault["loc"], None)
    if text is not None and fault["type"] in ("string_type", "path_type"):
        _put(values, fault["loc"], text)
    elif text is not None and fault["type"] == "tuple_type" and text[:1] not in ("[", "{"):
        _put(values, fault["loc"], [part.strip() for part in text.split(",")])
    else:
        return False
    return True


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return recipe_values(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value
