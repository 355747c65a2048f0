"""Real tables that installed packages carry, by name: no download, and no import of the package."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ..atomic import atomic_path
from ..cache import cache_root
from ..errors import UserError

SAMPLES = ("weather",)

# The columns of NREL's TMY3 files that are measured or modelled weather, and what they are called here.
WEATHER_COLUMNS = {
    "GHI (W/m^2)": "ghi",
    "DNI (W/m^2)": "dni",
    "DHI (W/m^2)": "dhi",
    "Dry-bulb (C)": "temperature",
    "Dew-point (C)": "dew_point",
    "RHum (%)": "humidity",
    "Pressure (mbar)": "pressure",
    "Wdir (degrees)": "wind_direction",
    "Wspd (m/s)": "wind_speed",
}
_YEAR = 1990  # a nominal year without a leap day: the months of a typical year come from different years
_HOURS = 8760


def sample_path(name: str, cache_dir: str | Path | None = None) -> Path:
    """The CSV file of a sample; written into the cache the first time.

    "weather": the typical meteorological year (TMY3) of Greensboro, North Carolina, from the pvlib wheel:
    8,760 hours and the nine columns of `WEATHER_COLUMNS`. Its months are taken from different years between
    1980 and 2003; here they form the nominal year 1990. TMY hours run from 1 to 24 and name the END of the
    hour measured, so that the first row is 1990-01-01 01:00 and the last 1991-01-01 00:00.

    Raises UserError for an unknown name and when the package is not installed.
    """
    if name not in SAMPLES:
        raise UserError(f"no sample {name!r}; known: {', '.join(SAMPLES)}")
    spec = find_spec("pvlib")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    origin = Path(folders[0]) / "data" / "723170TYA.CSV" if folders else None
    if origin is None or not origin.is_file():
        raise UserError(f"the sample {name!r} needs the package pvlib: pip install seqzoo[samples]")
    state = origin.stat()
    digest = hashlib.sha256(f"{origin} {state.st_size} {state.st_mtime_ns} {_YEAR}".encode()).hexdigest()[:12]
    path = cache_root(cache_dir) / "samples" / digest / f"{name}.csv"
    if not path.exists():
        _write_weather(origin, path)
    return path


def _write_weather(origin: Path, path: Path) -> None:
    import pandas as pd

    table = pd.read_csv(origin, skiprows=1)
    date = table["Date (MM/DD/YYYY)"].str.split("/", expand=True).astype(int)
    hour = table["Time (HH:MM)"].str.slice(0, 2).astype(int)
    ends = pd.date_range(f"{_YEAR}-01-01 01:00", periods=_HOURS, freq="h")
    starts = ends - pd.Timedelta("1h")
    continuous = (
        len(table) == _HOURS
        and np.array_equal(date[0], starts.month)
        and np.array_equal(date[1], starts.day)
        and np.array_equal(hour, starts.hour + 1)
    )
    if not continuous:
        raise UserError(f"{origin} is not a year of hourly rows; install another version of pvlib")
    weather = table[list(WEATHER_COLUMNS)].rename(columns=WEATHER_COLUMNS)
    weather.insert(0, "date", ends)
    with atomic_path(path) as temporary:
        weather.to_csv(temporary, index=False)
