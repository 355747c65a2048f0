"""How the settings of the forecasting experiments were chosen: candidates compared on the validation part alone.

    python benchmarks/forecast_search.py weather
    SEQZOO_DATA=/folder/with/ETTh1.csv python benchmarks/forecast_search.py etth1_patch etth1_dlinear

Trains every candidate of an experiment once (seed 0), without its test, and scores its best checkpoint on the
validation part beside the seasonal naive forecast. The best by the experiment's criterion is then trained with
seeds 0, 1, 2 and tested; its overrides belong into conf/experiment. Writes benchmarks/results/<experiment>_search.json
(validation) and benchmarks/results/<experiment>_test.json (test of the winner, by seed).
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from _runs import ROOT, fit, write_result

DLINEAR = ["data=etth1", "model=dlinear", "task.loss=mse", "data.batch_size=128", "data.pred_len=96"]

# base: what all candidates share. criterion: what decides, the lowest wins; `worst_ratio` is the largest over the
# channels of MAE over the seasonal naive MAE, because the experiment claims to beat it on every channel.
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "weather": {
        "criterion": "worst_ratio",
        "base": ["experiment=forecasting/weather"],
        "candidates": [
            ["data.seq_len=120"],
            ["data.seq_len=72"],
            ["data.seq_len=168"],
            ["data.seq_len=120", "model.linear_skip=false"],
            ["data.seq_len=120", "model.channel_mixing=false"],
            ["data.seq_len=120", "model.dim=64"],
            ["data.seq_len=120", "model.calendar=true"],
            ["data.seq_len=120", "optimizer.lr=1.0e-3"],
            ["data.seq_len=120", "model.revin=false"],
        ],
    },
    "etth1_patch": {
        "criterion": "mse",
        "base": ["experiment=forecasting/etth1_patch", "mixer=softmax"],
        "candidates": [
            ["data.seq_len=512"],
            ["data.seq_len=336"],
            ["data.seq_len=512", "model.head_drop=0.3"],
            ["data.seq_len=512", "optimizer.lr=3.0e-4"],
        ],
    },
    "etth1_dlinear": {
        "criterion": "mse",
        "base": [*DLINEAR, "trainer.max_epochs=8"],
        "candidates": [
            [f"data.seq_len={length}", f"optimizer.lr={rate}"] for length in (336, 512) for rate in (1e-3, 3e-3, 3e-4)
        ],
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", choices=sorted(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, default=3, help="of the winner's test")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "benchmarks")
    options = parser.parse_args()
    for name in options.experiments:
        chosen = search(name, options.runs, options.threads)
        test(name, chosen, options.runs, options.threads, options.seeds)


def search(name: str, runs: Path, threads: int | None) -> list[str]:
    """Train and score every candidate; the overrides of the best."""
    experiment = EXPERIMENTS[name]
    rows = []
    for number, candidate in enumerate(experiment["candidates"]):
        run_dir = runs / f"{name}_search_{number}"
        done = fit([*experiment["base"], *candidate, "seed=0", "test_after_fit=false"], run_dir, threads=threads)
        rows.append({"candidate": " ".join(candidate), **validation_scores(run_dir), "seconds": round(done["seconds"])})
        print(rows[-1], flush=True)
    best = min(range(len(rows)), key=lambda i: rows[i][experiment["criterion"]])
    for i, row in enumerate(rows):
        row["chosen"] = i == best
    write_result(f"{name}_search", {"criterion": experiment["criterion"], "part": "validation", "rows": rows})
    return experiment["candidates"][best]


def validation_scores(run_dir: Path) -> dict[str, float]:
    """MSE and MAE of the best checkpoint on the validation part, scaled units, and the MAE's ratios to the naive's."""
    import lightning as L
    from omegaconf import OmegaConf

    from seqzoo.pipelines.checkpoints import load_checkpoint
    from seqzoo.pipelines.forecasting.task import build_data, load_module

    cfg = OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml"))
    path = run_dir / "checkpoints" / "best.ckpt"
    data = build_data(cfg)
    data.setup("fit")
    module = load_module(load_checkpoint(path), path, cfg)
    trainer = L.Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    trainer.test(module, dataloaders=data.val_dataloader(), verbose=False)
    model, naive = (
        module.test_sums[key]["scaled"].compute()
        for key in (module.hparams["model"]["name"], f"seasonal-naive-{module.season}")
    )
    ratios = [own / other for own, other in zip(model["channel"]["mae"], naive["channel"]["mae"], strict=True)]
    return {
        "mse": model["overall"]["mse"],
        "mae": model["overall"]["mae"],
        "worst_ratio": max(ratios),
        "mean_ratio": math.fsum(ratios) / len(ratios),
    }


def test(name: str, chosen: list[str], runs: Path, threads: int | None, seeds: int) -> None:
    """Train the winner with every seed and test it: once, after the choice."""
    rows = []
    for seed in range(seeds):
        metrics = fit(
            [*EXPERIMENTS[name]["base"], *chosen, f"seed={seed}"], runs / f"{name}_test_{seed}", threads=threads
        )
        rows.append({"seed": seed, **test_scores(metrics)})
        print(name, rows[-1], flush=True)
        write_result(f"{name}_test", {"settings": chosen, "rows": rows})


def test_scores(metrics: dict[str, Any]) -> dict[str, float]:
    """MSE, MAE and, by channel, the ratio of the MAE to the seasonal naive's, in scaled units."""
    tables = metrics["test"]
    model = next(iter(tables))
    naive = next(key for key in tables if key.startswith("seasonal-naive"))
    own, other = (tables[key]["scaled"]["channel"]["mae"] for key in (model, naive))
    channels = tables[model]["scaled"]["channels"]
    ratios = {f"{c} / naive": a / b for c, a, b in zip(channels, own, other, strict=True)}
    return {"mse": metrics["test/mse"], "mae": metrics["test/mae"], **ratios}


if __name__ == "__main__":
    main()
