"""`gakernels serve`: its options, and that it starts, answers and ends."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--engine", "vllm"], "--url"),
        (["--url", "http://127.0.0.1:1"], "--engine"),
        (["--max-rows", "0"], "rows must be at least 1"),
        (["--cache-disk", "-1"], "--cache-disk"),
        (["--threads", "0"], "--threads"),
        (["--host", "0.0.0.0"], "--api-keys"),
        (["--host", "example.org"], "--api-keys"),
        (["--api-keys", "nowhere.txt"], "nowhere.txt"),
        (["--cors-origin", "https://app.example.org/"], "--cors-origin"),
        (["--cors-origin", "app.example.org"], "--cors-origin"),
        (["--chat-template", "nowhere.txt"], "nowhere.txt"),
        (["--generator", "nowhere"], "nowhere"),
        (["--port", "http"], "--port"),
        ([], "--folder"),
    ],
)
def test_mistakes_are_told_in_a_line(run: Callable[..., Any], tmp_path: Path, options: list[str], word: str) -> None:
    folder = ["--folder", tmp_path / "data"] if options else []
    outcome = run("serve", *folder, *options)
    assert outcome.code == 2
    assert word in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "data").exists()


def test_it_serves_a_generator_of_ones_own_until_it_is_interrupted(files: Any, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a-key-of-16-characters\n")
    template = tmp_path / "template"
    template.write_text("{% for message in messages %}{{ message.content }} {% endfor %}")
    options = ["--folder", tmp_path / "data", "--port", 0, "--api-keys", keys, "--name", "mine", "--threads", 1]
    command = [sys.executable, "-m", "gakernels", "serve", *files.model, *options, "--chat-template", template]
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A job in the background of a shell ignores interrupts, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("serving on http://127.0.0.1:"), process.stderr.read()
        url, headers = line.split()[-1], {"Authorization": "Bearer a-key-of-16-characters"}
        with httpx2.Client(base_url=url, headers=headers, trust_env=False, timeout=60) as client:
            assert client.get("/health").json()["model"] == "mine"
            name = client.post("/v1/contexts", json={"text": "w3 w4 w5"}).json()["id"]
            messages = [{"role": "user", "content": "w3 w9"}]
            answer = client.post("/v1/chat/completions", json={"model": name, "messages": messages, "max_tokens": 3})
            assert answer.json()["usage"]["prompt_tokens"] == 2
            assert client.get("/v1/models", headers={"Authorization": "Bearer other"}).status_code == 401
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, out) == (130, "")
    assert err == "gakernels serve: interrupted\n"
