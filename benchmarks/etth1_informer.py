"""Informer on ETTh1 by the paper's protocol: test MSE and MAE over seeds, beside the published numbers.

    SEQZOO_DATA=/folder/with/ETTh1.csv python benchmarks/etth1_informer.py --seeds 3 --horizons 24 48

Runs `lightning fit experiment=forecasting/etth1_informer` once per seed and horizon and writes
benchmarks/results/etth1_informer.json. Published: Zhou et al., AAAI 2021, multivariate ETTh1.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from _runs import ROOT, fit, write_result

PAPER = {24: (0.577, 0.549), 48: (0.685, 0.625), 168: (0.931, 0.752)}
# seq_len, label_len, ProbSparse factor of the published scripts
SETTINGS = {24: (48, 48, 3), 48: (96, 48, 5), 168: (168, 168, 5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--horizons", type=int, nargs="+", default=[24], choices=sorted(PAPER))
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "benchmarks")
    options = parser.parse_args()
    rows: dict[int, dict] = {}
    for horizon in options.horizons:
        scores = []
        for seed in range(options.seeds):
            run_dir = options.runs / f"etth1_informer_{horizon}_{seed}"
            metrics = fit(overrides(horizon, seed, options.precision), run_dir, threads=options.threads)
            scores.append((metrics["test/mse"], metrics["test/mae"]))
            mse, mae = scores[-1]
            print(
                f"horizon {horizon} seed {seed}: MSE {mse:.4f} MAE {mae:.4f} ({metrics['seconds']:.0f} s)", flush=True
            )
            # written after every seed: these are long runs
            rows[horizon] = summary(horizon, scores, options.precision)
            write_result("etth1_informer", {"rows": list(rows.values())})
        row = rows[horizon]
        print(f"horizon {horizon}: MSE {row['mse']:.4f} (paper {row['paper_mse']}), ", end="")
        print(f"MAE {row['mae']:.4f} (paper {row['paper_mae']}), mean of {row['seeds']} seeds", flush=True)


def overrides(horizon: int, seed: int, precision: str) -> list[str]:
    seq_len, label_len, factor = SETTINGS[horizon]
    return [
        "experiment=forecasting/etth1_informer",
        f"data.seq_len={seq_len}",
        f"data.pred_len={horizon}",
        f"model.label_len={label_len}",
        f"model.factor={factor}",
        f"seed={seed}",
        f"trainer.precision={precision}",
    ]


def summary(horizon: int, scores: list[tuple[float, float]], precision: str) -> dict:
    return {
        "horizon": horizon,
        "seeds": len(scores),
        "mse": statistics.mean(s[0] for s in scores),
        "mae": statistics.mean(s[1] for s in scores),
        "mse_by_seed": [s[0] for s in scores],
        "mae_by_seed": [s[1] for s in scores],
        "paper_mse": PAPER[horizon][0],
        "paper_mae": PAPER[horizon][1],
        "precision": precision,
    }


if __name__ == "__main__":
    main()
