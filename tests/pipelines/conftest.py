"""Fixtures of the command's tests: the work replaced by a recorder, a module of one weight and its trainer."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

EXECUTE = "seqzoo.pipelines.run"


class Recorder:
    """Stands in for `run.execute`: keeps what it was called with, and fails on demand."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any], Path]] = []
        self.environment: dict[str, str] = {}
        self.argv: list[str] = []
        self.error: BaseException | None = None

    def __call__(self, command: str, cfg: dict[str, Any], run_dir: Path) -> dict[str, Any]:
        from hydra.core.hydra_config import HydraConfig

        self.calls.append((command, cfg, run_dir))
        self.environment, self.argv = dict(os.environ), list(sys.argv)
        self.hydra_is_hidden = not HydraConfig.initialized()
        if self.error is not None:
            raise self.error
        return {}

    @property
    def cfg(self) -> dict[str, Any]:
        return self.calls[-1][1]


@pytest.fixture
def execute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Recorder:
    recorder = Recorder()
    module = types.ModuleType(EXECUTE)
    module.execute = recorder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, EXECUTE, module)
    for name in ("SEQZOO_RUN_DIR", "SEQZOO_ALLOW", "SEQZOO_DATA", "HYDRA_FULL_ERROR", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["/bin/lightning"])
    monkeypatch.chdir(tmp_path)
    return recorder
