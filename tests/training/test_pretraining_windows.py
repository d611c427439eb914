"""Which windows a segment becomes, on segments whose tokens tell their own position."""

import pytest
import torch
from torch import Tensor

from gakernels import InputError
from gakernels.model.window_losses import WindowBatch, pretraining_windows


def drawn(low: int, high: int) -> int:
    return int(torch.randint(low, high, ()))


def make(reconstruction: str, chunks: int, length: int, rows: int = 2) -> tuple[Tensor, WindowBatch]:
    """Segments of consecutive numbers, and their windows."""
    segments = torch.arange(rows * chunks * length).view(rows, -1)
    random = torch.Generator().manual_seed(drawn(0, 10**9))
    return segments, pretraining_windows(segments, chunks, random, reconstruction)


@pytest.mark.parametrize("reconstruction", ["random_slice", "copy", "final"])
def test_the_first_windows_are_the_context_each_with_the_adapter_of_those_before(reconstruction: str) -> None:
    chunks, length = drawn(1, 7), drawn(2, 9)
    segments, batch = make(reconstruction, chunks, length)
    assert batch.input_ids.shape == batch.mask.shape == (2, 2 * chunks, length)
    assert batch.input_ids[:, :chunks].flatten(1).equal(segments)
    assert batch.chunks == chunks
    assert batch.mask.all()
    assert batch.seen[:chunks] == tuple(range(chunks))


@pytest.mark.parametrize(("reconstruction", "last"), [("copy", False), ("final", True)])
def test_copies_are_the_chunks(reconstruction: str, last: bool) -> None:
    chunks = drawn(2, 7)
    _, batch = make(reconstruction, chunks, drawn(2, 9))
    assert batch.input_ids[:, chunks:].equal(batch.input_ids[:, :chunks])
    assert batch.seen[chunks:] == ((chunks,) * chunks if last else tuple(range(1, chunks + 1)))


def test_slices_are_whole_and_lie_within_what_the_adapter_has_seen() -> None:
    chunks, length = drawn(2, 7), drawn(2, 9)
    segments, batch = make("random_slice", chunks, length, rows=20)
    assert batch.seen[chunks:] == tuple(range(1, chunks + 1))
    slices = batch.input_ids[:, chunks:]
    assert (slices.diff(dim=-1) == 1).all()
    starts = slices[..., 0] - segments[:, :1]
    assert (starts >= 0).all()
    assert (starts + length <= length * torch.arange(1, chunks + 1)).all()


def test_starts_are_uniform_over_the_whole_prefix() -> None:
    chunks, length, rows = 4, 3, 4000
    segments, batch = make("random_slice", chunks, length, rows)
    starts = batch.input_ids[:, chunks:, 0] - segments[:, :1]
    for chunk in range(chunks):
        places = chunk * length + 1
        counts = starts[:, chunk].bincount(minlength=places)
        assert len(counts) == places
        # Each count is binomial: 6 standard deviations are passed once in 10^7 tests.
        deviation = (rows / places * (1 - 1 / places)) ** 0.5
        assert (counts - rows / places).abs().max() <= 6 * deviation


def test_rows_and_calls_draw_slices_of_their_own() -> None:
    segments = torch.arange(20 * 30).view(20, 30)
    random = torch.Generator().manual_seed(drawn(0, 10**9))
    first, second = (pretraining_windows(segments, 3, random).input_ids for _ in range(2))
    starts = first[:, -1, 0] - segments[:, 0]
    assert len(set(starts.tolist())) > 1
    assert not first.equal(second)


def test_the_first_token_of_a_window_and_the_first_chunk_carry_no_loss() -> None:
    chunks, length = drawn(2, 7), drawn(2, 9)
    _, batch = make("random_slice", chunks, length)
    windows = torch.arange(2 * chunks)[:, None].expand(2 * chunks, length)
    later = torch.arange(length).expand(2 * chunks, length) > 0
    assert (batch.targets["completion"] == ((windows >= 1) & (windows < chunks) & later)).all()
    assert (batch.targets["reconstruction"] == ((windows >= chunks) & later)).all()


@pytest.mark.parametrize("chunks", [0, -1, 5, 12])
def test_chunks_that_do_not_divide_the_segment_are_refused(chunks: int) -> None:
    with pytest.raises(InputError, match=f"chunks must divide the 12 tokens.*but it is {chunks}"):
        pretraining_windows(torch.zeros(2, 12), chunks, torch.Generator())


def test_an_unknown_reconstruction_is_refused() -> None:
    with pytest.raises(InputError, match="reconstruction must be one of random_slice, copy, final, but it is 'slice'"):
        pretraining_windows(torch.zeros(2, 12), 3, torch.Generator(), "slice")


def test_each_adapter_can_have_several_slices_or_none() -> None:
    chunks, length, slices = drawn(2, 6), drawn(4, 9), drawn(2, 5)
    segments = torch.arange(20 * chunks * length).view(20, -1)
    random = torch.Generator().manual_seed(drawn(0, 10**9))
    batch = pretraining_windows(segments, chunks, random, slices=slices)
    assert batch.input_ids.shape == (20, (1 + slices) * chunks, length)
    assert batch.seen == (*range(chunks), *[*range(1, chunks + 1)] * slices)
    starts = (batch.input_ids[:, chunks:, 0] - segments[:, :1]).unflatten(1, (slices, chunks))
    assert (starts + length <= length * torch.arange(1, chunks + 1)).all()
    assert not starts[:, 0].equal(starts[:, 1])
    assert batch.targets["reconstruction"][:, chunks:, 1:].all()
    alone = pretraining_windows(segments, chunks, random, slices=0)
    assert alone.input_ids.equal(batch.input_ids[:, :chunks])
    assert alone.seen == tuple(range(chunks))
    assert not alone.targets["reconstruction"].any()
    assert alone.targets["completion"].equal(batch.targets["completion"][:, :chunks])


@pytest.mark.parametrize(
    ("chunks", "reconstruction", "slices", "message"),
    [
        (2, "copy", 2, "slices must be 0 or 1, or more with reconstruction 'random_slice', but it is 2 with 'copy'"),
        (2, "random_slice", -1, "slices must be 0 or 1, or more with"),
        (1, "copy", 0, "chunks must be at least 2 if completion is the only loss, but it is 1"),
    ],
)
def test_slices_that_make_no_sense_are_refused(chunks: int, reconstruction: str, slices: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pretraining_windows(torch.zeros(1, 8), chunks, torch.Generator(), reconstruction, slices)
