"""The bounds of packed sequences."""

import pytest
import torch

from seqzoo.blocks.layers.rows import packed_groups
from seqzoo.kernels.packing import packed_bounds


def test_bounds_as_numbers():
    assert packed_bounds(torch.tensor([0, 3, 3, 10], dtype=torch.int32), 10) == [0, 3, 3, 10]
    assert packed_bounds(torch.tensor([0, 0]), 0) == [0, 0]


@pytest.mark.parametrize("bad", [[0], [1, 10], [0, 9], [0, 6, 5, 10], [0, 11]])
def test_bounds_that_do_not_rise_to_the_length_are_refused(bad):
    for user in (packed_bounds, lambda bounds, length: next(packed_groups(bounds, length, together=True))):
        with pytest.raises(ValueError, match="must rise from 0 to the length of the packed row, 10"):
            user(torch.tensor(bad), 10)
