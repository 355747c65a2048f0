"""Runs of each pipeline killed at random moments and resumed with `ckpt_path=last`: are they equal to one that was not?

`python benchmarks/soak.py` kills 20 times and writes benchmarks/results/soak.json and soak.md, a pipeline at a time;
called again it goes on. --long trains as many steps as six hours have, short ones, with everything that may grow
watched (see _soak_long), and writes soak_long.json, .csv and .png. SEQZOO_DATA: the folder of fsdd, audio_long and
videos. One thread, so that sums are always in the same order.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

from _runs import RESULTS, earlier_rows, write_result
from _soak import (
    CASES,
    differences,
    environment,
    kill_at,
    kill_in_writing,
    run_folder,
    start,
    steps_logged,
    steps_saved,
)

HEADER = (
    "| pipeline | kill | moment | steps done | in the checkpoint | lost | left behind | the end is equal |\n"
    "|---|---|---|---|---|---|---|---|"
)


def chain(case: str, root: Path, kills: int, seed: int, fresh: bool) -> list[dict[str, Any]]:
    """A run killed so many times and resumed each time, beside one that is left alone; a row for each kill."""
    random_ = random.Random(f"{seed} {case}")
    env = environment(os.environ.get("SEQZOO_DATA"))
    whole, killed = root / "whole", root / "killed"
    if start(case, whole, env=env, fresh=fresh).wait():
        raise SystemExit(f"{case} fails: see {whole}/said.txt")
    reference = run_folder(whole)
    total = steps_logged(reference)
    rows: list[dict[str, Any]] = []
    begin = 0
    for number in range(kills):
        process = start(case, killed, *(["ckpt_path=last"] if begin else []), env=env, fresh=fresh)
        writing = number == kills - 1
        # the kills share the run: each lies in what the one before left
        step = random_.randint(begin + 2, max(begin + 2, begin + (total - begin) * 2 // (kills - number + 1)))
        delay, write = round(random_.uniform(0, 0.2), 3), random_.randint(2, 4)
        hit = kill_in_writing(process, killed, write) if writing else kill_at(process, killed, step, delay)
        run = run_folder(killed)
        done, begin = steps_logged(run), steps_saved(run) or begin
        moment = (
            f"in the writing of a checkpoint, {write} or later" if writing else f"step {step} and {delay * 1000:.0f} ms"
        )
        left = sorted(path.name.split("-")[0] for path in (run / "checkpoints").glob(".*.tmp")) if run else []
        rows.append(
            {
                "pipeline": case,
                "kill": number + 1,
                "moment": moment if hit else f"{moment}: it had ended",
                "done": done,
                "saved": begin,
                "lost": done - begin,
                "left": ", ".join(left),
                "interpreter": "new" if fresh else "forked",
            }
        )
        print(rows[-1], flush=True)
    last = start(case, killed, "ckpt_path=last", env=env, fresh=fresh).wait()
    found = differences(reference, run_folder(killed)) if last == 0 else [f"the resumed run ended with {last}"]  # type: ignore[arg-type]
    print(case, found or "equal", flush=True)
    return [{**row, "steps": total, "equal": not found, "differences": found[:10]} for row in rows]


def table(rows: list[dict[str, Any]]) -> str:
    """The kills as Markdown."""
    lines = [
        f"| {r['pipeline']} | {r['kill']} | {r['moment']} | {r['done']} of {r['steps']} | {r['saved']} | {r['lost']} "
        f"| {r['left'] or '-'} | {'yes' if r['equal'] else 'NO'} |"
        for r in rows
    ]
    equal, runs = (len({r["pipeline"] for r in rows if r["equal"] or every}) for every in (False, True))
    text = f"{len(rows)} kills with `kill -9`, {equal} of {runs} runs end equal bit for bit: "
    text += "weights, optimizer, schedule, data position, random states, metrics.csv, tables, pictures, exported model."
    return "\n".join(["# Kills", "", text, "", HEADER, *lines]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30, help="altogether")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--fresh", action="store_true", help="start a new interpreter for each run: minutes longer")
    parser.add_argument("--long", action="store_true", help="the long run instead of the kills")
    parser.add_argument("--steps", type=int, help="of the long run; as many as six hours have")
    parser.add_argument("--minutes", type=float, default=60.0, help="of the long run, at most")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="soak-"))
    if options.long:
        from _soak_long import STEPS, long_run

        long_run(root, options.minutes, options.steps or STEPS)
    else:
        settings = {"seed": options.seed, "kills": options.kills}
        rows = earlier_rows("soak", settings)
        for place, case in enumerate(CASES):
            if case not in options.cases or any(row["pipeline"] == case for row in rows):
                continue
            kills = options.kills // len(CASES) + (place < options.kills % len(CASES))
            rows += chain(case, root / str(place), kills, options.seed, options.fresh)
            write_result("soak", {"settings": settings, "rows": rows})
            (RESULTS / "soak.md").write_text(table(rows), encoding="utf-8")
    shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
