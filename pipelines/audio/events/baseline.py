"""Events without learning: where a recording is louder than what is around it; and by chance."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .decoding import Span, decode_events

FRAME = 0.02  # seconds
AROUND = 3.0  # seconds to each side whose quantile is the level of the background
QUANTILE = 0.5
MARGINS = (2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 15.0)  # dB, from which validation recordings choose
MAX_GAP, MIN_DURATION = 0.1, 0.1  # seconds
_READ = 30  # seconds at a time
_FLOOR = 1e-9

Read = Callable[[int, int], np.ndarray]


def frame_levels(read: Read, frames: int, sample_rate: int) -> np.ndarray:
    """Mean square of each 20 ms in dB of full scale, float64 (F,); the rest of a last frame is left out.

    read: samples of frames start .. stop of a recording, which has `frames`.
    """
    size = max(1, round(FRAME * sample_rate))
    step = size * max(1, round(_READ / FRAME))
    levels = [np.empty(0)]
    for start in range(0, frames - size + 1, step):
        stop = min(start + step, frames - (frames - start) % size)
        levels.append((read(start, stop).astype(np.float64) ** 2).reshape(-1, size).mean(1))
    return 10 * np.log10(np.concatenate(levels) + _FLOOR)


def over_background(levels: np.ndarray) -> np.ndarray:
    """How many dB each frame is over the median of the frames up to 3 seconds around it."""
    half = round(AROUND / FRAME)
    # every half second: the level of a background does not change faster
    places = np.arange(0, len(levels), max(1, half // 6))
    around = [np.quantile(levels[max(place - half, 0) : place + half + 1], QUANTILE) for place in places]
    return levels - np.interp(np.arange(len(levels)), places, around) if len(levels) else levels


def energy_spans(excess: np.ndarray, sample_rate: int, *, margin_db: float, label: int = 0) -> list[Span]:
    """Spans where the energy is `margin_db` over the background, gaps up to 0.1 s closed, 0.1 s long at least; all of
    one class, `label`. excess: from `over_background`."""
    step = max(1, round(FRAME * sample_rate)) / sample_rate
    found = decode_events(
        excess[:, None], step=step, first=step / 2, threshold=margin_db, max_gap=MAX_GAP, min_duration=MIN_DURATION
    )
    return [span._replace(label=label) for span in found]


def chance_spans(
    seconds: float, *, per_second: Sequence[float], length: float, rng: np.random.Generator
) -> list[tuple[float, float, int]]:
    """As many spans of each class as training recordings have in this time on average, at random places, of the mean
    length."""
    spans = []
    for label, rate in enumerate(per_second):
        for start in rng.uniform(0, max(seconds - length, 0), round(rate * seconds)):
            spans.append((float(start), float(start) + length, label))
    return spans
