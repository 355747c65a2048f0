"""The fixture of conftest.py does what the kernel tests rely on."""

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_memory_that_nothing_was_written_to_holds_nan(dtype):
    x = torch.ones(3, dtype=dtype)
    made = [
        torch.empty(4, dtype=dtype),
        x.new_empty(4),
        torch.empty_like(x),
        torch.empty_strided((2, 2), (1, 2)).to(dtype),
    ]
    assert all(tensor.isnan().all() for tensor in made)
