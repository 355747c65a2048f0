"""Every registered mixer in the same slot: `patch_small` on ETTh1, one table.

    SEQZOO_DATA=/folder/with/ETTh1.csv python benchmarks/etth1_mixers.py

Runs `lightning fit experiment=forecasting/etth1_patch mixer=<key>` for each mixer that can read a whole window, and
`model=dlinear` beside them, and writes benchmarks/results/etth1_mixers.json after each. With --mixers, rows of others
that an earlier call wrote with the same settings stay.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from _runs import ROOT, earlier_rows, fit, write_result

# 512 steps are 21 patches: fewer agents than those, and small regions; everything else is the mixer's default.
OPTIONS = {"agent": ["mixer.num_agents=9"], "bi_level_routing": ["mixer.region_size=4"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", nargs="+", default=None, help="all that support the pattern self")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "benchmarks")
    parser.add_argument("overrides", nargs="*", help="further overrides of the experiment")
    options = parser.parse_args()

    import seqzoo

    settings = {"seed": options.seed, "overrides": options.overrides}
    rows = {entry["mixer"]: entry for entry in earlier_rows("etth1_mixers", settings)}

    def add(entry: dict[str, Any]) -> None:
        rows[entry["mixer"]] = entry
        print(entry, flush=True)
        write_result(
            "etth1_mixers", {"settings": settings, "rows": sorted(rows.values(), key=lambda entry: entry["mse"])}
        )

    for mixer in options.mixers or seqzoo.list_mixers(pattern="self"):
        metrics = fit(
            [
                "experiment=forecasting/etth1_patch",
                f"mixer={mixer}",
                f"seed={options.seed}",
                *OPTIONS.get(mixer, []),
                *options.overrides,
            ],
            options.runs / f"etth1_patch_{mixer}",
            threads=options.threads,
        )
        add(row(mixer, metrics))
    linear = ["data=etth1", "model=dlinear", "data.seq_len=512", "data.pred_len=96", "data.batch_size=128"]
    linear += ["task.loss=mse", "trainer.max_epochs=8", f"seed={options.seed}"]
    metrics = fit(linear, options.runs / "etth1_dlinear", threads=options.threads)
    add(row("(dlinear)", metrics))
    for method, units in metrics["test"].items():
        if method.startswith("seasonal-naive"):
            scaled = units["scaled"]["overall"]
            found = {"mse": scaled["mse"], "mae": scaled["mae"], "epochs": 0, "seconds": 0}
            add({"mixer": f"({method})", **found})


def row(name: str, metrics: dict[str, Any]) -> dict[str, Any]:
    return {
        "mixer": name,
        "mse": metrics["test/mse"],
        "mae": metrics["test/mae"],
        "epochs": metrics["epochs"],
        "seconds": round(metrics["seconds"]),
    }


if __name__ == "__main__":
    main()
