"""What the tests of an extra need may be missing: then they are skipped, and all others run."""

from collections.abc import Generator

import pytest
from packaging.version import InvalidVersion
from transformers.utils import is_gguf_available

# Of the extras in pyproject.toml, by the names that they are imported by.
OPTIONAL = (
    *("accelerate", "backports", "bitsandbytes", "bm25s", "fastapi", "gguf", "httpx2", "hypothesis", "lm_eval"),
    *("matplotlib", "peft", "playwright", "prometheus_client", "pyarrow", "schemathesis", "sentence_transformers"),
    *("sklearn", "starlette", "tensorboard", "uvicorn", "wandb"),
)


def reads_gguf() -> bool:
    """Whether transformers reads GGUF files: old versions can't tell the version of an old gguf."""
    try:
        return bool(is_gguf_available())
    except InvalidVersion:
        return False


def missing_package(error: BaseException | None) -> str | None:
    """The optional package whose absence an error comes from; None for every other error."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in OPTIONAL:
            return error.name
        error = error.__cause__ or getattr(error, "cause", None)  # pytest's own error has the one of a conftest there
    return None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The failed collection of a file, or of a folder by its conftest, becomes a skip that names the package.

    This is a plugin of its own because a conftest's hooks are not asked about folders whose own conftest fails.
    """
    report = yield
    call = vars(report).get("call")
    package = missing_package(call.excinfo.value) if report.failed and call and call.excinfo else None
    if package is not None:
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: {package} is not installed")
        del report.call  # type: ignore[attr-defined]
    return report
