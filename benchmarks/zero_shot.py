"""Forecasts of a file that the model has never seen: ETTh1, 96 hours ahead, beside naive ones and a peer.

    SEQZOO_DATA=/folder/with/ETTh1.csv python benchmarks/zero_shot.py [--model patch_small.zero_shot]

29 windows that follow each other without overlap from the end of month 16, in units of the first 12 months' standard
deviation. Writes benchmarks/results/zero_shot.json. The peer is the pretrained model of the package fracast 0.1.0,
measured where it is installed (pip install fracast).
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _runs import data_folder, write_result

from seqzoo import create_model, load_model

MONTH, HORIZON, WINDOWS = 30 * 24, 96, 29
FIRST, SEASON = 16 * MONTH, 24
TARGET = "OT"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="patch_small.zero_shot", help="weights that ship, or the folder of a model")
    options = parser.parse_args()
    series = read(Path(data_folder()) / "ETTh1.csv")
    is_folder = Path(options.model).is_dir()
    model: Any = load_model(options.model) if is_folder else create_model(options.model, pretrained=True)
    name = model.config["name"] if is_folder else options.model
    methods = {name: lambda past: ours(model.eval(), past)}
    if importlib.util.find_spec("fracast"):
        methods["fracast 0.1.0"] = fracast
    methods |= {"last value": last_value, "seasonal naive": seasonal_naive}
    rows = []
    for method, forecast in methods.items():
        began = time.perf_counter()
        mse, mae, inside = score(forecast, series[TARGET])
        seconds = time.perf_counter() - began
        rows.append({"method": method, "mse": mse, "mae": mae, "seconds": seconds})
        if inside is not None:
            rows[-1]["inside_80"] = inside
        print(", ".join(f"{k} {v:.4f}" if isinstance(v, float) else str(v) for k, v in rows[-1].items()), flush=True)
    settings = {"data": "ETTh1", "target": TARGET, "horizon": HORIZON, "windows": WINDOWS, "unit": "std of 12 months"}
    write_result("zero_shot", {"settings": settings, "rows": rows})


def read(path: Path) -> dict[str, np.ndarray]:
    """The columns, each in units of its standard deviation over the first 12 months."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {key: np.array([float(row[key]) for row in rows]) for key in rows[0] if key != "date"}
    train = slice(0, 12 * MONTH)
    return {key: (values - values[train].mean()) / values[train].std() for key, values in columns.items()}


def score(forecast: Any, values: np.ndarray) -> tuple[float, float, float | None]:
    """MSE, MAE, and the share of values inside the 80 % interval where there is one.

    forecast: the past (W, 4096) -> (W, H), or (W, 3, H) with the ends of the interval.
    """
    starts = FIRST + HORIZON * np.arange(WINDOWS)
    past = np.stack([values[start - 4096 : start] for start in starts])
    truth = np.stack([values[start : start + HORIZON] for start in starts])
    found = np.asarray(forecast(past))
    point = found if found.ndim == 2 else found[:, 1]
    inside = None if found.ndim == 2 else float(((found[:, 0] <= truth) & (truth <= found[:, 2])).mean())
    return float(np.square(point - truth).mean()), float(np.abs(point - truth).mean()), inside


@torch.no_grad()
def ours(model: Any, past: np.ndarray) -> np.ndarray:
    target = torch.tensor(past[:, -model.seq_len :, None], dtype=torch.float32)
    batch = {**model.example_inputs(len(past))[0], "past_target": target, "past_observed": target.isfinite()}
    params = model(batch)
    low, high = model.output.quantile(params, (0.1, 0.9)).unbind(-1)
    return torch.stack([low, model.output.point(params), high], dim=1)[:, :, :HORIZON, 0].numpy()


def fracast(past: np.ndarray) -> np.ndarray:
    from fracast import FracastModel

    model = FracastModel.from_pretrained()
    return np.stack([np.asarray(model.forecast(row[-512:], horizon=HORIZON))[:, 4] for row in past])


def last_value(past: np.ndarray) -> np.ndarray:
    return np.repeat(past[:, -1:], HORIZON, axis=1)


def seasonal_naive(past: np.ndarray) -> np.ndarray:
    return np.tile(past[:, -SEASON:], HORIZON // SEASON)


if __name__ == "__main__":
    main()
