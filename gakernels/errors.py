"""The errors that a user's input can cause. The command line shows them as one line, without a traceback."""

from collections.abc import Collection


class InputError(ValueError):
    """An argument, option or input file is wrong. The message names it, what was expected, and what was given."""


class FormatError(InputError):
    """A file of this library is damaged, of an unknown version, or belongs to another model or generator."""


class BackendError(RuntimeError):
    """The implementation that `GAKERNELS_BACKEND` selects can't run here."""


def check_known(name: str, value: str, known: Collection[str]) -> None:
    """Raises: InputError: the value is none of those that are known."""
    if value not in known:
        raise InputError(f"{name} must be one of {', '.join(known)}, but it is {value!r}")


def check_least(least: int, **values: int | None) -> None:
    """Raises: InputError: one of the values is below `least`; None is not."""
    for name, value in values.items():
        if value is not None and value < least:
            raise InputError(f"{name} must be at least {least}, but it is {value}")


def first_line(error: BaseException) -> str:
    """Another library's error message, shortened to fit into one of our lines."""
    text = repr(error) if isinstance(error, KeyError) else str(error).strip()
    return next(iter(text.splitlines()), type(error).__name__)
