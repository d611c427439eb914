"""Serving on this machine: many users in one batch compared with one by one, and a server under load on loopback.

    python -m benchmarks.serving --users 64 --contexts 50 --requests 200 --at-once 32

The two ways of decoding are measured in turns within one process, each by the same engine, so that other work of the
machine affects both; the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from random import Random

import httpx2
import torch

from benchmarks.measure import percentile
from gakernels import CompactAdapter, GenerativeAdapter
from gakernels.data.people import draw_document
from gakernels.generation import Sampling, generate

NEW_TOKENS = 8


@dataclass(frozen=True)
class Question:
    """A context's text, and a prompt about it."""

    text: str
    prompt: str


@dataclass
class Load:
    """The answers of a load test.

    Attributes:
        answers: pairs of the number of a context and the text.
        milliseconds: latency of each request.
        errors: answers that are not a success.
        seconds: from the first request to the last answer.
    """

    answers: list[tuple[int, str]] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    seconds: float = 0.0


def answers(model: GenerativeAdapter, adapters: Sequence[CompactAdapter], questions: Sequence[Question]) -> list[str]:
    """The answer of each context to its question, one by one."""
    return [
        generate(model, [question.prompt], [adapter], Sampling(NEW_TOKENS))[0].text
        for adapter, question in zip(adapters, questions, strict=True)
    ]


async def run_load(url: str, questions: Sequence[Question], requests: int, at_once: int) -> Load:
    """Create a context from each text, then send `requests` questions, `at_once` at a time, to the contexts in turn."""
    load, gate = Load(), asyncio.Semaphore(at_once)
    async with httpx2.AsyncClient(base_url=url, timeout=300, trust_env=False) as client:

        async def create(question: Question) -> str:
            async with gate:
                response = await client.post("/v1/contexts", json={"text": question.text})
            response.raise_for_status()
            return str(response.json()["id"])

        async def ask(number: int) -> None:
            user = number % len(names)
            body = {"model": names[user], "prompt": questions[user].prompt, "temperature": 0, "max_tokens": NEW_TOKENS}
            async with gate:
                started = time.perf_counter()
                response = await client.post("/v1/completions", json=body)
                load.milliseconds.append(1e3 * (time.perf_counter() - started))
            if response.status_code == 200:
                load.answers.append((user, response.json()["choices"][0]["text"]))
            else:
                load.errors.append(response.text)

        names = await asyncio.gather(*[create(question) for question in questions])
        started = time.perf_counter()
        await asyncio.gather(*[ask(number) for number in range(requests)])
        load.seconds = time.perf_counter() - started
    return load


def drawn(model: GenerativeAdapter, count: int, seed: int) -> tuple[list[Question], list[CompactAdapter]]:
    """Invented people, a question about each, and their adapters."""
    random, questions, adapters = Random(seed), [], []
    for _ in range(count):
        document = draw_document(random, split="test")
        questions.append(Question(document.text(), random.choice(document.questions())[0]))
        adapters.append(model.stream().append(document.text()).compact())
    return questions, adapters


def batch_against_one_by_one(
    model: GenerativeAdapter, users: int, new_tokens: int, repetitions: int, seed: int
) -> tuple[float, float]:
    """Median seconds to generate so many tokens for so many users: in one batch, and one by one."""
    questions, adapters = drawn(model, users, seed)
    prompts, how = [question.prompt for question in questions], Sampling(new_tokens, stop_at_end_token=False)
    together, alone = [], []
    for repetition in range(repetitions + 1):
        started = time.perf_counter()
        generate(model, prompts, adapters, how, max_rows=users)
        middle = time.perf_counter()
        for prompt, adapter in zip(prompts, adapters, strict=True):
            generate(model, [prompt], [adapter], how)
        if repetition:  # the first is a warm-up
            together.append(middle - started)
            alone.append(time.perf_counter() - middle)
    return statistics.median(together), statistics.median(alone)


async def under_load(model: GenerativeAdapter, contexts: int, requests: int, at_once: int, seed: int) -> Load:
    """A server on loopback in this process, and clients in the same event loop."""
    from gakernels.server.server import serve
    from gakernels.server.settings import Settings

    questions, adapters = drawn(model, contexts, seed)
    expected = answers(model, adapters, questions)
    url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(Path(folder), "demo", threads=1)
        stop = asyncio.Event()
        server = asyncio.create_task(serve(model, settings, "127.0.0.1", 0, url.set_result, stop))
        load = await run_load(await url, questions, requests, at_once)
        stop.set()
        await server
    load.errors += [f"wrong answer {text!r} of context {user}" for user, text in load.answers if text != expected[user]]
    return load


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Serving on this machine, with the models of the package.")
    parser.add_argument("--users", type=int, default=64, help="in one batch (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, help="of each user (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--contexts", type=int, default=50, help="on the server (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=200, help="to the server (default: %(default)s)")
    parser.add_argument("--at-once", type=int, default=32, help="requests in flight (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = GenerativeAdapter.from_pretrained(str(files("gakernels.demo") / "assets" / "generator")).eval()
    together, alone = batch_against_one_by_one(
        model, options.users, options.new_tokens, options.repetitions, options.seed
    )
    tokens = options.users * options.new_tokens
    print(
        f"{options.users} users, {options.new_tokens} tokens each: {tokens / together:.0f} tokens/s in one batch, "
        f"{tokens / alone:.0f} one by one, ratio {alone / together:.1f}"
    )
    load = asyncio.run(under_load(model, options.contexts, options.requests, options.at_once, options.seed))
    times = load.milliseconds
    print(
        f"server, {options.requests} requests, {options.at_once} at a time, {options.contexts} contexts: "
        f"{len(load.errors)} errors or wrong answers, p50 {percentile(times, 50):.0f} ms, "
        f"p95 {percentile(times, 95):.0f} ms, {options.requests / load.seconds:.0f} requests/s"
    )


if __name__ == "__main__":
    main()
