"""Timestamps of a file, whatever they look like there, as int64 nanoseconds since 1970 (UTC when a zone is
given).
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

_YEARS = " between the years 1678 and 2261"


class BadTime(Exception):
    """A value that is no timestamp: its index in the batch, the value, and what was expected."""

    def __init__(self, index: int, value: object, expected: str = "") -> None:
        super().__init__(f"{value!r} is no timestamp{expected}")
        self.index = index
        self.value = value


class TimeParser:
    """Parses batches of one column; the format is chosen on the first batch and then kept.

    Reads date and timestamp columns, ISO 8601 text, and any one fixed text format that pandas can guess. A
    text such as 01/02/2020 is taken month first unless that fails anywhere in the first batch. Whole numbers
    are read as text, so 20200131 and 2020 are dates and epoch seconds are refused.
    """

    def __init__(self) -> None:
        self._format: str | None = None

    def __call__(self, array: pa.Array) -> np.ndarray:
        """(n,) timestamps as int64 ns. Raises BadTime."""
        if array.null_count:
            raise BadTime(int(np.argmax(array.is_null().to_numpy(zero_copy_only=False))), None)
        kind = array.type
        if pa.types.is_dictionary(kind):
            return self(array.dictionary_decode())
        if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
            zone = getattr(kind, "tz", None)
            try:
                return pc.cast(array, pa.timestamp("ns", zone)).cast(pa.int64()).to_numpy()
            except pa.ArrowInvalid:
                raise BadTime(0, _shown(array[0]), _YEARS) from None
        if pa.types.is_integer(kind):
            array = array.cast(pa.string())
        elif not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise BadTime(0, array[0].as_py(), f" (the column is of type {kind})")
        return self._parse_text(pc.utf8_trim_whitespace(array))

    def _parse_text(self, array: pa.Array) -> np.ndarray:
        if self._format in (None, "ISO8601"):
            try:  # ten times faster than pandas where it applies
                return pc.cast(array, pa.timestamp("ns")).cast(pa.int64()).to_numpy()
            except pa.ArrowInvalid:
                pass
        text = array.to_pandas().astype(object)
        if self._format is None:
            self._format = _best_format(text)
        times = _to_datetime(text, self._format)
        bad = np.asarray(times.isna())
        if bad.any():
            index = int(bad.argmax())
            seen = "" if self._format == "ISO8601" else f" of the form {self._format}"
            raise BadTime(index, text.iloc[index], seen)
        try:
            return np.asarray(times.dt.as_unit("ns").astype("int64"))
        except pd.errors.OutOfBoundsDatetime:
            index = int(((times.dt.year < 1678) | (times.dt.year > 2261)).to_numpy().argmax())
            raise BadTime(index, text.iloc[index], _YEARS) from None


def _shown(value: Any) -> object:
    """A time for a message; of one beyond the years of Python its number."""
    try:
        return value.as_py()
    except (ValueError, OverflowError):
        return getattr(value, "value", "?")


def looks_like_times(array: pa.Array) -> bool:
    """Whether the first values of a column are dates or text with a date in it (plain numbers are not)."""
    kind = array.type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return True
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        return False
    sample = array.drop_null()[:50]
    if not len(sample) or not all(any(mark in str(value) for mark in "-/:.") for value in sample):
        return False
    if all(_is_number(str(value)) for value in sample):
        return False
    try:
        TimeParser()(sample)
    except BadTime:
        return False
    return True


def _best_format(text: pd.Series) -> str:
    candidates = ["ISO8601"]
    for dayfirst in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            guess = pd.tseries.api.guess_datetime_format(str(text.iloc[0]), dayfirst=dayfirst)
        if guess is not None and guess not in candidates:
            candidates.append(guess)
    return min(candidates, key=lambda form: int(_to_datetime(text, form).isna().sum()))


def _to_datetime(text: pd.Series, form: str) -> pd.Series:
    return pd.to_datetime(text, format=form, errors="coerce", utc=True)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
