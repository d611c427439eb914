"""`gakernels info`."""

import _ctypes
import ctypes
import json
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from gakernels import __version__
from gakernels.ops import dispatch, gpus
from gakernels.ops.measured import calibration

OPERATIONS = (*dispatch.OPERATIONS, "delta_state")  # which has no kernels


@pytest.fixture(autouse=True)
def nothing_calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    dispatch.forget()
    yield
    dispatch.forget()


def rows(out: str) -> dict[str, list[str]]:
    """The table of operations: backend and reason by name."""
    split = [line.split(maxsplit=2) for line in out.splitlines()]
    return {parts[0]: parts[1:] for parts in split if parts and parts[0] in OPERATIONS}


def test_it_shows_versions_and_each_operation_with_its_reason(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GAKERNELS_BACKEND", raising=False)
    outcome = run("info")
    assert (outcome.code, outcome.err) == (0, "")
    for package, version in (
        ("gakernels", __version__),
        ("torch", torch.__version__),
        ("transformers", transformers.__version__),
    ):
        assert [package, version] in [line.split() for line in outcome.out.splitlines()]
    assert set(rows(outcome.out)) == set(OPERATIONS)
    for backend, reason in rows(outcome.out).values():
        assert backend == "eager"
        assert reason.startswith("default")
    assert "float32 products for a damping from 0.001 on" in outcome.out
    assert all(len(line) <= 80 for line in outcome.out.splitlines()[1:] if not line.startswith(("python", "cpu")))


@pytest.mark.parametrize("name", ["jemalloc", "tcmalloc"])
def test_it_tells_which_library_serves_malloc(run: Callable[..., Any], tmp_path: Path, name: str) -> None:
    assert f"memory        from {platform.libc_ver()[0] or 'the system'}'s malloc" in run("info").out
    library = shutil.copy(_ctypes.__file__, tmp_path / f"lib{name}.so.2")
    loaded = ctypes.CDLL(library)
    assert f"memory        from {name}" in run("info").out
    _ctypes.dlclose(loaded._handle)


def test_a_forced_backend_is_the_reason(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAKERNELS_BACKEND", "reference")
    outcome = run("info")
    assert outcome.code == 0
    assert {backend for backend, _ in rows(outcome.out).values()} == {"reference"}
    assert all(reason.startswith("forced by GAKERNELS_BACKEND") for _, reason in rows(outcome.out).values())


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("cuda", "GAKERNELS_BACKEND=cuda, but that can't run context_state here: "),
        ("fast", "GAKERNELS_BACKEND must be one of reference, eager, triton, cuda, but it is 'fast'"),
    ],
)
def test_a_backend_that_is_not_there_is_a_mistake(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, backend: str, message: str
) -> None:
    monkeypatch.setenv("GAKERNELS_BACKEND", backend)
    outcome = run("info")
    assert outcome.code == 2
    assert outcome.err.startswith(f"gakernels info: {message}")
    assert outcome.err.count("\n") == 1


GPU = ("--gpu", "NVIDIA H100 80GB HBM3")


def test_a_gpu_that_is_not_here(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GAKERNELS_BACKEND", raising=False)
    outcome = run("info", *GPU)
    assert (outcome.code, outcome.err) == (0, "")
    assert "calibration   none for NVIDIA H100 80GB HBM3" in outcome.out
    chosen = {name: backend for name, (backend, _) in rows(outcome.out).items()}
    assert (chosen["context_state"], chosen["lowrank_linear"]) == ("triton", "triton")
    assert chosen["low_rank_polar"] in ("cuda", "triton")  # by what is built here


def test_the_calls_of_a_model(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GAKERNELS_BACKEND", raising=False)
    outcome = run("info", "--model", "mistral-7b", *GPU, "--set", "windows.batch_size=1")
    assert (outcome.code, outcome.err) == (0, "")
    text = " ".join(outcome.out.split())
    assert text.startswith(
        "mistral-7b on NVIDIA H100 80GB HBM3: o_proj, down_proj, d_r 1024, r 128, chunks of 1024 tokens"
    )
    assert "training, 1 segment of 8 chunks at once" in text
    assert (
        "lowrank_linear bfloat16: batch 15, tokens 1024, in 4096, out 4096, rank 128, with backward triton default on "
        "compute capability 9.0 (measured on NVIDIA H200); about 89% of the GEMM rate forward"
    ) in text
    assert "(not measured in float32); share of the GEMM rate: not measured" in text
    assert "decoding, 64 users" in text
    assert "tiles of the kernel hold 2% tokens at M=1" in text
    assert max(map(len, outcome.out.splitlines())) <= 80


def test_the_calls_of_a_recipe_and_of_a_folder(run: Callable[..., Any], files: Any) -> None:
    outcome = run("info", "--config", "llama2-7b-pretraining", *GPU)
    assert outcome.code == 0
    assert "tokens 1024, hidden 4096, state 1024" in outcome.out
    sizes = ["--set", "generator.state_size=16", "--set", "generator.rank=4", "--set", "generator.chunk_size=8"]
    outcome = run("info", "--model", files.base, *sizes)
    assert outcome.code == 0
    assert " on the CPU: " in " ".join(outcome.out.split())
    assert "default on cpu" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "Voodoo"], "gpu must be the name of a known GPU"),
        (["--model", "no/such/model/here"], "--model must be a folder or hub name of a model, or one of smollm2-135m"),
        (["--config", "nothing"], "config: there is no file nothing"),
        (["--model", "mistral-7b", "--set", "generator.rang=3"], "did you mean generator.rank?"),
        (["--model", "mistral-7b", "--set", "generator.linears=x_proj"], "x_proj"),
    ],
)
def test_mistakes(refused: Callable[..., str], arguments: list[str], message: str) -> None:
    assert message in refused("info", *arguments)


def test_it_tells_of_a_calibration(run: Callable[..., Any]) -> None:
    gpu = gpus.known(GPU[1])
    path = calibration.path_of(gpu)
    path.parent.mkdir(parents=True)
    record = {
        "kind": calibration.KIND,
        "gpu": gpu.name,
        "versions": calibration.versions(),
        "date": "2026-11-27T00:00Z",
    }
    record |= {"checks": {"context_state.triton": "wrong"}, "rows": [], "gemm_flops": {}, "copy_bytes": 1.0}
    path.write_text(json.dumps(record))
    dispatch.forget()
    out = run("info", *GPU).out
    assert "calibration   of 2026-11-27: 0 calls; WRONG and off: context_state.triton" in out
    assert rows(out)["context_state"][0] == "eager"
    path.write_text(json.dumps({**record, "versions": {"torch": "0.1"}}))
    dispatch.forget()
    out = run("info", *GPU).out
    assert "calibration   not used: it was made with torch 0.1; run `gakernels calibrate`" in out
    assert rows(out)["context_state"][0] == "triton"
