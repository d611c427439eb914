"""The time that chat templates show (`strftime_now`): one moment for a whole run, however long it is and resumed."""

import json
import re
from datetime import datetime

from gakernels.errors import InputError

_FUNCTION = "strftime_now"
_DIRECTIVE = re.compile(r"%[-_0^#]*[A-Za-z]")


def shows_time(template: str) -> bool:
    """Whether a chat template asks what time it is."""
    return _FUNCTION in template


def parse_clock(text: str) -> datetime:
    """The moment that a recipe names. Raises: InputError: it is none."""
    try:
        return datetime.fromisoformat(text)
    except ValueError as error:
        raise InputError(f"clock must be a time like 2026-01-31T12:00:00, but it is {text!r}") from error


def at_time(template: str, clock: datetime) -> str:
    """A chat template in which `strftime_now` tells a given moment.

    The renderer takes no functions from outside, so the template gets a macro of that name in front. It writes every
    directive that stands in the template.
    """
    if not shows_time(template):
        return template
    directives = sorted(set(_DIRECTIVE.findall(template)), key=len, reverse=True)
    written = "".join(f" | replace({json.dumps(d)}, {json.dumps(clock.strftime(d))})" for d in directives)
    # The line end behind a block is dropped, so the template begins as it would without the macro.
    return f"{{% macro {_FUNCTION}(format) %}}{{{{ format{written} }}}}{{% endmacro %}}\n{template}"
