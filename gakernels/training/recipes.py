"""Recipes: what a run is made of, as nested frozen dataclasses, read from YAML with overrides from the command line.

A recipe class is a dataclass whose fields are numbers, texts, paths, tuples, mappings and other such dataclasses. In a
file it is a mapping of the same names; `section.name=value` overrides one entry (docs/training.md).
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import yaml

from gakernels.errors import InputError
from gakernels.user_text import read_user_text

CONFIGS = Path(__file__).parent.parent / "configs"  # the recipes that come with the package

Recipe = TypeVar("Recipe")


def load_recipe(kind: type[Recipe], path: Path | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe of a class, from a file (`recipe_file`) and then overrides, the last of which wins.

    Args:
        kind: a dataclass.
        path: YAML file, or the name of a recipe that comes with the package; None for the defaults alone.
        overrides: `section.name=value`; the value is YAML, and a list may be written with commas alone.

    Raises:
        InputError: there is no such file, it is no YAML, a key is unknown, one that is needed is missing, or a value is
            of the wrong type or out of range.
    """
    values: dict[str, Any] = {} if path is None else _read(recipe_file(path))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise InputError(f"an override must be of the form section.name=value, but it is {override!r}")
        _put(values, key.strip().split("."), _Text(text.strip()))
    try:
        recipe: Recipe = _convert(values, kind, "")
    except InputError as error:
        keys = [override.partition("=")[0].strip() for override in overrides]
        if path is None or str(error).startswith((*keys, *(key.rpartition(".")[2] for key in keys))):
            raise
        raise InputError(f"{path}: {error}") from error
    return recipe


def recipe_file(path: Path) -> Path:
    """The file itself, or `name.yaml` of the recipes that come with the package if there is no such file.

    Raises:
        InputError: there is neither.
    """
    if path.exists() and not path.is_dir():  # a file, or what a shell makes of <(...)
        return path
    ours = CONFIGS / f"{path.name.removesuffix('.yaml')}.yaml"
    if len(path.parts) == 1 and ours.is_file():
        return ours
    names = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.yaml")))
    raise InputError(f"config: there is no file {path}, nor a recipe of that name in the package; there are {names}")


def recipe_values(recipe: Any) -> dict[str, Any]:
    """All settings of a recipe in plain YAML types, defaults included; what `load_recipe` reads back."""
    return {field.name: _plain(getattr(recipe, field.name)) for field in dataclasses.fields(recipe)}


def recipe_text(recipe: Any) -> str:
    """A recipe as YAML."""
    text: str = yaml.safe_dump(recipe_values(recipe), sort_keys=False, allow_unicode=True)
    return text


class _Text(str):
    """The value of an override, which is YAML only where no text is wanted."""


class _Loader(yaml.SafeLoader):
    """YAML, in which a key stands only once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for number, key in enumerate(keys) if key in keys[:number]), None)
        if twice is not None:
            raise InputError(f"the key {twice!r} stands twice in one section (line {node.start_mark.line + 1})")
        return super().construct_mapping(node, deep)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = read_user_text(path)
    except InputError as error:
        raise InputError(f"config: {path} is no YAML: {error}") from error
    try:
        values = yaml.load(text, _Loader)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (yaml.YAMLError, ValueError) as error:  # a ValueError is a date like 2024-13-01
        raise InputError(f"config: {path} is no YAML: {' '.join(str(error).split())}") from error
    if values is not None and not isinstance(values, dict):
        raise InputError(f"config: {path} must be a mapping of sections, but it is {_shown(values)}")
    return values or {}


def _put(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for name in path[:-1]:
        inner = values.get(name)
        values[name] = values = dict(inner) if isinstance(inner, Mapping) else {}
    values[path[-1]] = value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return recipe_values(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


# From plain values to the types that the dataclasses name


def _convert(value: Any, kind: Any, key: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _one_of(value, arguments, key)
    if dataclasses.is_dataclass(kind):
        return _section(_parsed(value), kind, key)
    if origin is tuple:
        return _items(value, arguments, key)
    if origin is not None and issubclass(origin, Mapping):
        return {name: _convert(inner, arguments[1], f"{key}.{name}") for name, inner in _mapping(value, key).items()}
    return _scalar(value, kind, key)


def _section(values: Any, kind: Any, key: str) -> Any:
    values = _mapping({} if values is None else values, key)
    known = {field.name: field for field in dataclasses.fields(kind) if field.init}
    for name in values:
        if name not in known:
            raise InputError(_unknown(_dotted(key, name), str(name), list(known)))
    given = {name: _convert(value, _hints(kind)[name], _dotted(key, name)) for name, value in values.items()}
    for name, field in known.items():
        if name not in given and field.default is field.default_factory is dataclasses.MISSING:
            # A section without a default may still be complete with the defaults of its own fields.
            if not dataclasses.is_dataclass(_hints(kind)[name]):
                raise InputError(f"{_dotted(key, name)} is needed, but it is not given")
            given[name] = _section({}, _hints(kind)[name], _dotted(key, name))
    return kind(**given)


def _unknown(key: str, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {key.removesuffix(name)}{near[0]}?" if near else f"known are {', '.join(known)}"
    return f"{key} is no setting; {hint}"


def _one_of(value: Any, kinds: tuple[Any, ...], key: str) -> Any:
    if type(None) in kinds and (value is None or (isinstance(value, _Text) and value in ("", "null", "none", "None"))):
        return None
    errors = []
    for kind in kinds:
        if kind is not type(None):
            try:
                return _convert(value, kind, key)
            except InputError as error:
                errors.append(error)
    raise errors[0]


def _items(value: Any, kinds: tuple[Any, ...], key: str) -> Any:
    """A tuple: from a list, from text with commas, or, if it is one of pairs of a name and something, a mapping."""
    if isinstance(value, _Text):
        value = [_Text(part.strip()) for part in value.split(",")] if value[:1] not in ("[", "{") else _parsed(value)
    if isinstance(value, Mapping) and typing.get_args(kinds[0])[:1] == (str,):
        inner = typing.get_args(kinds[0])[1]
        return tuple((str(name), _convert(item, inner, f"{key}.{name}")) for name, item in value.items())
    if not isinstance(value, (list, tuple)):
        raise InputError(f"{key} must be a list, but it is {_shown(value)}")
    if kinds[-1] is not Ellipsis and len(value) != len(kinds):
        raise InputError(f"{key} must have {len(kinds)} entries, but it has {len(value)}")
    wanted = kinds if kinds[-1] is not Ellipsis else (kinds[0],) * len(value)
    return tuple(_convert(item, kind, f"{key}[{n}]") for n, (item, kind) in enumerate(zip(value, wanted, strict=True)))


def _mapping(value: Any, key: str) -> Mapping[str, Any]:
    value = _parsed(value)
    if not isinstance(value, Mapping):
        raise InputError(f"{key or 'a recipe'} must be a section of settings, but it is {_shown(value)}")
    return value


def _scalar(value: Any, kind: Any, key: str) -> Any:
    if kind in (str, Path) and isinstance(value, (str, Path)):
        return kind(value)
    if kind is str and isinstance(value, date):  # YAML's own reading of 2026-01-31
        return value.isoformat()
    plain = _parsed(value)
    number = _number(plain)
    if kind is bool and isinstance(plain, bool):
        return plain
    if kind is float and number is not None:
        return float(number)
    if kind is int and number is not None and float(number).is_integer():
        return int(number)
    names = {str: "text", Path: "a path", bool: "true or false", float: "a number", int: "an integer"}
    raise InputError(f"{key} must be {names[kind]}, but it is {_shown(plain)}")


def _number(value: Any) -> int | float | None:
    """YAML reads 5e-5 as text, so texts that are numbers count as such."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    try:
        return float(value) if isinstance(value, str) else None
    except ValueError:
        return None


def _parsed(value: Any) -> Any:
    if not isinstance(value, _Text):
        return value
    try:
        return yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):
        return str(value)


def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _dotted(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def _shown(value: Any) -> str:
    names = {dict: "a section", list: "a list", type(None): "nothing"}
    return names.get(type(value)) or f"{value!r:.60}"
