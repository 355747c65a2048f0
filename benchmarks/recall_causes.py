"""Why some mixers recall little in recall.py: the easiest of its tasks alone, longer, and with one option changed.

    python benchmarks/recall_causes.py [--mixers gla mega] [--steps 3000]

Model, optimizer and batches are those of recall.py, trained on rows of four pairs in 64 tokens only, for twice as many
steps. The mixers are those below 0.9 at four pairs there, with softmax and linear as controls; each as there, then
with one option changed at a time. Writes
benchmarks/results/recall_causes.json; rows that stand there with the same settings are kept.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from _runs import earlier_rows, write_result
from recall import OPTIONS, TRAINING, accuracy, train

DIM, BATCH, RATE = 64, 32, 3e-3
# "" is the mixer as recall.py has it.
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "softmax": {},
    "linear": {},
    "gla": {"d_conv=4": {"d_conv": 4}, "expand_k=1": {"expand_k": 1.0}},
    "mamba": {},
    "mamba2": {},
    "s4d": {},
    "mega": {"chunk_size=64, the row": {"chunk_size": 64}},
    "tcnca": {"chunk_size=64, the row": {"chunk_size": 64}},
    "long_vq": {"quantize=False": {"quantize": False}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", nargs="+", default=list(CHANGES), choices=list(CHANGES), metavar="MIXER")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"dim": DIM, "batch": BATCH, "lr": RATE, "steps": options.steps, "seed": options.seed}
    settings |= {"task": "4 pairs in 64"}
    rows = earlier_rows("recall_causes", settings)
    for name in options.mixers:
        for change, extra in {"": {}, **CHANGES[name]}.items():
            mixer = {"name": name, **OPTIONS.get(name, {}), **extra}
            start = time.process_time()
            model = train(mixer, DIM, RATE, options.steps, BATCH, options.seed, TRAINING[:1])
            row = {
                "mixer": name,
                "changed": change,
                "accuracy": accuracy(model, *TRAINING[0], seed=1000),
                "CPU seconds": round(time.process_time() - start),
            }
            print(row, flush=True)
            rows = [*(r for r in rows if (r["mixer"], r["changed"]) != (name, change)), row]
            write_result("recall_causes", {"settings": settings, "rows": rows})  # each takes minutes


if __name__ == "__main__":
    main()
