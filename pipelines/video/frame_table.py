"""Which frames a file has, when each is shown and where decoding can start: read from its packets, not its header."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import numpy as np


class FrameTable(NamedTuple):
    """Of one video stream. Frames are numbered in the order in which they are shown.

    stream: its index in the file. pts: int64 (N,), times in units of `base` seconds, rising. end: of the last frame, in
    the same unit. key_frames: int64 (K,), frames at which decoding can start. counted: the file has no times, those
    here are counted, and decoding starts at the beginning only. height, width: as stored. rotation: degrees clockwise
    by which a frame is turned to be shown: 0, 90, 180, 270. container: the kind of file, such as "mov" or "matroska".
    alone: there is no other video stream. closed: no frame refers to one before the key frame that it is shown after.
    """

    stream: int
    pts: np.ndarray
    end: int
    base: Fraction
    key_frames: np.ndarray
    counted: bool
    height: int
    width: int
    rotation: int
    codec: str
    container: str
    alone: bool
    closed: bool

    @property
    def seconds(self) -> np.ndarray:
        """float64 (N,): times as the file has them."""
        return self.pts * float(self.base)

    @property
    def shown(self) -> tuple[int, int]:
        """(height, width) of a frame as it is shown."""
        return turned((self.height, self.width), self.rotation)

    def key_before(self, number: int) -> int:
        """The place in key_frames of the last one at or before a frame; -1: there is none."""
        return int(np.searchsorted(self.key_frames, number, side="right")) - 1

    def number_of(self, pts: int) -> int:
        """The frame of a time; -1 for a time that is nearer to none than half the gap there is."""
        place = int(np.searchsorted(self.pts, pts))
        if place < len(self.pts) and self.pts[place] == pts:
            return place
        near = min((k for k in (place - 1, place) if 0 <= k < len(self.pts)), key=lambda k: abs(self.pts[k] - pts))
        gaps = np.diff(self.pts[max(0, near - 1) : near + 2])
        return near if len(gaps) and 2 * abs(int(self.pts[near]) - pts) < gaps.min() else -1


def turned(size: tuple[int, int], rotation: int) -> tuple[int, int]:
    """(height, width) after a rotation by degrees."""
    return (size[1], size[0]) if rotation % 180 else size


class Packets:
    """Collects a stream's packets into a FrameTable."""

    def __init__(self) -> None:
        self._pts: list[int | None] = []
        self._dts: list[int | None] = []
        self._durations: list[int] = []
        self._keys: list[bool] = []

    def __len__(self) -> int:
        return len(self._pts)

    def add(self, pts: int | None, dts: int | None, duration: int, key: bool) -> None:
        self._pts.append(pts)
        self._dts.append(dts)
        self._durations.append(duration)
        self._keys.append(key)

    @property
    def closed(self) -> bool:
        """No packet is shown before a key frame that it follows in the file."""
        latest: int | None = None
        for pts, key in zip(self._pts, self._keys, strict=True):
            if pts is None or (latest is not None and pts < latest):
                return False
            latest = pts if key else latest
        return True

    def order(self, step: int) -> tuple[np.ndarray, int, np.ndarray, bool]:
        """pts, end, key_frames and counted of the table. step: of a frame, where the file has no times."""
        number = len(self._pts)
        times: list[int | None] = self._pts
        if any(t is None for t in times):  # AVI has one time a packet
            times = self._dts if sum(t is None for t in self._dts) < sum(t is None for t in times) else times
        known = sum(t is not None for t in times)
        if (known < number and 2 * known < number) or len({t for t in times if t is not None}) == 1 < number:
            return np.arange(number) * step, number * step, np.zeros(1, np.int64), True
        kept = [k for k, t in enumerate(times) if t is not None]
        raw = np.array([times[k] for k in kept], np.int64)
        pts, first = np.unique(raw, return_index=True)
        last = kept[int(first[-1])]
        gap = int(np.median(np.diff(pts))) if len(pts) > 1 else step
        end = int(pts[-1]) + (self._durations[last] or gap)
        keys = np.unique([int(t) for k, t in zip(kept, raw, strict=True) if self._keys[k]])
        return pts, end, np.searchsorted(pts, keys).astype(np.int64), False
