"""Two processes against one: weights after some steps, metrics, and the samples of every pipeline.

    python benchmarks/ranks.py [--steps 5] [--cases text documents ...] [--strategies ddp fsdp context_parallel]

Every case of _rank_cases.py is trained for so many steps by `fit`, by one process with batches of 8 and by two (gloo,
on the CPU) with batches of 4, or with halves of the rows of 8 (context_parallel): the same rows, gradients clipped, SGD
with momentum. (Adam divides by the size of a gradient: where that is 0 but for rounding, as that of the bias of softmax
keys, its step is as large as any.) Given are the largest difference of a weight or running statistic, and of the
exported models; the largest difference of a figure of `test` on the checkpoint of one process by one and by two; the
samples that were tested; and whether the files that `predict` writes are the same bytes. Writes
benchmarks/results/ranks.json and .md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _rank_cases import CASES, Case, fill, replace_encoders

WORLD, BATCH, EVAL_BATCH = 2, 8, 2
_OPTIONS = [
    *("trainer.accelerator=cpu", "trainer.max_epochs=1", "trainer.gradient_clip_val=0.5", "optimizer=sgd"),
    *("optimizer.lr=0.05", "scheduler=none", "logger.tensorboard=false", "logger.csv=false", "callbacks.progress=none"),
    *("callbacks.early_stopping=null", "test_after_fit=false", "seed=3"),
]
_COUNTS = ("pairs", "documents", "clips", "events", "count", "windows")


def config(case: Case, data: Path, run_dir: Path, *overrides: str) -> dict[str, Any]:
    """The composed config of a case as plain containers."""
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    GlobalHydra.instance().clear()
    given = [*case.overrides.split(), *_OPTIONS, f"data.path={data / case.data}", f"paths.runs={run_dir.parent}"]
    if not case.name.startswith(("audio_events", "video_grounding")):
        given.append(f"data.eval_batch_size={EVAL_BATCH}")
    with initialize_config_module("seqzoo.conf", version_base="1.3"):
        cfg: Any = OmegaConf.to_container(compose("config", overrides=[*given, *overrides]), resolve=True)
    return {str(key): value for key, value in cfg.items()}


def run(command: str, case: Case, data: Path, run_dir: Path, steps: int, *, ranks: int, strategy: str) -> Any:
    """What a command returns in this process, which is one of `ranks`."""
    from seqzoo.pipelines.run import execute

    each = BATCH if strategy == "context_parallel" else BATCH // ranks
    options = [f"data.batch_size={each}", f"data.steps={steps}"]
    options += [f"trainer={strategy}", f"trainer.devices={ranks}"] if ranks > 1 else []
    if command != "fit":
        options.append(f"ckpt_path={run_dir.parent / 'one-fit' / 'checkpoints' / 'last.ckpt'}")
    return execute(command, config(case, data, run_dir, *options, "trainer.accelerator=cpu"), run_dir)


def processes(number: int, function: Callable[[int], Any]) -> list[Any]:
    """What the function returns in each of so many processes, forked from this one, which runs nothing itself: threads
    of libraries do not survive a fork."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    queue: Any = context.Queue()
    started = [
        context.Process(target=_rank, args=(function, rank, number, port, queue), daemon=True) for rank in range(number)
    ]
    for process in started:
        process.start()
    found: list[Any] = []
    try:
        for _ in started:
            found.append(queue.get(timeout=1800))
            if found[-1][2]:
                raise RuntimeError(f"process {found[-1][0]}: {found[-1][2]}")
    finally:
        for process in started:
            process.kill()
            process.join()
    return [value for _, value, _ in sorted(found, key=lambda item: item[0])]


def _rank(function: Callable[[int], Any], rank: int, number: int, port: int, queue: Any) -> None:
    if number > 1:
        os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"WORLD_SIZE": str(number), "RANK": str(rank)}
    torch.set_num_threads(1)
    try:
        queue.put((rank, function(rank), None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))


def compare(
    cases: Sequence[Case], data: Path, runs: Path, steps: int, strategies: Sequence[str] = ("ddp",)
) -> list[dict[str, Any]]:
    """A row for each case and strategy. What one process does is done in one, what two do in one pair of them."""
    replace_encoders()
    folders = {case.name: runs / case.name.replace(":", "").replace(" ", "_") for case in cases}

    def single(rank: int) -> dict[str, dict[str, Any]]:
        return {
            case.name: {
                word: _quiet(run, word, case, data, folders[case.name] / f"one-{word}", steps, ranks=1, strategy="")
                for word in words(case)
            }
            for case in cases
        }

    def both(rank: int) -> dict[tuple[str, str], Any]:
        found: dict[tuple[str, str], Any] = {}
        for case in cases:
            for strategy in fitting(case, strategies):
                commands = words(case) if strategy == "ddp" else ["fit"]
                try:
                    for word in commands:
                        folder = folders[case.name] / f"{strategy}-{word}"
                        found[case.name, strategy] = {
                            **found.get((case.name, strategy), {}),
                            word: _quiet(run, word, case, data, folder, steps, ranks=WORLD, strategy=strategy),
                        }
                except Exception as error:
                    from seqzoo.pipelines.errors import UserError

                    if not isinstance(error, UserError):
                        raise RuntimeError(f"{case.name}, {strategy}") from error
                    found[case.name, strategy] = str(error)
        return found

    alone, pairs = processes(1, single)[0], processes(WORLD, both)[0]
    return [
        row(case, strategy, alone[case.name], pairs[case.name, strategy], folders[case.name])
        for case in cases
        for strategy in fitting(case, strategies)
    ]


def fitting(case: Case, strategies: Sequence[str]) -> list[str]:
    """Of the strategies those that a case is for."""
    return [strategy for strategy in strategies if case.cut or strategy != "context_parallel"]


def words(case: Case) -> list[str]:
    return ["fit", "test", "predict"] if case.answers else ["fit", "test"]


def row(case: Case, strategy: str, one: dict[str, Any], two: Any, folder: Path) -> dict[str, Any]:
    """What is said of a case. two: the results of the first of two processes, or why there are none."""
    found: dict[str, Any] = {"pipeline": case.name, "strategy": strategy, "what": case.what}
    if isinstance(two, str):
        return {**found, "refused": two}
    before, after = (state(folder / f"{name}-fit") for name in ("one", strategy))
    if before.keys() != after.keys():
        raise RuntimeError(f"{case.name}: other weights, {sorted(before.keys() ^ after.keys())}")
    floats = [key for key, value in before.items() if value.is_floating_point()]
    for key in set(before) - set(floats):
        if not torch.equal(before[key], after[key]):
            raise RuntimeError(f"{case.name}: {key} differs, {before[key]} and {after[key]}")
    each = {key: float((before[key] - after[key]).abs().max()) for key in floats if before[key].numel()}
    worst = max(each, key=lambda key: each[key])
    found |= {"weights": sum(before[key].numel() for key in floats), "difference": each[worst], "where": worst}
    shipped = [exported(folder / f"{name}-fit" / "model") for name in ("one", strategy)]
    if shipped[0].keys() != shipped[1].keys():
        raise RuntimeError(f"{case.name}: other weights exported, {sorted(shipped[0].keys() ^ shipped[1].keys())}")
    found["exported differ by"] = max(
        float((a - shipped[1][k]).abs().max()) for k, a in shipped[0].items() if a.numel()
    )
    if "test" in two:
        first, second = numbers(one["test"]), numbers(two["test"])
        if first.keys() != second.keys():
            raise RuntimeError(f"{case.name}: other figures, {sorted(first.keys() ^ second.keys())}")
        found["figures"] = len(first)
        found["figures differ by"] = max(abs(first[key] - second[key]) for key in first)
        found["tested"] = next((v for k, v in second.items() if k.rsplit("/", 1)[-1] in _COUNTS), None)
    if "predict" in two:
        tables = [(folder / f"{name}-predict" / "predictions.csv").read_bytes() for name in ("one", strategy)]
        found |= {"answers": tables[0].count(b"\n") - 1, "answers equal": tables[0] == tables[1]}
    return found


def state(run_dir: Path) -> dict[str, torch.Tensor]:
    """The weights and buffers of a run's last checkpoint."""
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def exported(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of the model that a run leaves."""
    from safetensors.torch import load_file

    return {key: value.double() for key, value in load_file(folder / "model.safetensors").items()}


def numbers(values: Any, name: str = "") -> dict[str, float]:
    """The finite numbers of nested containers by their path."""
    if isinstance(values, dict):
        return {k: v for key, value in values.items() for k, v in numbers(value, f"{name}/{key}").items()}
    if isinstance(values, (list, tuple)):
        return {k: v for i, value in enumerate(values) for k, v in numbers(value, f"{name}/{i}").items()}
    number = values if isinstance(values, (int, float)) and not isinstance(values, bool) else None
    return {} if number is None or number != number else {name: float(number)}


def _quiet(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*args, **options)


def page(rows: Sequence[dict[str, Any]], steps: int) -> str:
    """The rows as a Markdown page."""
    lines = [
        "# One process and two",
        "",
        f"`python benchmarks/ranks.py --steps {steps}`: {steps} steps of {BATCH} rows by one process, and of "
        f"{BATCH // WORLD} in each of two (gloo, CPU); with context_parallel of {BATCH} in both, half of each.",
        "",
        "| pipeline | strategy | what | weights | largest difference | exported | `test` | tested | `predict` |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in rows:
        cells = [one["pipeline"], one["strategy"], one["what"]]
        if "refused" in one:
            cells += [f"refused: {one['refused']}", "", "", "", "", ""]
        else:
            cells += [f"{one['weights']:,}", f"{one['difference']:.1e}", f"{one['exported differ by']:.1e}"]
            cells.append(f"{one['figures']} figures, {one['figures differ by']:.1e}" if "figures" in one else "")
            cells.append("" if one.get("tested") is None else f"{one['tested']:.0f}")
            same = "equal" if one.get("answers equal") else "NOT EQUAL"
            cells.append(f"{one['answers']} rows, {same}" if "answers" in one else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    from _runs import RESULTS, write_result

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--cases", nargs="*", help="names of cases; all")
    parser.add_argument("--strategies", nargs="*", default=["ddp", "fsdp", "context_parallel"])
    parser.add_argument("--folder", type=Path, default=RESULTS)
    given = parser.parse_args()
    chosen = [case for case in CASES if not given.cases or case.name in given.cases]
    import seqzoo.pipelines.run  # noqa: F401  # before the processes part

    with tempfile.TemporaryDirectory() as root:
        os.environ["SEQZOO_CACHE"] = f"{root}/cache"
        rows = compare(chosen, fill(Path(root, "data")), Path(root, "runs"), given.steps, given.strategies)
    write_result("ranks", {"settings": {"steps": given.steps}, "rows": rows}, given.folder)
    text = page(rows, given.steps)
    (given.folder / "ranks.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
