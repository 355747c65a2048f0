"""`lightning convert`: a public checkpoint of transformers or timm into a folder that `load_model` reads."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import UserError, nearest

USAGE = """usage: lightning convert SOURCE TARGET [dtype=bfloat16|float16|float32] [overwrite=true]
       lightning convert --list
       SOURCE: a folder with config.json and model.safetensors (or its parts and their index), as transformers and timm
       save it; TARGET: a new folder, for seqzoo.load_model(TARGET) and model.pretrained=TARGET;
       dtype: of the weights, that of SOURCE without it; --list: what can be converted"""
_DTYPES = ("bfloat16", "float16", "float32")
_FLAGS = {"true": True, "false": False}


def main(arguments: Sequence[str]) -> int:
    """Run the command with its words after `convert`; returns the exit status. Raises UserError for wrong words, and
    with the converter's reason for what cannot be converted."""
    if not arguments or {"--help", "-h"} & set(arguments):
        print(USAGE)
        return 0
    if list(arguments) == ["--list"]:
        _list()
        return 0
    folders, options = _parse(arguments)
    import torch

    from ..zoo.convert import convert_report

    dtype = None if options["dtype"] is None else getattr(torch, options["dtype"])
    source, target = folders
    try:
        made = convert_report(source, target, dtype=dtype, overwrite=_FLAGS[str(options["overwrite"])])
    except ValueError as error:
        raise UserError(str(error)) from error
    number = sum(p.numel() for p in made.model.parameters())
    print(f"{target}: {made.plan.name} with the weights of {source}, {number:,} parameters")
    if made.left_out:
        print(f"left out, since nothing reads it: {', '.join(made.left_out)}")
    print(f"use it with seqzoo.load_model({target!r})")
    return 0


def _parse(arguments: Sequence[str]) -> tuple[tuple[str, str], dict[str, str | None]]:
    options: dict[str, str | None] = {"dtype": None, "overwrite": "false"}
    folders = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in options:
            options[key] = value
        elif argument.startswith("-") or (equals and key.isidentifier()):
            raise UserError(f"lightning convert has no option {argument!r}.{nearest(key, [*options, '--list'])}")
        else:
            folders.append(argument)
    for key, choices in (("dtype", (None, *_DTYPES)), ("overwrite", tuple(_FLAGS))):
        if options[key] not in choices:
            raise UserError(f"{key}={options[key]} is not a choice.{nearest(str(options[key]), filter(None, choices))}")
    if len(folders) != 2:
        raise UserError(f"lightning convert takes SOURCE and TARGET, got {len(folders)}: {' '.join(folders) or 'none'}")
    return (folders[0], folders[1]), options


def _list() -> None:
    from ..zoo.convert import converter_info, list_converters

    rows = [(info.name, ", ".join(info.model_types), info.summary) for info in map(converter_info, list_converters())]
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    for name, types, summary in rows:
        print(f"{name:<{widths[0]}}  {types:<{widths[1]}}  {summary}")
