"""Clients of OpenAI's interface, as their documentation has them used, against a server on the loopback interface.

The clients are in the extra `clients`. Without them, requests that they have sent are sent again.
"""

import asyncio
import json
import math
import random
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx2
import pytest
from demo_users import User
from loopback import served

from gakernels import GenerativeAdapter
from gakernels.data.people import draw_document

REQUESTS = json.loads(Path(__file__).with_name("client_requests.json").read_text())
KEY = "any-key-of-16-characters"
MISSING = "{} is not installed: pip install gakernels[clients]"


@pytest.fixture(scope="module")
def demo() -> GenerativeAdapter:
    return GenerativeAdapter.from_pretrained(str(files("gakernels.demo") / "assets" / "generator")).eval()


@pytest.fixture(scope="module")
def url(demo: GenerativeAdapter, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(demo, tmp_path_factory.mktemp("server") / "data") as address:
        yield f"{address}/v1"


@pytest.fixture
def user(demo: GenerativeAdapter) -> User:
    document = draw_document(random.Random(), 1, (15, 18), "test")
    question, answer = random.choice(document.questions())
    bare = question.removeprefix("Question: ").removesuffix(" Answer:")
    return User(document, demo.stream().append(document.text()).compact(), bare, answer)


@pytest.fixture
def openai(url: str) -> Any:
    package = pytest.importorskip("openai", reason=MISSING.format("openai"))
    return package.OpenAI(base_url=url, api_key=KEY, max_retries=0)


@pytest.fixture
def context(openai: Any, user: User) -> str:
    """The id of a context with the user's document, made by the official client's own means."""
    return str(openai.post("/contexts", body={"text": user.document.text()}, cast_to=object)["id"])


def turns(user: User) -> list[dict[str, str]]:
    return [{"role": "user", "content": user.question}]


# Requests that were recorded


@pytest.mark.parametrize("name", REQUESTS)
def test_recorded_requests_are_answered(url: str, name: str) -> None:
    path, body = REQUESTS[name]
    response = httpx2.post(url.removesuffix("/v1") + path, json=body, timeout=60)
    assert response.status_code == 200, response.text
    if not body.get("stream"):
        assert len(response.json()["choices"]) >= body.get("n", 1)
        return
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    assert any(json.loads(line)["choices"][0]["finish_reason"] for line in lines if json.loads(line)["choices"])


# The official client


def test_the_official_client_chats(openai: Any, user: User, context: str) -> None:
    plain = openai.chat.completions.create(model=context, messages=turns(user), temperature=0, stop=".")
    assert plain.choices[0].message.content == f" {user.answer}"
    assert plain.choices[0].finish_reason == "stop"
    everything = openai.chat.completions.create(
        model=context,
        messages=[{"role": "developer", "content": ""}, *turns(user)],
        temperature=0,
        stop=["."],
        n=2,
        logprobs=True,
        top_logprobs=2,
        seed=1,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        logit_bias={},
        store=False,
        metadata={},
        service_tier="auto",
        reasoning_effort="low",
        response_format={"type": "text"},
        max_completion_tokens=9,
    )
    assert [choice.index for choice in everything.choices] == [0, 1]
    entries = everything.choices[1].logprobs.content
    assert len(entries[0].top_logprobs) == 2
    assert all(0 < math.exp(entry.logprob) <= 1 for entry in entries)
    with openai.chat.completions.create(
        model=context,
        messages=turns(user),
        temperature=0,
        stop=".",
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == f" {user.answer}"
    assert chunks[-1].usage.total_tokens > 0
    echoed = [*turns(user), plain.choices[0].message, *turns(user)]
    assert openai.chat.completions.create(model=context, messages=echoed, max_tokens=1).choices


def test_the_official_client_completes_and_lists(openai: Any, user: User, context: str) -> None:
    prompt = f"Question: {user.question} Answer:"
    answer = openai.completions.create(
        model=context, prompt=prompt, temperature=0, logprobs=2, echo=True, max_tokens=8, stop=".", best_of=1
    )
    assert answer.choices[0].text == f"{prompt} {user.answer}"
    assert answer.choices[0].logprobs.token_logprobs[0] is None
    assert {model.id for model in openai.models.list()} > {"demo", context}
    assert openai.models.retrieve(context).id == context


def test_the_official_client_brings_its_context(openai: Any, user: User) -> None:
    for cached in (False, True):
        answer = openai.chat.completions.create(
            model="demo",
            messages=turns(user),
            temperature=0,
            stop=".",
            extra_body={"context": user.document.text()},
        )
        assert answer.choices[0].message.content == f" {user.answer}"
        assert answer.usage.context_tokens == user.adapter.tokens_seen
        assert answer.usage.context_cached is cached


def test_the_official_client_tells_refusals_apart(openai: Any, user: User) -> None:
    package = pytest.importorskip("openai")
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    with pytest.raises(package.BadRequestError, match="no tools") as caught:
        openai.chat.completions.create(model="demo", messages=turns(user), tools=[tool])
    assert caught.value.param == "tools"
    with pytest.raises(package.NotFoundError, match="no POST /v1/embeddings"):
        openai.embeddings.create(model="demo", input="text")
    with pytest.raises(package.NotFoundError, match="no POST /v1/responses"):
        openai.responses.create(model="demo", input="text")
    with pytest.raises(package.NotFoundError, match="nobody"):
        openai.chat.completions.create(model="nobody", messages=turns(user))


def test_the_official_client_works_asynchronously(openai: Any, url: str, user: User, context: str) -> None:
    package = pytest.importorskip("openai")

    async def ask() -> str:
        async with package.AsyncOpenAI(base_url=url, api_key=KEY) as client:
            stream = await client.chat.completions.create(
                model=context, messages=turns(user), temperature=0, stop=".", stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(ask()) == f" {user.answer}"


# LangChain


def test_langchain_works(openai: Any, url: str, user: User, context: str) -> None:
    package = pytest.importorskip("langchain_openai", reason=MISSING.format("langchain-openai"))
    chat = package.ChatOpenAI(model=context, base_url=url, api_key=KEY, temperature=0, stop_sequences=["."])
    answer = chat.invoke([("human", user.question)])
    assert answer.content == f" {user.answer}"
    assert answer.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in chat.stream(user.question)) == f" {user.answer}"
    scored = chat.bind(logprobs=True, top_logprobs=2).invoke(user.question)
    assert scored.response_metadata["logprobs"]["content"]
    own = package.ChatOpenAI(
        model="demo", base_url=url, api_key=KEY, temperature=0, extra_body={"context": user.document.text()}, stop=["."]
    )
    assert own.invoke(user.question).content == f" {user.answer}"
    human = pytest.importorskip("langchain_core.messages").HumanMessage(user.question)
    several = chat.generate([[human]], n=2)
    assert [one.text for one in several.generations[0]] == [f" {user.answer}"] * 2
    text = package.OpenAI(model=context, base_url=url, api_key=KEY, temperature=0, max_tokens=9)
    prompt = f"Question: {user.question} Answer:"
    assert text.invoke(prompt, stop=["."]) == f" {user.answer}"


# LlamaIndex


def test_llama_index_works(openai: Any, url: str, user: User, context: str) -> None:
    like = pytest.importorskip("llama_index.llms.openai_like", reason=MISSING.format("llama-index-llms-openai-like"))
    messages = pytest.importorskip("llama_index.core.llms")
    options = {"api_base": url, "api_key": KEY, "temperature": 0.0, "max_tokens": 9}
    chat = like.OpenAILike(model=context, is_chat_model=True, additional_kwargs={"stop": ["."]}, **options)
    turn = messages.ChatMessage(role="user", content=user.question)
    assert chat.chat([turn]).message.content == f" {user.answer}"
    assert [piece.message.content for piece in chat.stream_chat([turn])][-1] == f" {user.answer}"
    assert chat.complete(user.question).text == f" {user.answer}"
    own = {"extra_body": {"context": user.document.text()}, "stop": ["."]}
    brought = like.OpenAILike(model="demo", is_chat_model=True, additional_kwargs=own, **options)
    assert brought.chat([turn]).message.content == f" {user.answer}"
    text = like.OpenAILike(model=context, is_chat_model=False, additional_kwargs={"stop": ["."]}, **options)
    prompt = f"Question: {user.question} Answer:"
    assert text.complete(prompt).text == f" {user.answer}"
    assert [piece.text for piece in text.stream_complete(prompt)][-1] == f" {user.answer}"
