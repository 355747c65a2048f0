"""The step of a series: parsed from a pandas alias, inferred from timestamps, counted between them.

Times are int64 nanoseconds since 1970 without a zone. A step is a fixed number of nanoseconds, a number of
calendar months, or any other pandas offset (business days, semi-months ...).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from pandas.tseries.frequencies import to_offset

from ..errors import UserError

SECOND = 1_000_000_000
DAY = 86_400 * SECOND
CHUNK = 1 << 20

# pandas 3 no longer reads the aliases that most files and papers still use.
_LEGACY = {"H": "h", "T": "min", "S": "s", "M": "ME", "Q": "QE", "Y": "YE", "A": "YE"}
_MONTHS = {"MonthBegin": 1, "MonthEnd": 1, "QuarterBegin": 3, "QuarterEnd": 3, "YearBegin": 12, "YearEnd": 12}
_NAMES = ["JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"]
_WEEKDAYS = ["MON", "TUE", "WED", "THU", "FRI", "SAT", "SUN"]
_UNITS = (
    (DAY, "D"),
    (3600 * SECOND, "h"),
    (60 * SECOND, "min"),
    (SECOND, "s"),
    (1_000_000, "ms"),
    (1_000, "us"),
    (1, "ns"),
)


@dataclass(frozen=True)
class Frequency:
    """One step. Exactly one of `step` (ns) and `months` is positive, or neither for other pandas offsets."""

    alias: str
    step: int = 0
    months: int = 0
    month_end: bool = False

    @property
    def offset(self) -> Any:
        return to_offset(self.alias)

    def missing_between(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Steps missing between pairs of ascending times (int64): 0 = neighbours, -1 = off the grid."""
        if self.step:
            count, rest = np.divmod(after - before, self.step)
            return np.where(rest == 0, count - 1, -1)
        if self.months:
            first, second = _month_index(before), _month_index(after)
            count, rest = np.divmod(second - first, self.months)
            return np.where((rest == 0) & (count > 0), count - 1, -1)
        grid = self._grid(int(before.min()), int(after.max()))
        first, second = np.searchsorted(grid, before), np.searchsorted(grid, after)
        last = max(len(grid) - 1, 0)
        on = (
            (grid[np.minimum(first, last)] == before) & (grid[np.minimum(second, last)] == after)
            if len(grid)
            else False
        )
        return np.where(on, second - first - 1, -1)

    def after(self, last: int, steps: int) -> np.ndarray:
        """The `steps` times that follow `last`, int64 (steps,)."""
        counts = np.arange(1, steps + 1, dtype=np.int64)
        if self.step:
            return last + counts * self.step
        if self.months:
            moment = np.datetime64(last, "ns")
            day = moment.astype("M8[D]")
            months = moment.astype("M8[M]") + counts * self.months
            lengths = ((months + 1).astype("M8[D]") - months.astype("M8[D]")).astype(np.int64)
            wanted = (day - day.astype("M8[M]").astype("M8[D]")).astype(np.int64) + 1
            of_month = lengths if self.month_end else np.minimum(wanted, lengths)
            days = months.astype("M8[D]") + (of_month - 1)
            return days.astype("M8[ns]").astype(np.int64) + last % DAY
        index = pd.date_range(pd.Timestamp(last), periods=steps + 1, freq=self.offset).as_unit("ns")
        values = np.asarray(index.asi8)
        return values[1:] if values[0] == last else values[:steps]

    def _grid(self, start: int, end: int) -> np.ndarray:
        index = pd.date_range(pd.Timestamp(start), pd.Timestamp(end), freq=self.offset).as_unit("ns")
        return np.asarray(index.asi8)


def parse_frequency(alias: str) -> Frequency:
    """A `Frequency` from a pandas offset alias ("h", "15min", "D", "W-SUN", "MS"; also the older "H", "T",
    "M").

    Raises UserError for an alias that pandas does not know or that does not go forward.
    """
    text = str(alias).strip()
    match = re.fullmatch(r"(\d*)([HTSMQYA])((?:-[A-Z]{3})?)", text)
    if match:
        text = match[1] + _LEGACY[match[2]] + match[3]
    try:
        offset = to_offset(text)
    except ValueError:
        offset = None
    if offset is None or offset.n < 1:
        raise UserError(
            f"data.freq={alias!r} is no time step; use a pandas alias such as h, 15min, D, B, W-SUN, MS, ME or QS-JAN"
        )
    name = type(offset).__name__
    if name == "Day":
        return Frequency(_tick_alias(offset.n * DAY), step=offset.n * DAY)
    if name == "Week":
        return Frequency(offset.freqstr, step=7 * offset.n * DAY)
    if name in _MONTHS:
        return Frequency(offset.freqstr, months=_MONTHS[name] * offset.n, month_end=name.endswith("End"))
    try:
        step = int(offset.nanos)
    except ValueError:
        return Frequency(offset.freqstr)
    return Frequency(_tick_alias(step), step=step)


def infer_frequency(times: np.ndarray, offsets: np.ndarray) -> Frequency:
    """The step that most neighbours have. `times` (rows,) ascending within the series that `offsets` (N+1,)
    bounds.

    Fixed steps, calendar months, quarters, years and business days are recognised, also with gaps. Raises
    UserError when no step covers half of the neighbours.
    """
    steps: Counter[int] = Counter()
    for begin, end, same in neighbours(times, offsets):
        values, counts = np.unique((times[begin + 1 : end + 1] - times[begin:end])[same], return_counts=True)
        steps.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        if len(steps) > 100_000:
            break
    if not steps:
        raise UserError("no time step can be inferred from one row; set data.freq, for example data.freq=h")
    mode = max(steps, key=lambda step: (steps[step], -step))
    total = sum(steps.values())
    if mode >= 28 * DAY:
        calendar = _calendar_frequency(times, offsets)
        if calendar is not None:
            return calendar
    if 2 * steps[mode] < total:
        common = ", ".join(f"{pd.Timedelta(step)} ({count / total:.0%})" for step, count in steps.most_common(3))
        raise UserError(f"no regular time step: the commonest are {common}; set data.freq to the step you mean")
    if mode == DAY and _is_business_daily(times, steps):
        return Frequency("B")
    if mode == 7 * DAY:
        weekdays = {int(day) for day in np.unique((times[:CHUNK] // DAY + 3) % 7)}
        if len(weekdays) == 1 and not np.any(times[:CHUNK] % DAY):
            return parse_frequency(f"W-{_WEEKDAYS[weekdays.pop()]}")
    return Frequency(_tick_alias(mode), step=mode)


def neighbours(times: np.ndarray, offsets: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """Walk over the pairs (row, row + 1) in chunks: (begin, end, same), `same[i]` True within a series."""
    last = len(times) - 1
    for begin in range(0, last, CHUNK):
        end = min(begin + CHUNK, last)
        same = np.ones(end - begin, dtype=bool)
        inner = offsets[np.searchsorted(offsets, begin + 1) : np.searchsorted(offsets, end, side="right")]
        same[inner - begin - 1] = False
        yield begin, end, same


def _tick_alias(step: int) -> str:
    unit, name = next((unit, name) for unit, name in _UNITS if step % unit == 0)
    return name if step == unit else f"{step // unit}{name}"


def _month_index(times: np.ndarray) -> np.ndarray:
    return times.astype("M8[ns]").astype("M8[M]").astype(np.int64)


def _calendar_frequency(times: np.ndarray, offsets: np.ndarray) -> Frequency | None:
    """Month, quarter or year starts or ends, if all rows are such days; None otherwise."""
    days = np.asarray(times).astype("M8[ns]").astype("M8[D]")
    months = days.astype("M8[M]")
    starts = bool(np.all(days == months.astype("M8[D]")))
    ends = bool(np.all(days + 1 == (months + 1).astype("M8[D]")))
    index = months.astype(np.int64)
    jumps = np.diff(index)
    inner = np.ones(len(jumps), dtype=bool)
    inner[offsets[1:-1] - 1] = False
    jumps = jumps[inner]
    if not (starts or ends) or not len(jumps) or jumps.min() < 1:
        return None
    values, counts = np.unique(jumps, return_counts=True)
    step = int(values[counts.argmax()])
    side = "S" if starts else "E"
    if step % 12 == 0 and len(np.unique(index % 12)) == 1:
        count, alias = step // 12, f"Y{side}-{_NAMES[int(index[0]) % 12]}"
    elif step % 3 == 0 and len(np.unique(index % 3)) == 1:
        # Anchored as pandas does: starts at the first quarter month, ends at the last of the year.
        first = int(index[0]) % 3
        count, alias = step // 3, f"Q{side}-{_NAMES[first if starts else 9 + first]}"
    else:
        count, alias = step, f"M{side}"
    return parse_frequency(alias if count == 1 else f"{count}{alias}")


def _is_business_daily(times: np.ndarray, steps: Counter[int]) -> bool:
    """Daily rows that never fall on a weekend although they pass over several."""
    weekday = (np.asarray(times) // DAY + 3) % 7
    return bool(steps.get(3 * DAY, 0) >= 2 and np.all(weekday < 5))
