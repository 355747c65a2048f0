"""Where the real data of tests are: SEQZOO_SHARED_DATA, or shared/data beside the repository."""

from __future__ import annotations

import os
from pathlib import Path


def real_data() -> Path:
    """The folder, whether it is there or not."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    return Path(os.environ.get("SEQZOO_SHARED_DATA", beside))
