"""Who is let in."""

import hmac
from pathlib import Path

import pytest

from gakernels import InputError
from gakernels.server.settings import ANYONE, ApiKeys

FIRST, SECOND = "first-key-of-16-characters", "second-key-of-16-characters"


def test_each_key_is_a_user_of_its_own() -> None:
    keys = ApiKeys([FIRST, SECOND])
    assert keys.owner(FIRST) != keys.owner(SECOND)
    assert keys.owner(FIRST) == ApiKeys([SECOND, FIRST]).owner(FIRST)  # also after a restart, in another order
    assert FIRST not in str(keys.owner(FIRST))


@pytest.mark.parametrize("key", [None, "", " ", FIRST[:-1], FIRST + " ", FIRST.upper(), "\udcff", "ä" * 20])
def test_others_are_not_let_in(key: str | None) -> None:
    assert ApiKeys([FIRST]).owner(key) is None


def test_without_keys_everybody_is_the_same_user() -> None:
    assert ApiKeys().owner(None) == ApiKeys().owner("anything") == ANYONE


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda one, other: calls.append(1) or compare(one, other))
    keys = ApiKeys([FIRST, SECOND])
    for given in (FIRST, SECOND, "neither", None):
        calls.clear()
        keys.owner(given)
        assert len(calls) == 2


def test_a_file_has_a_key_a_line(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# users\n\n  {FIRST}\n{SECOND}\n")
    keys = ApiKeys.read(path)
    assert None not in (keys.owner(FIRST), keys.owner(SECOND))
    assert keys.owner("# users") is None


@pytest.mark.parametrize("text", ["", "# none\n", "short\n", "with a space in the middle\n"])
def test_wrong_files_are_refused_and_the_message_shows_no_key(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        ApiKeys.read(path)
    assert "middle" not in str(error.value)
    with pytest.raises(InputError, match="there is no file"):
        ApiKeys.read(tmp_path / "nowhere")
