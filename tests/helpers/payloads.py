"""Content that makes a folder, the canary, where it is executed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


class Payload:
    """Unpickled, it makes the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.canary,)


def tagged(canary: Path) -> str:
    """YAML that makes it where a loader believes Python's tags."""
    return f"name: !!python/object/apply:os.mkdir ['{canary}']\n"
