"""Fresh random inputs in each run. A failing test reports its seed; GAKERNELS_TEST_SEED repeats it."""

import os
import zlib

import pytest
import torch

torch.set_num_threads(1)  # the test processes share the cores; threads of tiny matrices only wait for each other

SEED_VARIABLE = "GAKERNELS_TEST_SEED"
SEED = int(os.environ.get(SEED_VARIABLE) or int.from_bytes(os.urandom(4), "big"))


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """A generator of this test's own, so that a test draws the same numbers alone and in the whole suite."""
    request.node.add_report_section("setup", "seed", f"repeat with {SEED_VARIABLE}={SEED}")
    return torch.Generator().manual_seed(SEED ^ zlib.crc32(request.node.name.encode()))
