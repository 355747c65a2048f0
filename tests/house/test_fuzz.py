"""The counts of the fuzzer: cases and CPU seconds over formats, seeds and runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def beside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The scripts find each other beside them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in ("fuzz", "_fuzz_reading", "_runs"):
        sys.modules.pop(name, None)


def test_the_fuzzer_adds_up_over_runs() -> None:
    """A row for each format and seed; the CPU minutes are of the rows that have them, with their cases beside."""
    pytest.importorskip("hypothesis")
    import fuzz

    def row(kind: str, seed: int, cases: int, cpu: float | None) -> dict[str, Any]:
        return {"format": kind, "seed": seed, "cases": cases, "cpu_seconds": cpu, "seconds": 90.0, "found": [1]}

    earlier = [row("wav", 1, 10, None), row("csv", 1, 20, 30.0)]
    every = fuzz.with_earlier([row("csv", 1, 25, 60.0), row("csv", 2, 300, 120.0)], earlier)
    assert [(r["format"], r["seed"], r["cases"]) for r in every] == [("wav", 1, 10), ("csv", 1, 25), ("csv", 2, 300)]
    assert fuzz.sums(every) == {"cpu_minutes": 3.0, "cases in them": 325, "cases": 335, "minutes": 4.5, "found": 3}


def test_the_cpu_seconds_of_a_reading_count_its_children() -> None:
    import _fuzz_reading

    before = _fuzz_reading.cpu_seconds()
    code = "import time\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-S", "-c", code], check=True)
    assert _fuzz_reading.cpu_seconds() - before > 0.2
