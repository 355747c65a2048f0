"""The text of `lightning --help` and `lightning fit --help`, made from the YAML files."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence

from .config_files import Key, default_options, find_option, list_groups, read_keys, read_title
from .errors import UserError, nearest

COMMANDS = {
    "fit": "train, then test; writes a run folder with config, metrics, checkpoints and pictures",
    "validate": "the validation metrics of a checkpoint (ckpt_path=...)",
    "test": "the test metrics of a checkpoint beside the naive baselines",
    "predict": "forecasts, labels, what query=... asks for in data.path=...; a continued text (task.prompt=...)",
}
LISTINGS = {
    "mixers": "table of the token mixers: paper, patterns, options (--json)",
    "models": "table of the models that model=... or create_model() builds (--json)",
    "doctor": "versions, usable kernels and decoders, extras, who owns the command (--json)",
}
TOOLS = {
    "ship": "make the model of a run folder part of the package: weights, record, card: RUN MODEL.TAG license=...",
    "convert": "a public checkpoint of transformers or timm into a folder that load_model reads: SOURCE TARGET",
    "export": "a model as a program that runs without seqzoo (torch.export, ONNX): SOURCE TARGET format=onnx",
    "tokenizer": "train a byte-level BPE on text files: path=books/ output=bpe.json vocab_size=4096",
    "lra": "our runs on Long Range Arena with their settings, and the published table below: runs=runs",
}
FLAGS = {
    "-m, --multirun": "sweep: mixer=softmax,linear runs one job for each value, each in a fresh process",
    "--cfg job": "print the composed config and stop (--resolve fills in the ${...})",
    "--config-dir DIR": "look for your own YAML options in DIR too (DIR/data/mine.yaml is data=mine)",
    "--allow PACKAGE": "let _target_ in config files name things of PACKAGE (repeatable; SEQZOO_ALLOW=a,b)",
    "--info": "what Hydra knows of the composition",
}
EXAMPLES = (
    "lightning fit",
    "lightning fit experiment=forecasting/weather mixer=linear trainer.max_epochs=3",
    "lightning fit data=csv data.path=sales.csv data.targets=[sales] data.pred_len=14",
    "lightning fit experiment=text/stdlib_bytes data=text data.path=books/",
    "lightning fit experiment=documents/labelled data.path=folders_named_by_label/",
    "lightning fit experiment=documents/labelled data.path=docs/ model.pretrained=FOLDER model.lora=8",
    "lightning predict experiment=audio/find data.path=talk.wav",
    "lightning predict experiment=text/stdlib_bytes task.prompt='Once upon a time'",
    "lightning fit mixer._target_=my_module.MyMixer mixer.my_option=3",
    "lightning fit -m mixer=softmax,linear,s4d seed=0,1",
    "lightning test ckpt_path=runs/forecasting/<run>/checkpoints/last.ckpt",
    "lightning fit --help trainer        (the keys of one group)",
)


def _rows(pairs: Sequence[tuple[str, str]], left: int, width: int, indent: str = "  ") -> list[str]:
    """Two columns; the right one wraps, a left one that is too long gets a line of its own."""
    lines = []
    for name, text in pairs:
        wrapped = textwrap.wrap(
            text, max(20, width - left - len(indent) - 2), break_long_words=False, break_on_hyphens=False
        ) or [""]
        if len(name) > left:
            lines.append(indent + name)
        else:
            lines.append(f"{indent}{name:<{left}}  {wrapped.pop(0)}".rstrip())
        lines += [f"{indent}{'':<{left}}  {part}" for part in wrapped]
    return lines


def _key_rows(keys: Sequence[Key], prefix: str) -> list[tuple[str, str]]:
    rows = []
    for key in keys:
        name = f"{prefix}{key.name}"
        rows.append((f"{name}={key.value}" if key.value else f"{name}", key.doc))
    return rows


def _group(group: str, options: list[str], chosen: str | None, width: int, config_dirs: Sequence[str]) -> list[str]:
    """One group: its options with their titles, and the keys of the option that is in use."""
    lines = [f"{group}={'|'.join(options)}" if len(options) < 9 else f"{group}=..."]
    titles = []
    for option in options:
        path = find_option(group, option, config_dirs)
        mark = " *" if option == chosen else ""
        titles.append((option + mark, read_title(path) if path else ""))
    lines += _rows(titles, max(len(t[0]) for t in titles), width)
    path = find_option(group, chosen, config_dirs) if chosen and chosen != "null" else None
    if path is not None and group != "experiment":
        lines += _rows(_key_rows(read_keys(path), f"{group}."), 44, width, indent="      ")
    return [*lines, ""]


def help_text(command: str | None = None, arguments: Sequence[str] = (), config_dirs: Sequence[str] = ()) -> str:
    """The help.

    command: fit, validate, test or predict, or None for the top level. arguments: what else stands on the
    line; `group=option` shows that option's keys in place of the default's, a bare group name shows that
    group only. Raises UserError for a bare word that is no group.
    """
    width = min(shutil.get_terminal_size((110, 24)).columns, 140)
    groups = list_groups(config_dirs)
    chosen = default_options(config_dirs)
    only = []
    for argument in arguments:
        group, equals, option = argument.partition("=")
        if equals and option in groups.get(group, ()):
            chosen[group] = option
        elif not equals and not argument.startswith("-"):
            if argument not in groups:
                raise UserError(f"no config group {argument!r}.{nearest(argument, groups)}")
            only.append(argument)
    if only:
        parts = [_group(g, groups[g], chosen.get(g), width, config_dirs) for g in only]
        return "\n".join(line for part in parts for line in part).rstrip()
    lines = [f"usage: lightning {command or 'COMMAND'} [group=option ...] [key=value ...] [flags]"]
    lines += [f"       {COMMANDS[command]}" if command in COMMANDS else "", "", "commands:"]
    lines += _rows([*COMMANDS.items(), *LISTINGS.items(), *TOOLS.items()], 10, width)
    lines += ["", "flags:", *_rows([*FLAGS.items(), ("--version", "the version")], 18, width)]
    lines += ["", "  `seqzoo` and `python -m seqzoo` are the same command.", "", "examples:"]
    lines += [f"  {example}" for example in EXAMPLES]
    config = find_option("", "config", config_dirs)
    lines += ["", "keys (key=value; +key=value adds one that is not there):"]
    lines += _rows(_key_rows(read_keys(config) if config else [], ""), 28, width)
    lines += ["", "config groups, their options (* = default) and the keys of the option in use:", ""]
    for group, options in groups.items():
        lines += _group(group, options, chosen.get(group), width, config_dirs)
    return "\n".join(lines).rstrip()
