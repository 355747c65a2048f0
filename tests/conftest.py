"""Settings and fixtures of every test: one thread, one seed, the folder of real data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from real_data import real_data

# Triton reads this when it is imported: without a GPU its kernels run interpreted, on tiny CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# One thread per process: xdist starts one process per core, and results do not depend on how a sum is split.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test starts from one seed, whichever tests ran before it in the process."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets: SEQZOO_SHARED_DATA, or shared/data beside the repository."""
    folder = real_data()
    if not folder.is_dir():
        pytest.skip(f"no data folder {folder} (set SEQZOO_SHARED_DATA)")
    return folder
