"""Which models can be exported: for their own length, for any, as ONNX; and how far the programs are from the models.

    python benchmarks/export_table.py [--models gla_tiny ...] [--sizes tiny] [--no-onnx]

Every model of the registry (by default the smallest of each family; `--sizes tiny small base` takes all), random
weights, float32, one thread. "fixed": the length of `example_inputs`; "any": `length="dynamic"`, run at the lengths
below with 1 and 3 rows; "ONNX": the same in onnxruntime, with a free length where the model has one. The figure is the
largest absolute difference of the outputs from those of the model; what is refused is listed below the table with its
reason. Rows are written as they come: an interrupted run goes on; --models measures some anew. Writes
benchmarks/results/export.json and .md.
"""

from __future__ import annotations

import argparse
import inspect
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from _runs import RESULTS, earlier_rows, write_result

from seqzoo.zoo import create_model, export_model, list_models, model_info
from seqzoo.zoo._export import PlainModel, inputs_of_length, length_axis, without_empty
from seqzoo.zoo._exported import save_exported

SIZES = {"seq_len": 96, "pred_len": 24, "in_channels": 3}  # of forecasters, which have none of their own
LENGTHS = {"tokens": (2, 65, 300), "samples": (8000, 50_001), "frame features": (2, 65, 130), "frames": (2, 17)}
SETTINGS = {"forecasters": SIZES, "lengths": {k: list(v) for k, v in LENGTHS.items()}}
WAYS = ("fixed", "any", "onnx")


def build(name: str) -> Any:
    info = model_info(name)
    needed = any(v is inspect.Parameter.empty for v in info.options.values())
    torch.manual_seed(0)
    return create_model(name, **(SIZES if needed else {})).eval()


def outputs(run: Any, inputs: tuple[Any, ...]) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        found = run(*inputs)
    return found if isinstance(found, dict) else {"y": found}


def difference(model: Any, program: torch.export.ExportedProgram, trials: list[tuple[Any, ...]]) -> float:
    """The largest over all trials; NaN where shapes differ."""
    largest, module = 0.0, program.module()
    for inputs in trials:
        given, absent = without_empty(inputs)
        theirs, ours = outputs(PlainModel(model, absent), given), outputs(module, given)
        for name, value in theirs.items():
            if ours[name].shape != value.shape:
                return float("nan")
            if value.numel():
                largest = max(largest, float((ours[name].double() - value.double()).abs().max()))
    return largest


def attempt(way: str, model: Any) -> dict[str, Any]:
    """The figure of one way, or why it is refused."""
    kind = str(model.input_spec.get("kind"))
    free = length_axis(model) is not None
    start = time.perf_counter()
    try:
        if way == "onnx":
            with tempfile.TemporaryDirectory() as folder:
                import json

                where = save_exported(model, folder, format="onnx", length="dynamic" if free else None)
                found = json.loads((Path(where) / "export.json").read_text(encoding="utf-8"))["largest_difference"]
        elif way == "fixed":
            found = difference(model, export_model(model, length=None, batch=2), [model.example_inputs(2)])
        else:
            program = export_model(model, length="dynamic")
            trials = [inputs_of_length(model, n, 1 + 2 * (i % 2)) for i, n in enumerate(LENGTHS[kind])]
            found = difference(model, program, trials)
    except Exception as error:  # a row for every model: what goes wrong is what the table is for
        return {"refused": " ".join(str(error).split())[:400] or type(error).__name__}
    return {"difference": found, "seconds": round(time.perf_counter() - start, 1)}


def cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return "."
    return "refused" if "refused" in found else f"{found['difference']:.1g}"


def page(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# What can be exported",
        "",
        "Largest absolute difference from the model's own outputs, by `python benchmarks/export_table.py`.",
        "",
        "| model | mixers | fixed length | any length | ONNX |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| `{row['model']}` | {', '.join(row['mixers']) or '.'} | {' | '.join(cell(row.get(way)) for way in WAYS)} |"
        for row in rows
    ]
    reasons = [
        f"- `{row['model']}`, {way}: {row[way]['refused']}"
        for row in rows
        for way in WAYS
        if "refused" in (row.get(way) or {})
    ]
    return "\n".join([*lines, "", *(["Refused:", "", *reasons, ""] if reasons else [])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[])
    parser.add_argument("--sizes", nargs="+", default=["tiny"], help="tiny, small, base; those without a size always")
    parser.add_argument("--no-onnx", action="store_true")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    sized = ("_tiny", "_small", "_base")
    wanted = given.models or [
        n for n in list_models() if not n.endswith(sized) or n.endswith(tuple(f"_{size}" for size in given.sizes))
    ]
    ways = [way for way in WAYS if way != "onnx" or not given.no_onnx]
    rows = {row["model"]: row for row in earlier_rows("export", SETTINGS)}
    command = "python benchmarks/export_table.py --sizes tiny small base"
    for name in wanted if given.models else [n for n in wanted if n not in rows]:
        model = build(name)
        row: dict[str, Any] = {"model": name, "mixers": list(model_info(name).mixers)}
        row |= {way: attempt(way, model) for way in ways}
        rows[name] = {**rows.get(name, {}), **row}
        known = [rows[n] for n in list_models() if n in rows]
        write_result("export", {"settings": SETTINGS, "rows": known, "command": command})
        (RESULTS / "export.md").write_text(page(known), encoding="utf-8")
        print(name, *(f"{way}: {cell(row[way])}" for way in ways), flush=True)


if __name__ == "__main__":
    main()
