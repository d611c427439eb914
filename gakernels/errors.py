"""The errors that a user's input can cause. The command line shows them as one line, without a traceback."""


class InputError(ValueError):
    """An argument, option or input file is wrong. The message names it, what was expected, and what was given."""


class FormatError(InputError):
    """A file of this library is damaged, of an unknown version, or belongs to another model or generator."""


class BackendError(RuntimeError):
    """The implementation that `GAKERNELS_BACKEND` selects can't run here."""


def first_line(error: BaseException) -> str:
    """Another library's error message, shortened to fit into one of our lines."""
    text = repr(error) if isinstance(error, KeyError) else str(error).strip()
    return next(iter(text.splitlines()), type(error).__name__)
