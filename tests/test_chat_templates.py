"""Tokenizers with several named chat templates, wherever a template is used."""

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from invented import make_tokenizer
from starlette.testclient import TestClient
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gakernels import GenerativeAdapter, InputError
from gakernels.data.chat import PLAIN_TEMPLATE, ChatEncoder, chat_template
from gakernels.data.conversations import Message
from gakernels.evaluation.prompts import Asker
from gakernels.server.server import assemble, create_app
from gakernels.server.settings import Settings

WANTED = "{{ bos_token }}{% for m in messages %}w10 {{ m.content }} w11{% endfor %}"
OTHER = "{% for m in messages %}w20 {{ m.content }}{% endfor %}"
TURNS = [Message("user", "w3 w4")]


def as_list(templates: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "template": template} for name, template in templates.items()]


def with_template(template: Any) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("form", [dict, as_list])
@pytest.mark.parametrize("others", [{}, {"tool_use": OTHER}, {"rag": OTHER, "a": OTHER}])
def test_the_default_one_counts(form: Callable[[dict[str, str]], Any], others: dict[str, str]) -> None:
    named, plain = with_template(form({**others, "default": WANTED})), with_template(WANTED)
    assert chat_template(named) == chat_template(plain) == WANTED
    assert ChatEncoder(named).prompt(TURNS) == ChatEncoder(plain).prompt(TURNS) == [1, 10, 3, 4, 11]
    assert Asker(named, chat=True).question("w3 w4") == Asker(plain, chat=True).question("w3 w4")


@pytest.mark.parametrize("form", [dict, as_list])
def test_without_a_default_the_names_are_told(form: Callable[[dict[str, str]], Any]) -> None:
    tokenizer = with_template(form({"tool_use": WANTED, "rag": OTHER}))
    for use in (chat_template, ChatEncoder, lambda tokenizer: Asker(tokenizer, chat=True)):
        with pytest.raises(InputError, match="'default', but they are rag, tool_use"):
            use(tokenizer)


@pytest.mark.parametrize("nothing", [None, "", {}, []])
def test_there_may_be_none(nothing: Any) -> None:
    tokenizer = with_template(nothing)
    assert chat_template(tokenizer) is None
    assert ChatEncoder(tokenizer).prompt(TURNS) == ChatEncoder(with_template(PLAIN_TEMPLATE)).prompt(TURNS)


def test_a_saved_tokenizer_with_several(tmp_path: Path) -> None:
    with_template({"default": WANTED, "tool_use": OTHER}).save_pretrained(tmp_path)
    assert chat_template(AutoTokenizer.from_pretrained(tmp_path)) == WANTED


@pytest.mark.parametrize("form", [dict, as_list])
def test_the_server(form: Callable[[dict[str, str]], Any], tmp_path: Path) -> None:
    demo = GenerativeAdapter.from_pretrained(str(files("gakernels.demo") / "assets" / "generator")).eval()
    body = {"model": "demo", "messages": [{"role": "user", "content": "pet"}], "max_tokens": 1}

    def answer(templates: dict[str, str], given: str | None = None) -> Any:
        demo.tokenizer.chat_template = form(templates)
        settings = Settings(tmp_path / "data", "demo", threads=1, chat_template=given)
        with TestClient(create_app(assemble(demo, settings))) as client:
            assert client.post("/v1/completions", json={"model": "demo", "prompt": "The"}).status_code == 200
            return client.post("/v1/chat/completions", json=body)

    short, long = "{{ messages[0].content }}", "The The The {{ messages[0].content }}"
    chosen = answer({"tool_use": short, "default": long})
    assert chosen.json()["usage"]["prompt_tokens"] == 4
    refused = answer({"tool_use": short, "rag": long})
    assert refused.status_code == 400
    message = refused.json()["error"]["message"]
    assert "rag, tool_use" in message
    assert "--chat-template" in message
    assert answer({"tool_use": long, "rag": long}, short).json()["usage"]["prompt_tokens"] == 1
