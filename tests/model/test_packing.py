"""What transformers is told about packed rows is what it would find out itself."""

import torch
from transformers import masking_utils

from gakernels.model import packing
from gakernels.model.packing import rows_packed


def positions(*rows: list[int]) -> torch.Tensor:
    """The positions of rows that hold sequences of these lengths."""
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])


def test_packed_rows_are_numbered_as_transformers_numbers_them() -> None:
    cut = int(torch.randint(1, 9, ()))
    given = positions([cut, 12 - cut], [12], [3, 4, 5])
    own = packing._look(given)
    assert own is not None
    with rows_packed(True):
        found = masking_utils.find_packed_sequence_indices(given)
    assert found is not None
    assert torch.equal(found, own)


def test_rows_of_one_sequence_are_not_looked_at() -> None:
    given = positions([12], [12])
    assert packing._look(given) is None
    with rows_packed(False):
        assert masking_utils.find_packed_sequence_indices(given.to("meta")) is None


def test_nothing_is_assumed_outside_of_the_block() -> None:
    with rows_packed(False):
        pass
    assert masking_utils.find_packed_sequence_indices(positions([5, 7])) is not None
    assert masking_utils.find_packed_sequence_indices(positions([12])) is None
