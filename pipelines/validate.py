"""Checks of a composed config before any data are read: names, choices, types, required values."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from .config_files import find_option
from .errors import UserError, nearest

_CHOICES: dict[str, tuple[str, ...]] = {
    "task.loss": ("quantile", "student_t", "mse", "mae", "huber"),
    "data.split": ("ratio", "ett_hour", "ett_minute"),
    "data.scope": ("global", "series"),
    "data.gaps": ("error", "fill"),
    "data.short_series": ("error", "skip"),
    "task.objective": ("next", "masked"),
    "callbacks.progress": ("auto", "rich", "plain", "none"),
    "callbacks.checkpoint.mode": ("min", "max"),
}
# Values that may be of several types; anywhere else the type of the shipped default is the type.
_OPEN = {
    "trainer.devices",
    "trainer.precision",
    "trainer.overfit_batches",
    "trainer.fast_dev_run",
    "trainer.deterministic",
    "trainer.val_check_interval",
    "logger.tensorboard",
    "model.mixer",  # a name, a mapping or a list
    "name",
    "task.prompt",
    "task.test_protocols",
}
_POSITIVE = {
    "data.seq_len",
    "data.pred_len",
    "data.batch_size",
    "data.eval_batch_size",
    "optimizer.lr",
    "trainer.num_nodes",
    "trainer.accumulate_grad_batches",
    "trainer.log_every_n_steps",
}


def _get(cfg: Mapping[str, Any], dotted: str) -> Any:
    node: Any = cfg
    for part in dotted.split("."):
        if not isinstance(node, Mapping):
            return None
        node = node.get(part)
    return node


def list_tasks() -> list[str]:
    """The pipelines that are there: folders of `seqzoo.pipelines` with a `task.py`, such as `text`, or rooms of such a
    folder, such as `audio_events` in `audio/events`."""
    return sorted(_task_folders())


def task_package(name: str) -> Any:
    """The `task` module of a pipeline: build_data, build_module, load_module, report, predict."""
    return importlib.import_module(f".{_task_folders()[name]}.task", __package__)


def trains(name: str) -> bool:
    """Whether a pipeline trains a model; one that only predicts with what is there says `NEEDS_CHECKPOINT = False`."""
    return getattr(task_package(name), "NEEDS_CHECKPOINT", True)


def _task_folders() -> dict[str, str]:
    """Names of the tasks and their packages."""
    found = {}
    for folder in files("seqzoo.pipelines").iterdir():
        if not folder.is_dir():
            continue
        if (folder / "task.py").is_file():
            found[folder.name] = folder.name
        for room in folder.iterdir():
            if room.is_dir() and (room / "task.py").is_file():
                found[f"{folder.name}_{room.name}"] = f"{folder.name}.{room.name}"
    return found


def _check_name(cfg: Mapping[str, Any], group: str, known: Sequence[str]) -> str:
    name = _get(cfg, f"{group}.name")
    if not isinstance(name, str):
        raise UserError(f"{group}.name is missing: choose one with {group}=...{nearest('', known)}")
    if name not in known:
        raise UserError(f"unknown {group} {name!r} ({group}.name).{nearest(name, known)}")
    return name


def validate_names(cfg: Mapping[str, Any]) -> None:
    """Task, model, mixer, optimizer, scheduler, their options, and named choices.

    cfg: the plain composed config. Raises UserError with the nearest valid names. Reads no data; imports the
    registries of models and mixers.
    """
    from ..blocks.registry import list_mixers, mixer_info
    from ..zoo import list_models, model_info
    from .nets import TRANSFER
    from .training import OPTIMIZERS, SCHEDULERS

    task = _check_name(cfg, "task", list_tasks())
    if trains(task):
        _check_name(cfg, "optimizer", OPTIMIZERS)
        _check_name(cfg, "scheduler", SCHEDULERS)
        model = _check_name(cfg, "model", list_models())
        _check_options(cfg["model"], "model", model, {**model_info(model).options, **dict.fromkeys(TRANSFER)})
        # a task may train the models of another
        wanted, of = model_info(model).task, getattr(task_package(task), "MODELS", task)
        if wanted != of:
            raise UserError(
                f"model {model!r} is for the task {wanted!r}, not {task!r}.{nearest('', list_models(task=of))}"
            )
    mixer = cfg.get("mixer")
    if isinstance(mixer, Mapping) and "_target_" not in mixer:
        name = _check_name(cfg, "mixer", list_mixers())
        _check_options(mixer, "mixer", name, mixer_info(name).options)
    for section, valid in _constructors(task).items():
        for key in cfg.get(section) or ():
            if key not in valid:
                raise UserError(f"unknown key {section}.{key}.{nearest(key, valid)}")
    for dotted, known in _CHOICES.items():
        value = _get(cfg, dotted)
        if value is not None and value not in known:
            raise UserError(f"{dotted}={value!r} is not a choice.{nearest(str(value), known)}")
    for dotted in sorted(_POSITIVE):
        value = _get(cfg, dotted)
        if isinstance(value, (int, float)) and not value > 0:
            raise UserError(f"{dotted}={value} must be greater than 0")


def check_mixer_is_read(model: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """A mixer that was typed must be one that the model reads.

    model: the section with its `${mixer}` as it stands. overrides: what was typed. Raises UserError, naming the key or
    the model that it can be given to.
    """
    typed = [o for o in overrides if o.lstrip("+~").split("=")[0].split(".")[0] == "mixer"]
    name = model.get("name")
    if not typed or "${mixer" in str(dict(model)):
        return
    from ..blocks.registry import list_mixers
    from ..zoo import list_models, model_info

    if name not in list_models():
        return  # what is said of an unknown model comes later
    info = model_info(str(name))
    own = ", ".join(info.mixers) or "none of the registry"
    value = typed[0].partition("=")[2]
    size = str(name).rpartition("_")[2]
    able = [n for n in list_models(task=info.task) if _takes_any(n)]
    able = [n for n in able if n.endswith(f"_{size}")] or able
    ways = [f"model={able[0]}, which takes any mixer"] if able else []
    if "mixer" in info.options:
        ways.append(f"model.mixer={value if value in list_mixers() else '...'}")
    raise UserError(
        f"{typed[0]} has no effect: the model {name!r} has its own mixer ({own}). Give {', or '.join(ways) or 'none'}"
    )


def _takes_any(name: str) -> bool:
    path = find_option("model", name)
    return path is not None and "${mixer}" in path.read_text(encoding="utf-8")


def _constructors(task: str) -> dict[str, set[str]]:
    """Sections whose keys are the arguments of one class: the Trainer, the task's data."""
    import lightning

    package = task_package(task)
    own = getattr(package, "data_arguments", None)  # a task that reads the files of others
    return {
        "trainer": {*inspect.signature(lightning.Trainer.__init__).parameters, "compile"} - {"self"},
        "data": own() if own else set(inspect.signature(package.Data.__init__).parameters) - {"self", "seed"},
    }


def _check_options(node: Mapping[str, Any], group: str, name: str, known: Mapping[str, Any]) -> None:
    for key in node:
        if key != "name" and key not in known:
            raise UserError(f"{group} {name!r} has no option {key!r} ({group}.{key}).{nearest(key, known)}")


def _fits(value: Any, default: Any) -> bool:
    """Whether a value is of its default's type; null always is, a whole number is a float too."""
    if value is None or default is None:
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, (int, float))
    if isinstance(default, int):
        return isinstance(value, int)
    if isinstance(default, str):
        return isinstance(value, (str, int, float)) or default.startswith("${")
    if isinstance(default, Mapping):
        return isinstance(value, Mapping)
    return isinstance(value, (list, tuple))


def _type_name(default: Any) -> str:
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a text",
        dict: "a section",
    }
    return names.get(type(default), "a list [a, b]")


def _check_types(value: Any, default: Any, dotted: str) -> None:
    if dotted in _OPEN:
        return
    if not _fits(value, default):
        raise UserError(f"{dotted}={value!r} must be {_type_name(default)}, as the default {dotted}={_text(default)}")
    if isinstance(default, Mapping) and isinstance(value, Mapping):
        for key, inner in default.items():
            if key in value:
                _check_types(value[key], inner, f"{dotted}.{key}" if dotted else str(key))


def _text(value: Any) -> str:
    """As YAML writes it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def validate_types(cfg: Mapping[str, Any], choices: Mapping[str, str | None], config_dirs: Sequence[str] = ()) -> None:
    """Each value against the default in the option file it came from: `trainer.max_epochs=ten` is no whole
    number.

    choices: the option of each group, as Hydra records them. Raises UserError naming key, value and default.
    """
    import yaml

    for group, option in [("", "config"), *choices.items()]:
        path = None if option is None or group.startswith("hydra") else find_option(group, option, config_dirs)
        if path is None or group in ("experiment", "debug"):
            continue
        defaults = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        if group == "":
            defaults = {k: v for k, v in defaults.items() if k not in ("defaults", "hydra")}
        value = cfg if group == "" else cfg.get(group)
        if isinstance(defaults, Mapping) and isinstance(value, Mapping):
            for key, default in defaults.items():
                if key in value:
                    _check_types(value[key], default, f"{group}.{key}" if group else str(key))
