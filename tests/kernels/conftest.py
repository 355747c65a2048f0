"""What every kernel test has: memory that nothing was written to holds NaN."""

import pytest
import torch


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan():
    """`torch.empty` and its kin are filled with NaN (integers: the largest), so that a read of them shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
