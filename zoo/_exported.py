"""What an exported model is: a folder with the program, export.json, and a README.md with the lines that run it.

`model.pt2` needs torch alone, `model.onnx` any runtime of ONNX. export.json holds what goes in and out (names, dtypes,
sizes, which of them are free and how far), the preprocessing, and how far the program was from the model when both were
run. A tokenizer and other files of the model are copied beside it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..blocks.registry import did_you_mean
from ._export import (
    Batch,
    Length,
    PlainModel,
    _examples,
    _name,
    _spec,
    export_model,
    general_sizes,
    generic_length,
    inputs_of_length,
    length_axis,
    without_empty,
)
from ._files import CARD, check_file_name, is_full_disk, write_text
from ._saving import plain

FORMATS = {"torch": "model.pt2", "onnx": "model.onnx"}
RECORD = "export.json"
TOLERANCE = 1e-4  # of the largest output, between the model and what was written
_INLINE_BYTES = 1 << 30  # larger weights lie beside an ONNX file, which holds 2 GiB at most


def save_exported(
    model: nn.Module,
    folder: str | Path,
    *,
    format: Literal["torch", "onnx"] = "torch",
    length: Length = "dynamic",
    batch: Batch = "dynamic",
    example_inputs: tuple[Any, ...] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    files: Mapping[str, str | Path] | None = None,
) -> Path:
    """Write a model as a program that runs without this package; returns the folder.

    format: "torch", for `torch.export.load`, or "onnx" (opset 18 and up). length, batch, example_inputs: as of
    `export_model`. preprocessing, files: what belongs to it; None: what the model was loaded with. What was written is
    read again and run beside the model, at the example's sizes and others. Raises ValueError as `export_model`, for an
    operation that ONNX does not have, for results that differ by more than 1e-4, and for a full disk.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown.{did_you_mean(str(format), FORMATS)}")
    if format == "onnx":
        _need_onnx()
    folder = Path(folder)
    (folder / RECORD).unlink(missing_ok=True)
    program = export_model(model, length=length, batch=batch, example_inputs=example_inputs)
    trials = trial_inputs(model, length, batch, example_inputs)
    record = _record(model, program, trials[0], format)
    record["preprocessing"] = plain(
        getattr(model, "preprocessing", {}) if preprocessing is None else preprocessing, "preprocessing"
    )
    given = dict(getattr(model, "files", {}) if files is None else files)
    for name in given:
        check_file_name(name, "save_exported")
    path = folder / FORMATS[format]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if format == "onnx":
            _write_onnx(program, path, record, model)
        else:
            _write_program(program, path)
        record["files"] = {name: str(shutil.copyfile(source, folder / name).name) for name, source in given.items()}
        record["largest_difference"] = _compare(model, path, trials, record)
        write_text(folder / RECORD, json.dumps(record, indent=2) + "\n")
        write_text(folder / CARD, _readme(record))
    except OSError as error:
        if is_full_disk(error):
            raise ValueError(f"no space left on the disk of {folder}; nothing half-written is kept") from error
        raise
    finally:
        if not (folder / RECORD).is_file():  # written last: without it the rest is not to be used
            path.unlink(missing_ok=True)
    return folder


def run_exported(path: str | Path, inputs: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Tensor]:
    """The outputs by name of a written program, in torch or in onnxruntime."""
    if Path(path).suffix == ".onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        known = {i.name for i in session.get_inputs()}
        found = session.run(None, {k: v.numpy() for k, v in inputs.items() if k in known})
        return {o.name: torch.from_numpy(value) for o, value in zip(session.get_outputs(), found, strict=True)}
    program = torch.export.load(str(path)).module()
    with torch.no_grad():
        output = program(dict(inputs)) if record["one_batch"] else program(*inputs.values())
    return output if isinstance(output, dict) else {record["outputs"][0]["name"]: output}


def trial_inputs(
    model: nn.Module, length: Length, batch: Batch, example: tuple[Any, ...] | None = None
) -> list[tuple[Any, ...]]:
    """Inputs that a program with these free sizes takes: those it was made with, then shorter and longer ones."""
    rows = [1, 3] if batch == "dynamic" else [batch]
    if example is not None:
        return [example]
    if length == "dynamic":
        usual = _examples(model, 1)[0].shape[length_axis(model) or 1]
        lengths = usual, max(2, generic_length(model) - 7)
        return [inputs_of_length(model, n, rows[i % len(rows)]) for i, n in enumerate(lengths)]
    if length is not None:
        return [inputs_of_length(model, length, b) for b in rows]
    return [_examples(model, b) for b in rows]


def named_inputs(inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    """The tensors of positional inputs by the name that a program has for them."""
    kept, _ = without_empty(inputs)
    if len(kept) == 1 and isinstance(kept[0], Mapping):
        return dict(kept[0])
    return {"input" if len(kept) == 1 else f"input{i}": x for i, x in enumerate(kept)}


def _record(model: Any, program: torch.export.ExportedProgram, inputs: tuple[Any, ...], format: str) -> dict[str, Any]:
    names = program.graph_module.meta["outputs"]
    tensors = named_inputs(inputs)
    sizes = [node.meta["val"].shape for node in program.graph.nodes if node.name in _user_inputs(program)]
    results = [node.meta["val"] for node in next(n for n in program.graph.nodes if n.op == "output").args[0]]
    free: dict[str, str] = {}
    for shape, axes in zip(sizes, ([0, length_axis(model)], *[[0, None]] * len(sizes)), strict=False):
        for axis, word in zip(axes, ("batch", "length"), strict=True):
            if axis is not None and not isinstance(shape[axis], int):
                free.setdefault(str(shape[axis]), word)
    ranges = {str(k): v for k, v in program.range_constraints.items()}
    config = getattr(model, "config", {})
    return {
        "model": _name(model),
        "options": plain(config.get("options", {}), "options"),
        "format": format,
        "file": FORMATS[format],
        "made_with": {"torch": torch.__version__},
        "one_batch": len(inputs) == 1 and isinstance(inputs[0], Mapping),
        "inputs": [
            {"name": name, "dtype": _dtype(x), "shape": [free.get(str(n), n) for n in _plain_sizes(shape)]}
            for (name, x), shape in zip(tensors.items(), sizes, strict=True)
        ],
        "outputs": [
            {"name": name, "dtype": _dtype(x), "shape": [free.get(str(n), n) for n in _plain_sizes(x.shape)]}
            for name, x in zip(names, results, strict=True)
        ],
        "sizes": {word: _range(ranges.get(symbol)) for symbol, word in free.items()},
        "input": plain(_spec(model), "input_spec"),
    }


def _user_inputs(program: torch.export.ExportedProgram) -> list[str]:
    return list(program.graph_signature.user_inputs)


def _plain_sizes(shape: Any) -> list[Any]:
    return [int(n) if isinstance(n, int) else str(n) for n in shape]


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _range(found: Any) -> list[int | None]:
    """[least, most], None for no bound."""
    if found is None:
        return [1, None]
    most = int(found.upper) if str(found.upper).isdigit() else None
    return [int(found.lower), None if most is None or most > 1 << 40 else most]


def _need_onnx() -> None:
    missing = []
    for name in ("onnx", "onnxscript"):
        try:
            __import__(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise ValueError(f"format='onnx' needs {' and '.join(missing)}: pip install 'seqzoo[export]'")


def _write_program(program: torch.export.ExportedProgram, path: Path) -> None:
    temporary = path.with_name(f".{os.getpid()}.{path.name}")  # torch.export.save wants the ending .pt2
    try:
        torch.export.save(program, str(temporary))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_onnx(program: torch.export.ExportedProgram, path: Path, record: Mapping[str, Any], model: Any) -> None:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with torch.no_grad(), general_sizes():  # the program is traced once more, as it was made
            made = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=[i["name"] for i in record["inputs"]],
                output_names=[o["name"] for o in record["outputs"]],
            )
    except Exception as error:  # the exporter has no type of its own for what it cannot translate
        raise ValueError(
            f"{_name(model)} has no ONNX form: {onnx_reason(error)}; format='torch' exports it, and a model with "
            "another mixer may have one (docs/export.md lists them)"
        ) from error
    finally:
        logger.setLevel(level)
    if made is None:
        raise ValueError(f"{_name(model)} has no ONNX form; format='torch' exports it")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    made.save(str(path), external_data=size > _INLINE_BYTES)


def onnx_reason(error: BaseException) -> str:
    """The line of an error of torch.onnx that says what it could not translate."""
    seen: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        seen += [line.strip() for line in str(cause).splitlines() if line.strip()]
        cause = cause.__cause__
    wanted = [
        line for line in seen if "No ONNX function" in line or "No decompositions" in line or "not support" in line
    ]
    return (wanted or seen or [type(error).__name__])[-1 if not wanted else 0][:300]


def _compare(model: nn.Module, path: Path, trials: list[tuple[Any, ...]], record: Mapping[str, Any]) -> float | None:
    """The largest difference of the outputs over all trials; None where nothing here runs ONNX. Raises ValueError where
    it is too large, and where onnxruntime cannot run the program."""
    if path.suffix == ".onnx":
        try:
            import onnxruntime  # noqa: F401
        except ImportError:
            return None
    was_training = model.training
    model.eval()
    largest = 0.0
    try:
        for inputs in trials:
            given, absent = without_empty(inputs)
            with torch.no_grad():
                expected = PlainModel(model, absent)(*given)
            wanted = expected if isinstance(expected, dict) else {record["outputs"][0]["name"]: expected}
            try:
                found = run_exported(path, named_inputs(inputs), record)
            except Exception as error:
                if path.suffix != ".onnx":
                    raise
                raise ValueError(  # onnxruntime's errors are no RuntimeErrors
                    f"{_name(model)} has an ONNX form that onnxruntime cannot run: {str(error).splitlines()[0]}; "
                    "format='torch' exports it"
                ) from error
            for name, value in wanted.items():
                other = found[name]
                if other.shape != value.shape:
                    raise ValueError(f"{path}: {name} is {tuple(other.shape)}, the model's {tuple(value.shape)}")
                if not value.numel():
                    continue
                difference = float((other.double() - value.double()).abs().max())
                if difference > TOLERANCE * max(1.0, float(value.double().abs().max())):
                    raise ValueError(
                        f"{path}: {name} differs from the model's by {difference:.2g}; it is not to be used"
                    )
                largest = max(largest, difference)
    finally:
        model.train(was_training)
    return largest


def _readme(record: Mapping[str, Any]) -> str:
    shapes = "\n".join(f"- `{i['name']}`: {i['dtype']} {_shape(i['shape'])}" for i in record["inputs"])
    results = "\n".join(f"- `{o['name']}`: {o['dtype']} {_shape(o['shape'])}" for o in record["outputs"])
    limits = "\n".join(
        f"- `{word}`: from {least}" + ("" if most is None else f" to {most}")
        for word, (least, most) in record["sizes"].items()
    )
    names = [i["name"] for i in record["inputs"]]
    if record["format"] == "onnx":
        feed = ", ".join(f'"{n}": {n}' for n in names)
        lines = f'import onnxruntime\n\nsession = onnxruntime.InferenceSession("{record["file"]}")\n'
        lines += f"outputs = session.run(None, {{{feed}}})"
    else:
        call = "{" + ", ".join(f'"{n}": {n}' for n in names) + "}" if record["one_batch"] else ", ".join(names)
        lines = f'import torch\n\nmodel = torch.export.load("{record["file"]}").module()\noutputs = model({call})'
    sizes = f"\nSizes that are free:\n\n{limits}\n" if limits else "\nAll sizes are fixed.\n"
    return (
        f"# {record['model']}, exported\n\n```python\n{lines}\n```\n\nIn:\n\n{shapes}\n\nOut:\n\n{results}\n{sizes}"
        "\nexport.json has the preprocessing and what else belongs to it.\n"
    )


def _shape(sizes: list[Any]) -> str:
    return f"({', '.join(str(n) for n in sizes)}{',' if len(sizes) == 1 else ''})"
