"""Memory and speed of the forecasting data path on a file of 10 million rows and 8 columns.

python benchmarks/forecast_loader.py [--rows 10000000] [--steps 300]

Writes the file as Parquet into a temporary folder, trains the smallest models on it with a Lightning trainer,
each in a process of its own, and prints the peak resident memory beside its bound (1.5 x the columns' own
bytes + 1 GB), and the samples per second of the loader alone beside those that the models can train on
(forward, backward and AdamW step on one batch, no loader), medians of seven rounds in turn, both in CPU time, so that
a busy machine slows neither. All on one thread. Results: benchmarks/results/forecast_loader.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _runs import write_result

COLUMNS, SEQ_LEN, PRED_LEN, BATCH = 8, 168, 24, 64
ROUNDS = 7
MODELS = ("dlinear", "patch_tiny")


def write_parquet(path: Path, rows: int, chunk: int = 200_000) -> None:
    """A row per second from 2000 on: daily waves of different phase plus noise."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    generator = np.random.default_rng(0)
    schema = pa.schema([("date", pa.timestamp("s")), *((f"c{i}", pa.float32()) for i in range(COLUMNS))])
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, rows, chunk):
            second = np.arange(first, min(first + chunk, rows))
            waves = np.sin(2 * np.pi * second[:, None] / 86_400 + np.arange(COLUMNS))
            noise = generator.normal(scale=0.3, size=waves.shape)
            columns = list((waves + noise).astype(np.float32).T)
            writer.write(pa.table([(946_684_800 + second).astype("M8[s]"), *columns], schema=schema))


def measure(path: Path, cache: Path, model: str, steps: int) -> dict[str, Any]:
    """In this process: train, then time the loader and the model apart."""
    import lightning as L
    import torch

    from seqzoo.pipelines.forecasting.data import ForecastData
    from seqzoo.pipelines.forecasting.module import ForecastModule

    torch.set_num_threads(1)
    imported = peak_bytes()
    start = time.perf_counter()
    data = ForecastData(
        path,
        seq_len=SEQ_LEN,
        pred_len=PRED_LEN,
        batch_size=BATCH,
        steps=steps,
        cache_dir=cache,
        split_ratio=[0.98, 0.01, 0.01],
    )
    data.setup()
    ready = time.perf_counter() - start
    module = ForecastModule(
        {"name": model},
        {"loss": "mse", "quantiles": None},
        {"name": "adamw", "lr": 1e-3, "weight_decay": 0.0, "betas": [0.9, 0.999]},
        {"name": "none"},
        data.schema(),
    )
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    start = time.process_time()
    trainer.fit(module, data)
    trained = time.process_time() - start
    peak = peak_bytes()
    optimizer = torch.optim.AdamW(module.net.parameters(), lr=1e-3)
    module.train()
    loader_seconds, model_seconds = [], []
    for _ in range(ROUNDS):  # in turn, so that what else the machine does meets both
        loader = iter(data.train_dataloader())
        batch = next(loader)  # with it come the permutation and the first touch of the file
        start = time.process_time()
        rest = sum(1 for _ in loader)
        loader_seconds.append((time.process_time() - start) / rest)
        start = time.process_time()
        for _ in range(rest):
            optimizer.zero_grad()
            params = module.net(batch)
            module.output.loss(params, batch["future_target"], batch["future_observed"]).backward()
            optimizer.step()
        model_seconds.append((time.process_time() - start) / rest)
    own = data.table.values.nbytes
    return {
        "model": model,
        "parameters": sum(p.numel() for p in module.net.parameters()),
        "rows": data.table.num_rows,
        "column_bytes": own,
        "rss_after_imports": imported,
        "rss_peak_training": peak,
        "rss_bound": int(1.5 * own + 1e9),
        "seconds_to_ready": round(ready, 2),
        "trainer_samples_per_second": round(steps * BATCH / trained),
        "loader_samples_per_second": round(BATCH / statistics.median(loader_seconds)),
        "model_samples_per_second": round(BATCH / statistics.median(model_seconds)),
    }


def peak_bytes() -> int:
    """Peak resident set of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--measure", nargs=3, metavar=("FILE", "CACHE", "MODEL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        file, cache, model = arguments.measure
        print(json.dumps(measure(Path(file), Path(cache), model, arguments.steps)))
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.parquet"
        write_parquet(path, arguments.rows)
        for model in MODELS:
            # A cache for each: every process pays for reading the file.
            command = [sys.executable, __file__, "--steps", str(arguments.steps), "--measure", str(path)]
            result = subprocess.run(
                [*command, f"{folder}/{model}", model], stdout=subprocess.PIPE, text=True, check=True
            )
            row = json.loads(result.stdout.splitlines()[-1])
            results.append(row)
            ratio = row["loader_samples_per_second"] / row["model_samples_per_second"]
            print(
                f"{model}: peak {row['rss_peak_training'] / 1e6:.0f} MB, bound {row['rss_bound'] / 1e6:.0f} MB "
                f"({row['rss_after_imports'] / 1e6:.0f} MB are imports); "
                f"loader {row['loader_samples_per_second']} samples/s, "
                f"model {row['model_samples_per_second']}, ratio {ratio:.1f}"
            )
    settings = {"columns": COLUMNS, "seq_len": SEQ_LEN, "pred_len": PRED_LEN, "batch_size": BATCH, "threads": 1}
    print(write_result("forecast_loader", {"settings": settings, "rows": results}))


if __name__ == "__main__":
    main()
