"""The program that compute-sanitizer watches runs every kernel there is."""

import pytest
import torch

from benchmarks import one_of_each


@pytest.mark.kernels
def test_every_operation_has_a_kernel_that_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert one_of_each.main(["--device", device]) == 0
    done = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.endswith("triton: done")}
    assert done == {"context_state", "low_rank_polar", "lowrank_linear"}
