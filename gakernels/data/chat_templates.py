"""The chat template of a tokenizer, which may have several under names of their own."""

from transformers import PreTrainedTokenizerBase

from gakernels.errors import InputError

_DEFAULT = "default"


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer's Jinja template of a conversation, of several the one named `default`; None: it has none.

    Raises:
        InputError: it has several, and none of that name.
    """
    given = tokenizer.chat_template
    if isinstance(given, (list, tuple)):
        given = {entry["name"]: entry["template"] for entry in given}
    if not given or isinstance(given, str):
        return given or None
    if _DEFAULT not in given:
        raise InputError(
            f"the tokenizer's chat templates must have one named {_DEFAULT!r}, but they are {', '.join(sorted(given))}"
        )
    return str(given[_DEFAULT])
