"""Clips, backgrounds and recordings with spans, small, for the tests of events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from seqzoo.pipelines.audio.events.data import AudioEventData

RATE = 4000
COMPOSED: dict[str, Any] = {
    "clips": "folder",
    "sample_rate": RATE,
    "snr_db": 10.0,
    "test_snr_db": [20.0, 10.0],
    "events_per_minute": 60.0,
    "window": 2.0,
    "val_recordings": 2,
    "val_minutes": 0.2,
    "test_minutes": 0.3,
    "batch_size": 4,
    "steps": 6,
}


def write(path: Path, samples: np.ndarray, rate: int = RATE) -> Path:
    import soundfile

    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples.astype(np.float32), rate, subtype="FLOAT")
    return path


def fill(folder: Path) -> Path:
    """Tones of two heights as clips, noise as a background, and recordings with a table."""
    rng = np.random.default_rng(0)
    write(folder / "backgrounds" / "noise.wav", 0.1 * rng.standard_normal(40 * RATE))
    time = np.arange(RATE) / RATE
    for label, hertz in (("low", 300), ("high", 1100)):
        for number in range(12):
            tone = 0.5 * np.sin(2 * np.pi * (hertz + 10 * number) * time[: RATE // 4 + 100 * number])
            write(folder / "clips" / label / f"{number}.wav", tone)
    rows = ["path,start,end,label"]
    for number in range(6):
        samples = 0.05 * rng.standard_normal(8 * RATE + number)
        for start, label, hertz in ((1.0, "low", 300), (4.5 + 0.1 * number, "high", 1100)):
            place = round(start * RATE)
            samples[place : place + RATE] += 0.5 * np.sin(2 * np.pi * hertz * time)
            rows.append(f"r{number}.wav,{start:.1f},{start + 1:.1f},{label}")
        write(folder / "own" / f"r{number}.wav", samples)
    (folder / "own" / "spans.csv").write_text("\n".join(rows) + "\n")
    return folder


def composed(root: Path, **options: Any) -> AudioEventData:
    given = {"path": root / "clips", "backgrounds": root / "backgrounds", **COMPOSED, **options}
    data = AudioEventData(**given)
    data.setup("fit")
    return data


def spans(root: Path, table: str = "spans.csv", **options: Any) -> AudioEventData:
    given = {"overlap": True, "sample_rate": RATE, "window": 2.0, "split_ratio": [0.6, 0.2, 0.2], "batch_size": 5}
    data = AudioEventData("spans", root / "own" / table, **{**given, **options})
    data.setup("fit")
    return data
