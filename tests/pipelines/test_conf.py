"""Every YAML file composes, resolves and agrees with the registries; every key has its comment."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import lightning
import pytest
import yaml
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from seqzoo.blocks.backbone import Backbone
from seqzoo.blocks.registry import list_mixers, mixer_info
from seqzoo.pipelines.config_files import (
    config_roots,
    default_options,
    find_option,
    list_groups,
    read_keys,
    read_title,
)
from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.training import OPTIMIZERS, SCHEDULERS, create_optimizer, schedule
from seqzoo.pipelines.validate import task_package
from seqzoo.zoo import list_models, model_info

GROUPS = list_groups()
OPTIONS = [(group, option) for group, options in GROUPS.items() for option in options]
EXPERIMENTS = GROUPS["experiment"]
ROOT = config_roots()[0]
FILES = sorted(ROOT.rglob("*.yaml"))


def composed(*overrides: str) -> dict[str, Any]:
    GlobalHydra.instance().clear()
    with initialize_config_module("seqzoo.conf", version_base="1.3"):
        cfg = compose("config", overrides=list(overrides))
    return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[return-value]


def option_file(group: str, option: str) -> Path:
    path = find_option(group, option)
    assert path is not None
    return path


# Values that only the user can give.
NEEDED = {
    ("data", "csv"): ["data.path=sales.csv"],
    ("data", "text"): ["data.path=books"],
    **{("data", name): ["data.path=labels"] for name in ("labelled", "lra_text", "lra_retrieval", "lra_image")},
    **{("data", name): ["data.path=talks.csv"] for name in ("audio_clips", "audio_spans", "audio_pairs")},
    **{("data", name): ["data.path=videos.csv"] for name in ("video", "video_clips", "video_folder", "video_spans")},
    ("mixer", "custom"): ["mixer._target_=a.B"],
}
# Experiments of the user's own files.
NEEDED |= {
    ("experiment", name): ["data.path=labels"]
    for name in EXPERIMENTS
    if name in ("forecasting/zero_shot", "documents/labelled", "audio/classify", "audio/spans")
    or name in ("video/classify", "video/pretrain", "video/search", "video/spans")
    or name.startswith(("lra/text", "lra/retrieval", "lra/image"))
}
TEXT_DATA = ("stdlib", "text")
# The task that reads a file of the group data, and arguments which that file has no use for.
COMPOSED = {"clips", "protocol", "backgrounds", "background_parts", "snr_db", "test_snr_db", "events_per_minute"}
COMPOSED |= {
    "train_events_per_minute",
    "train_equalizer_db",
    "min_gap",
    "level_db",
    "train_speed",
    "val_recordings",
    "val_minutes",
}
COMPOSED |= {"test_recordings", "test_minutes"}
COMPOSED_VIDEO = {
    *("clips", "labels", "footage", "footage_parts", "event_seconds", "piece_seconds", "events_per_video"),
    *("events_per_minute", "min_gap", "train_flip", "train_speed", "val_videos", "val_minutes", "test_videos"),
    "test_minutes",
}
SOURCE_DATA: dict[str, tuple[str, set[str]]] = {
    "audio_clips": ("audio_classify", {"protocol", "hub_split"}),
    "digits": ("audio_classify", {"pattern", "hub_split"}),
    "audio_pairs": ("audio_retrieval", set()),
    "audio_prompts": ("audio_retrieval", {"hub_split"}),
    "composed": ("audio_events", {"columns"}),
    "audio_spans": ("audio_events", COMPOSED),
    "video": ("video_search", set()),
    "video_clips": ("video_classify", set()),
    "video_folder": ("video_pretrain", set()),
    "video_composed": ("video_grounding", {"format", "videos", "columns", "missing", "end_tolerance"}),
    "video_spans": ("video_grounding", COMPOSED_VIDEO),
}
# One class reads the user's documents and generates those of Long Range Arena; a file has the keys of its source.
COLUMNS = {"text_column", "file_column", "label_column", "split_column", "split_ratio", "tokenizer"}


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=lambda v: v)
def test_every_option_composes_and_resolves(group: str, option: str) -> None:
    cfg = composed(f"{group}={option}", *NEEDED.get((group, option), []))
    assert set(cfg) == {
        *(
            "task",
            "data",
            "mixer",
            "model",
            "optimizer",
            "scheduler",
            "trainer",
            "callbacks",
            "logger",
            "paths",
        ),
        *("name", "seed", "ckpt_path", "query", "test_after_fit", "worker_timeout"),
    }
    assert "${" not in str(cfg) and "???" not in str(cfg)
    if group not in ("experiment", "debug"):
        own = yaml.safe_load(option_file(group, option).read_text())
        for key, value in own.items():
            if "${" not in str(value) and value != "???" and (group, key) != ("mixer", "_target_"):
                assert cfg[group][key] == value, key


def test_missing_values_are_asked_for() -> None:
    for (group, option), given in NEEDED.items():
        GlobalHydra.instance().clear()
        with initialize_config_module("seqzoo.conf", version_base="1.3"):
            cfg = compose("config", overrides=[f"{group}={option}"])
        assert given[0].split("=")[0] in OmegaConf.missing_keys(cfg)


def test_names_are_the_registries() -> None:
    """One key in all places: registry, config file, the `name` inside it."""
    assert {o for o in GROUPS["mixer"] if o != "custom"} == set(list_mixers())
    assert set(GROUPS["model"]) == set(list_models())
    assert set(GROUPS["optimizer"]) == set(OPTIMIZERS)
    assert set(GROUPS["scheduler"]) == set(SCHEDULERS)
    for group in ("mixer", "model", "optimizer", "scheduler", "task"):
        for option in GROUPS[group]:
            if option != "custom":
                assert yaml.safe_load(option_file(group, option).read_text())["name"] == option


@pytest.mark.parametrize("name", [o for o in GROUPS["mixer"] if o != "custom"])
def test_mixer_files_state_every_option_with_its_default(name: str) -> None:
    own = yaml.safe_load(option_file("mixer", name).read_text())
    own.pop("name")
    assert own == mixer_info(name).options


@pytest.mark.parametrize("name", GROUPS["model"])
def test_model_files_state_the_options_of_the_model(name: str) -> None:
    own = yaml.safe_load(option_file("model", name).read_text())
    info = model_info(own.pop("name"))
    for key, value in own.items():
        assert key in info.options, key
        if key != "mixer":
            known = info.options[key]
            assert value == (list(known) if isinstance(known, tuple) else known), key
    assert ("mixer" in own) == ("mixer" in info.options)


@pytest.mark.parametrize("name", GROUPS["data"])
def test_data_files_state_the_arguments_of_the_data(name: str) -> None:
    own = set(yaml.safe_load(option_file("data", name).read_text()))
    if name in SOURCE_DATA:
        task, spare = SOURCE_DATA[name]
        known = set(inspect.signature(task_package(task).Data.__init__).parameters) - {"self", "seed"}
        columns = {key for key in known if key.endswith("_column")}
        assert own == known - spare - (set() if name in ("audio_clips", "audio_pairs") else columns)
        return
    if "source" in own:
        known = set(inspect.signature(task_package("documents").Data.__init__).parameters) - {"self", "seed"}
        settings = set() if name in ("labelled", "lra_retrieval") else {"settings"}
        assert own == known - {"settings"} - (set() if name == "labelled" else COLUMNS) | settings
        return
    task = "text" if name in TEXT_DATA else "forecasting"
    valid = set(inspect.signature(task_package(task).Data.__init__).parameters) - {"self", "seed"}
    assert own == valid - ({"split_ratio"} if name.startswith("ett") else set())


def test_trainer_keys_are_those_of_the_trainer() -> None:
    known = set(inspect.signature(lightning.Trainer.__init__).parameters)
    assert set(composed()["trainer"]) - {"compile"} <= known


@pytest.mark.parametrize(("name", "option"), [("sgd", "adam_lr"), ("muon", "nesterov"), ("adamw", "params")])
def test_an_option_of_another_optimizer_is_said(name: str, option: str) -> None:
    options = {**composed(f"optimizer={name}")["optimizer"], option: 0.1}
    with pytest.raises(UserError, match=rf"'{name}' has no option '{option}'.*~optimizer\.{option} takes it out"):
        create_optimizer(Backbone(8, 1), options)


def test_optimizers_and_schedules_build_from_their_files() -> None:

    for name in OPTIMIZERS:
        optimizer = create_optimizer(Backbone(8, 1), composed(f"optimizer={name}")["optimizer"])
        assert type(optimizer).__name__.lower().startswith(name)
    for name in SCHEDULERS:
        rule = schedule(composed(f"scheduler={name}")["scheduler"], 100)
        assert (rule is None) == (name == "none")


def test_published_protocol_of_informer() -> None:
    cfg = composed("experiment=forecasting/etth1_informer")
    assert [cfg["data"][k] for k in ("seq_len", "pred_len", "batch_size", "split")] == [
        48,
        24,
        32,
        "ett_hour",
    ]
    assert [cfg["model"][k] for k in ("label_len", "factor", "preset", "drop")] == [48, 3, "original", 0.05]
    assert [cfg["optimizer"][k] for k in ("name", "lr", "weight_decay")] == ["adam", 1e-4, 0.0]
    assert (cfg["trainer"]["max_epochs"], cfg["callbacks"]["early_stopping"]["patience"]) == (6, 3)
    assert (cfg["scheduler"]["name"], cfg["task"]["loss"]) == ("informer", "mse")


@pytest.mark.parametrize("experiment", [name for name in EXPERIMENTS if name != "video/search"])
def test_the_command_line_wins_over_an_experiment(experiment: str) -> None:
    needed = NEEDED.get(("experiment", experiment), [])
    cfg = composed(f"experiment={experiment}", "mixer=linear", "data.batch_size=7", "debug=one_batch", *needed)
    assert cfg["mixer"]["name"] == "linear" and cfg["data"]["batch_size"] == 7
    assert cfg["trainer"]["max_epochs"] == 1  # debug comes after the experiment
    if isinstance(cfg["model"].get("mixer"), dict):  # a hybrid has a list of its own
        assert cfg["model"]["mixer"] == cfg["mixer"]


def test_what_trains_nothing_has_no_model() -> None:
    cfg = composed("experiment=video/search", "data.path=a.mp4", "query=a taxi cab", "task.budget=7")
    assert not any(cfg[group] for group in ("model", "mixer", "optimizer", "scheduler"))
    assert (cfg["query"], cfg["task"]["budget"]) == ("a taxi cab", 7)


def test_paths_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQZOO_CWD", "/somewhere")
    monkeypatch.delenv("SEQZOO_DATA", raising=False)
    assert composed("data=etth1")["data"]["path"] == "/somewhere/data/ETTh1.csv"
    monkeypatch.setenv("SEQZOO_DATA", "/elsewhere")
    assert composed("data=etth1")["data"]["path"] == "/elsewhere/ETTh1.csv"
    assert composed()["paths"]["runs"] == "/somewhere/runs"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_has_a_title_and_every_key_a_comment(path: Path) -> None:
    assert read_title(path), "the first line says what the option is"
    if path.relative_to(ROOT).parts[0] in ("experiment", "debug", "hydra"):
        return
    for key in read_keys(path):
        if key.value:
            assert key.doc, f"{key.name} has no comment"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_line_reader_finds_what_yaml_finds(path: Path) -> None:
    """The help reads lines; it must see the keys that a YAML reader sees."""

    def flat(node: Any, prefix: str = "") -> dict[str, Any]:
        found = {}
        for key, value in node.items():
            if isinstance(value, dict) and value:
                found.update(flat(value, f"{prefix}{key}."))
            else:
                found[f"{prefix}{key}"] = value
        return found

    tree = {k: v for k, v in yaml.safe_load(path.read_text()).items() if k not in ("defaults", "hydra")}
    read = {key.name: key.value for key in read_keys(path) if key.value}
    assert {k: yaml.safe_load(v) for k, v in read.items()} == flat(tree)


def test_default_options_are_those_of_the_defaults_list() -> None:
    chosen = default_options()
    assert chosen["mixer"] == "softmax" and chosen["experiment"] == "null"
    assert set(chosen) == set(GROUPS)
    for group, option in chosen.items():
        assert option == "null" or option in GROUPS[group]
