"""Settings classes that validate themselves: pydantic dataclasses whose errors are one line in plain words."""

import dataclasses
import difflib
import functools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_origin

from pydantic import AfterValidator, AllowInfNan, BeforeValidator, ConfigDict, Field, Strict, ValidationError
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo
from typing_extensions import dataclass_transform

from gakernels.errors import InputError
from gakernels.paths import expanded, user_path

Class = TypeVar("Class")
Place = tuple[str | int, ...]


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def settings(cls: type[Class]) -> type[Class]:
    """Make a class a frozen dataclass whose values are checked and converted according to the types of its fields.

    Nested sections, which are such classes too, may be given as mappings. Invalid values raise an `InputError`.
    """
    made: Any = dataclass(frozen=True, config=ConfigDict(extra="forbid"))(cls)
    plain = made.__init__

    @functools.wraps(plain)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            plain(self, *args, **kwargs)
        except ValidationError as error:
            raise as_input_error(made, error) from None

    made.__init__ = checked
    return made


# Field types. Strings that are numbers count as numbers, since YAML reads 5e-5 as a string.


def _number(value: object) -> object:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _whole(value: object) -> object:
    number = _number(value)
    return int(number) if isinstance(number, float) and number.is_integer() else value


def _pairs(value: object) -> object:
    if isinstance(value, Sequence) and all(isinstance(pair, Sequence) and len(pair) == 2 for pair in value):
        return dict(value)
    return value


def one_of(known: Collection[str]) -> AfterValidator:
    """A validator that a string is one of these."""

    def check(value: str) -> str:
        if value not in known:
            raise ValueError(f"must be one of {', '.join(known)}, but it is {shown(value)}")
        return value

    return AfterValidator(check)


Flag = Annotated[bool, Strict()]
Int = Annotated[int, BeforeValidator(_whole), Strict()]
Count = Annotated[Int, Field(ge=1)]
AtLeastZero = Annotated[Int, Field(ge=0)]
AtLeastTwo = Annotated[Int, Field(ge=2)]
Seed = Annotated[Int, Field(ge=0, le=2**32 - 1)]
Number = Annotated[float, BeforeValidator(_number), Strict()]
Finite = Annotated[Number, AllowInfNan(False)]
Positive = Annotated[Finite, Field(gt=0)]
Weight = Annotated[Finite, Field(ge=0)]
PathText = Annotated[str, AfterValidator(expanded)]  # `~` becomes the home folder
UserPath = Annotated[Path, BeforeValidator(lambda value: user_path(value) if isinstance(value, str) else value)]
if TYPE_CHECKING:
    Weights = tuple[tuple[str, float], ...]
else:  # (name, weight) pairs, which may also be given as a mapping
    Weights = Annotated[dict[str, Weight], BeforeValidator(_pairs), AfterValidator(lambda found: tuple(found.items()))]


# Error messages

_WANTED = {
    "bool_type": "true or false",
    "dataclass_type": "a section of settings",
    "dict_type": "a section of settings",
    "float_type": "a number",
    "int_type": "an integer",
    "path_type": "a path",
    "string_type": "text",
    "tuple_type": "a list",
}
_UNKNOWN, _MISSING = ("unexpected_keyword_argument", "invalid_key"), "missing"
_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def as_input_error(kind: Any, error: ValidationError) -> InputError:
    """The first error: preferably an unknown name, then an invalid value, then a missing setting."""
    faults: list[Any] = error.errors(include_url=False)
    first = min(faults, key=lambda fault: (fault["type"] not in _UNKNOWN, fault["type"] == _MISSING))
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        return cause
    place: Place = first["loc"]
    if first["type"] in _UNKNOWN:
        return InputError(_unknown(kind, place))
    if first["type"] == _MISSING and isinstance(place[-1], str):
        return InputError(f"{dotted(place)} is needed, but it is not given")
    if first["type"] == _MISSING:
        place, given = place[:-1], first["input"]
        wanted = 1 + max(fault["loc"][-1] for fault in faults if fault["loc"][:-1] == place)
        return InputError(f"{dotted(place)} must have {wanted} entries, but it has {len(given)}")
    return InputError(f"{dotted(place)} {_complaint(kind, first)}")


def dotted(place: Place) -> str:
    """A place in the notation of setting names: `section.name[0]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")


def shown(value: object) -> str:
    """A value, shortened for a message."""
    names = {dict: "a section", list: "a list", type(None): "nothing"}
    return names.get(type(value)) or f"{value!r:.60}"


def _complaint(kind: Any, fault: Any) -> str:
    details = fault.get("ctx", {})
    if "error" in details:
        return str(details["error"])
    if fault["type"] == "too_long":
        return f"must have {details['max_length']} entries, but it has {details['actual_length']}"
    if fault["type"] == "too_short":
        return f"must have at least {details['min_length']} entry, but it has {details['actual_length']}"
    if fault["type"] == "literal_error":
        wanted = "one of " + ", ".join(re.findall("'(.*?)'", details["expected"]))
    elif fault["type"] == "finite_number" or _BOUNDS.keys() & details.keys():
        wanted = _range(_at(kind, fault["loc"])[1])
    elif fault["type"] in _WANTED:
        wanted = _WANTED[fault["type"]]
    else:
        return f"can't be {shown(fault['input'])}: {fault['msg']}"
    return f"must be {wanted}, but it is {shown(fault['input'])}"


def _unknown(kind: Any, place: Place) -> str:
    name, known = str(place[-1]), list(_at(kind, place[:-1])[0].__pydantic_fields__)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {dotted((*place[:-1], near[0]))}?" if near else f"known are {', '.join(known)}"
    return f"{dotted((*place[:-1], name))} is not a setting; {hint}"


def _at(kind: Any, place: Place) -> tuple[Any, FieldInfo | None]:
    """The settings class at a place, and the field that leads to it."""
    info, parts = None, iter(place)
    for part in parts:
        info = kind.__pydantic_fields__[part]
        if isinstance(get_origin(info.annotation), type) and issubclass(get_origin(info.annotation), Mapping):
            next(parts, None)  # a name that the user chose
        inner = next((hint for hint in _hints(info.annotation) if hasattr(hint, "__pydantic_fields__")), None)
        if inner is None:
            break
        kind = inner
    return kind, info


def _hints(hint: Any) -> Iterator[Any]:
    """A type and all types nested in it."""
    yield hint
    for inner in get_args(hint):
        yield from _hints(inner)


def _range(info: FieldInfo | None) -> str:
    """The range of numbers that a field accepts, in words."""
    marks = list(_marks(info))
    words = ["finite"] if any(isinstance(mark, AllowInfNan) for mark in marks) else []
    bounds = {name: getattr(mark, name) for mark in marks for name in _BOUNDS if hasattr(mark, name)}
    if bounds.keys() == {"ge", "le"}:
        return f"between {bounds['ge']} and {bounds['le']}"
    return " and ".join([*words, *(f"{_BOUNDS[name]} {bound}" for name, bound in bounds.items())])


def _marks(hint: Any) -> Iterator[Any]:
    """All annotation metadata apart from the types."""
    for mark in getattr(hint, "metadata", ()):
        yield from _marks(mark)
        yield mark
    for inner in _hints(getattr(hint, "annotation", None)):
        for mark in getattr(inner, "__metadata__", ()):
            yield from _marks(mark)
            yield mark
