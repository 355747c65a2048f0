"""Real series of many kinds in one table, to train a forecaster that knows none of yours.

    pip install pvlib statsmodels vega-datasets bokeh-sampledata river
    python examples/forecast_corpus.py corpus.parquet
    lightning fit experiment=forecasting/zero_shot data.path=corpus.parquet

Weather of two stations (pvlib), two cities and a day by day record (vega-datasets), electricity demand and carbon
dioxide (statsmodels), the sea's temperature, glucose in blood and shares (bokeh-sampledata), oil and a water main
(river), from minutes to weeks, each also as means of 2, 3, 4, 6, 12 and 24 steps where that leaves enough. The packages
are not imported, their files are read. Time stamps count steps: a step is called an hour.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd

LEAST = 1024  # steps of a series
MEANS = (1, 2, 3, 4, 6, 12, 24)
WEATHER = {
    "GHI (W/m^2)": "sun",
    "DNI (W/m^2)": "direct_sun",
    "DHI (W/m^2)": "diffuse_sun",
    "Dry-bulb (C)": "temperature",
    "Dew-point (C)": "dew_point",
    "RHum (%)": "humidity",
    "Pressure (mbar)": "pressure",
    "Wspd (m/s)": "wind",
}


def folder(package: str) -> Path:
    """Where an installed package lies; exits saying what to install."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"the package {package} is not installed, see the first lines of this file")
    return Path(spec.submodule_search_locations[0])


def read_series() -> dict[str, np.ndarray]:
    """Names and values, in time order, without missing ones."""
    found = {}
    for station in ("723170TYA.CSV", "703165TY.csv"):
        table = pd.read_csv(folder("pvlib") / "data" / station, skiprows=1)
        found |= {f"{station[:6]}_{name}": table[column].to_numpy() for column, name in WEATHER.items()}
    data = folder("vega_datasets") / "_data"
    for city in ("seattle", "sf"):
        found[f"{city}_temperature"] = pd.read_csv(data / f"{city}-temps.csv")["temp"].to_numpy()
    daily = pd.read_csv(data / "seattle-weather.csv")
    found |= {f"seattle_daily_{name}": daily[name].to_numpy() for name in ("temp_max", "temp_min", "wind")}
    models = folder("statsmodels")
    found["victoria_demand"] = pd.read_csv(models / "tsa/stl/tests/results/mstl_elec_vic.csv").iloc[:, 1].to_numpy()
    co2 = pd.read_csv(models / "datasets/co2/co2.csv")["co2"]
    found["mauna_loa_co2"] = co2.interpolate().bfill().to_numpy()
    bokeh = folder("bokeh_sampledata") / "_data"
    found["maine_sea_temperature"] = pd.read_csv(bokeh / "sea_surface_temperature.csv.gz")["temperature (celsius)"]
    found["glucose"] = pd.read_csv(bokeh / "CGM.csv.gz")["glucose"]
    for ticker, days in pd.read_csv(bokeh / "stocks.csv.gz").groupby("Ticker"):
        found[f"share_{ticker}"] = np.log(days["Adj Close"])
    water = folder("river")
    found["brent_oil"] = np.log(pd.read_csv(water / "drift/datasets/brent_crude_oil.csv")["DPB"])
    found["water_main"] = pd.read_csv(water / "datasets/water-flow.csv")["Water flow [l/s]"].interpolate()
    return {name: np.asarray(values, np.float64) for name, values in found.items()}


def build_table(series: dict[str, np.ndarray]) -> pd.DataFrame:
    """unique_id, ds, y: every series, and its means over several steps."""
    parts = []
    for name, values in series.items():
        for steps in MEANS:
            whole = len(values) // steps * steps
            means = values[:whole].reshape(-1, steps).mean(1)
            if len(means) < LEAST or not np.isfinite(means).all() or means.std() == 0:
                continue
            ds = pd.date_range("2000-01-01", periods=len(means), freq="h")
            parts.append(pd.DataFrame({"unique_id": f"{name}_{steps}", "ds": ds, "y": means}))
    return pd.concat(parts, ignore_index=True)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("python examples/forecast_corpus.py corpus.parquet")
    table = build_table(read_series())
    table.to_parquet(sys.argv[1], index=False)
    print(f"{table['unique_id'].nunique()} series of {len(table):,} steps in {sys.argv[1]}")


if __name__ == "__main__":
    main()
