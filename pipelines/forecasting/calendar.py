"""Calendar features of timestamps, future timestamps, and the season length of a time step."""

from __future__ import annotations

import numpy as np
import pandas as pd

from .frequency import DAY, SECOND, Frequency, parse_frequency

_HOUR, _MINUTE = 3600 * SECOND, 60 * SECOND


class Calendar:
    """The `timeF` features of Informer (arXiv:2012.07436), each in [-0.5, 0.5], for times within [first,
    last].

    In this order, from the finest that the step can tell apart: second/59, minute/59, hour/23, dayofweek/6
    (Monday 0), (day-1)/30, (dayofyear-1)/365, all minus 0.5. Weekly steps: (day-1)/30 and (week-1)/52;
    monthly and quarterly: (month-1)/11; yearly: none. first, last: int64 ns. Day-level features come from a
    table with a row per day, so that a call costs a few array operations.
    """

    def __init__(self, freq: str, first: int, last: int) -> None:
        self.fields = calendar_fields(freq)
        self._first_day = first // DAY
        clock = [name for name in self.fields if name in _CLOCK]
        self._unit = min((_CLOCK[name][0] for name in clock), default=DAY)
        within = np.arange(0, DAY, self._unit)
        self._clock = _columns([_clock_field(name, within) for name in clock], len(within))
        days = np.arange(self._first_day, last // DAY + 1).astype("M8[D]")
        self._days = _columns([_day_field(name, days) for name in self.fields[len(clock) :]], len(days))

    def __call__(self, times: np.ndarray) -> np.ndarray:
        """times int64 ns (...,) -> features float32 (..., T)."""
        return self.features(*self.codes(times))

    def codes(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Times (...,) as two small integers (...,) each: the clock unit within the day, the day."""
        day, within = np.divmod(times, DAY)
        clock, day = within // self._unit, day - self._first_day
        return clock.astype(_smallest(len(self._clock))), day.astype(_smallest(len(self._days)))

    def features(self, clock: np.ndarray, day: np.ndarray) -> np.ndarray:
        """Codes (...,) -> features float32 (..., T)."""
        split = self._clock.shape[1]
        features = np.empty((*day.shape, len(self.fields)), dtype=np.float32)
        if split:
            features[..., :split] = self._clock.take(clock, axis=0)
        features[..., split:] = self._days.take(day, axis=0)
        return features


def calendar_features(times_ns: np.ndarray, freq: str) -> np.ndarray:
    """`Calendar` features of int64 ns times (n,) -> float32 (n, T)."""
    times = np.asarray(times_ns, dtype=np.int64)
    if not times.size:
        return np.zeros((*times.shape, len(calendar_fields(freq))), dtype=np.float32)
    return Calendar(freq, int(times.min()), int(times.max()))(times)


def calendar_fields(freq: str) -> tuple[str, ...]:
    """Names of the calendar features of a step, in order."""
    frequency = parse_frequency(freq)
    if frequency.months:
        return () if frequency.months % 12 == 0 else ("month",)
    daily = ("dayofweek", "day", "dayofyear")
    step = frequency.step
    if not step:
        return daily if frequency.alias.lstrip("0123456789") in ("B", "C") else ("month",)
    if step % (7 * DAY) == 0:
        return ("day", "week")
    if step % DAY == 0:
        return daily
    if step % _HOUR == 0:
        return ("hour", *daily)
    if step % _MINUTE == 0:
        return ("minute", "hour", *daily)
    return ("second", "minute", "hour", *daily)


def future_times(last: int, freq: str, steps: int) -> np.ndarray:
    """The `steps` timestamps after `last` (int64 ns) on the calendar of `freq`: int64 (steps,)."""
    return parse_frequency(freq).after(int(last), steps)


def seasonality(freq: str) -> int:
    """Steps in the natural season: a day for steps below a day, a week for days, a year for longer steps.

    s -> 3600 (an hour), 15min -> 96, h -> 24, D -> 7, B -> 5, W -> 52, MS -> 12, QS -> 4; 1 where the season
    is no whole number of steps.
    """
    frequency = parse_frequency(freq)
    step = frequency.step
    if frequency.months:
        return _whole(12, frequency.months)
    if not step:
        return 5 if frequency.alias == "B" else 1
    if step % (7 * DAY) == 0:
        return max(52 // (step // (7 * DAY)), 1)
    season = 7 * DAY if step % DAY == 0 else DAY if step >= _MINUTE else _HOUR
    return _whole(season, step)


def same_frequency(first: str, second: str) -> bool:
    """Whether two aliases mean the same step; anchors of months count as the same step, as their origin is
    data.
    """
    return _key(parse_frequency(first)) == _key(parse_frequency(second))


def _key(frequency: Frequency) -> tuple[object, ...]:
    if frequency.step or frequency.months:
        return (frequency.step, frequency.months, frequency.month_end)
    return (frequency.alias,)


def _whole(season: int, step: int) -> int:
    return season // step if season % step == 0 else 1


_CLOCK = {"second": (SECOND, 60), "minute": (_MINUTE, 60), "hour": (_HOUR, 24)}


def _smallest(count: int) -> type[np.signedinteger]:
    return np.int16 if count <= 2**15 else np.int32


def _columns(columns: list[np.ndarray], length: int) -> np.ndarray:
    return np.stack(columns, axis=1) if columns else np.zeros((length, 0), dtype=np.float32)


def _clock_field(name: str, within: np.ndarray) -> np.ndarray:
    unit, modulus = _CLOCK[name]
    return ((within // unit) % modulus / (modulus - 1) - 0.5).astype(np.float32)


def _day_field(name: str, days: np.ndarray) -> np.ndarray:
    months, years = days.astype("M8[M]"), days.astype("M8[Y]")
    if name == "dayofweek":
        value = ((days.astype(np.int64) + 3) % 7) / 6
    elif name == "day":
        value = (days - months.astype("M8[D]")).astype(np.int64) / 30
    elif name == "dayofyear":
        value = (days - years.astype("M8[D]")).astype(np.int64) / 365
    elif name == "month":
        value = (months.astype(np.int64) % 12) / 11
    else:
        week = pd.DatetimeIndex(days.astype("M8[s]")).isocalendar().week.to_numpy(dtype=np.int64)
        value = (week - 1) / 52
    return (value - 0.5).astype(np.float32)
