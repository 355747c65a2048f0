"""`lightning export`: a trained model as a program that needs neither seqzoo nor its sources."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import UserError, nearest

USAGE = """usage: lightning export SOURCE TARGET [format=torch|onnx] [length=auto|dynamic|example|N] [batch=dynamic|N]
                        [overwrite=true]
       SOURCE: the folder of a run, a folder that save_model wrote, MODEL.TAG, or org/name of a hub;
       TARGET: a new folder: the program (model.pt2 or model.onnx), export.json, README.md with the lines that run it,
       and the tokenizer and other files of the model; length: of its input, in tokens, samples or frames:
       dynamic for any, example for that of the model's own example, auto for dynamic where the model has a length"""
_OPTIONS = {"format": "torch", "length": "auto", "batch": "dynamic", "overwrite": "false"}
_FORMATS = ("torch", "onnx")
_FLAGS = {"true": True, "false": False}


def main(arguments: Sequence[str]) -> int:
    """Run the command with its words after `export`; returns the exit status. Raises UserError for wrong words, and
    with the reason for what cannot be exported."""
    if not arguments or {"--help", "-h"} & set(arguments):
        print(USAGE)
        return 0
    (source, target), options = _parse(arguments)
    folder = Path(target)
    if folder.exists() and not _FLAGS[options["overwrite"]]:
        raise UserError(f"{target} is there already: name a new folder, or give overwrite=true")
    from ..zoo import load_model
    from ..zoo._export import length_axis
    from ..zoo._exported import RECORD, save_exported
    from ..zoo._files import CONFIG

    if (folder / CONFIG).is_file():
        raise UserError(f"{target} is a saved model, whose files an export would replace: name another folder")
    try:
        model: Any = load_model(source)
        length = _length(options["length"], length_axis(model) is not None)
        batch = _number("batch", options["batch"], ("dynamic",))
        save_exported(model, folder, format=options["format"], length=length, batch=batch)  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(str(error)) from error
    _report(folder, RECORD)
    return 0


def _report(folder: Path, name: str) -> None:
    import json

    record = json.loads((folder / name).read_text(encoding="utf-8"))
    size = (folder / record["file"]).stat().st_size
    print(f"{folder / record['file']}: {record['model']}, {size:,} bytes")
    for word in ("inputs", "outputs"):
        for tensor in record[word]:
            print(f"  {word[:-1]} {tensor['name']}: {tensor['dtype']} ({', '.join(map(str, tensor['shape']))})")
    found = record["largest_difference"]
    if found is None:
        print("not compared with the model: pip install onnxruntime")
    else:
        print(f"its outputs differ from the model's by {found:.2g} at most")
    print(f"{folder / 'README.md'} has the lines that run it")


def _parse(arguments: Sequence[str]) -> tuple[tuple[str, str], dict[str, str]]:
    options = dict(_OPTIONS)
    places = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in options:
            options[key] = value
        elif argument.startswith("-") or (equals and key.isidentifier()):
            raise UserError(f"lightning export has no option {argument!r}.{nearest(key, [*options])}")
        else:
            places.append(argument)
    for key, choices in (("format", _FORMATS), ("overwrite", tuple(_FLAGS))):
        if options[key] not in choices:
            raise UserError(f"{key}={options[key]} is not a choice.{nearest(options[key], choices)}")
    _number("length", options["length"], ("auto", "dynamic", "example"))
    _number("batch", options["batch"], ("dynamic",))
    if len(places) != 2:
        raise UserError(f"lightning export takes SOURCE and TARGET, got {len(places)}: {' '.join(places) or 'none'}")
    return (places[0], places[1]), options


def _number(key: str, value: str, words: Sequence[str]) -> str | int:
    if value in words:
        return value
    if value.isdecimal() and int(value) > 0:
        return int(value)
    raise UserError(f"{key}={value} must be a positive number or {' or '.join(words)}.{nearest(value, words)}")


def _length(value: str, has_length: bool) -> str | int | None:
    found = _number("length", value, ("auto", "dynamic", "example"))
    if found == "auto":
        return "dynamic" if has_length else None
    return None if found == "example" else found
