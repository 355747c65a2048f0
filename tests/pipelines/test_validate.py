"""Names and types of a composed config, checked before any data are read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from seqzoo.pipelines.cli import main
from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.validate import validate_names, validate_types


@pytest.fixture
def composed(execute: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("seqzoo.pipelines.validate.list_tasks", lambda: ["forecasting"])
    assert main(["fit"]) == 0
    validate_names(execute.cfg)
    return execute.cfg


@pytest.mark.parametrize(
    ("section", "values", "said"),
    [
        ("model", {"name": "patch_smal"}, r"unknown model 'patch_smal'.*patch_small"),
        ("model", {"dept": 3}, r"model 'patch_small' has no option 'dept'.*depth"),
        ("mixer", {"name": "softmx"}, r"unknown mixer 'softmx'.*softmax"),
        ("mixer", {"num_head": 3}, r"mixer 'softmax' has no option 'num_head'.*num_heads"),
        ("task", {"name": "forcasting"}, r"unknown task 'forcasting'.*forecasting"),
        ("task", {"loss": "quantil"}, r"task.loss='quantil'.*quantile"),
        ("optimizer", {"name": "adamv"}, r"unknown optimizer 'adamv'.*adamw"),
        ("scheduler", {"name": "cosin"}, r"unknown scheduler 'cosin'.*cosine"),
        ("data", {"pred_len": 0}, r"data.pred_len=0 must be greater than 0"),
        ("data", {"split": "etth"}, r"data.split='etth'.*ett_hour"),
        ("callbacks", {"progress": "fancy"}, r"callbacks.progress='fancy'"),
        ("trainer", {"max_epohcs": 3}, r"unknown key trainer.max_epohcs. Did you mean max_epochs"),
        ("data", {"seqlen": 3}, r"unknown key data.seqlen. Did you mean seq_len"),
        ("optimizer", {"name": None}, r"optimizer.name is missing.*adam"),
    ],
)
def test_wrong_names_are_found(section: str, values: dict[str, Any], said: str, composed: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=said):
        validate_names({**composed, section: {**composed[section], **values}})


def test_a_task_that_trains_nothing_needs_no_model(composed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Data:
        def __init__(self, path: str | None = None) -> None: ...

    monkeypatch.setattr(
        "seqzoo.pipelines.validate.task_package", lambda name: SimpleNamespace(Data=Data, NEEDS_CHECKPOINT=False)
    )
    spare = ("model", "optimizer", "scheduler", "mixer")
    cfg = {**{k: v for k, v in composed.items() if k not in spare}, "data": {"path": "a.mp4"}}
    validate_names(cfg)
    with pytest.raises(UserError, match=r"unknown key data.pth. Did you mean path"):
        validate_names({**cfg, "data": {"pth": "a.mp4"}})


def test_a_custom_mixer_is_left_to_the_run(composed: dict[str, Any]) -> None:
    validate_names({**composed, "mixer": {"_target_": "m.M", "rank": 3}})


def test_types_that_may_differ(composed: dict[str, Any]) -> None:
    choices = {"trainer": "default", "data": "weather", "callbacks": "default", "logger": "default"}
    for section, values in (
        (
            "trainer",
            {"devices": "auto", "limit_train_batches": 0.5, "max_time": "00:01:00:00", "precision": 16},
        ),
        ("trainer", {"devices": [0, 1], "gradient_clip_val": 1, "deterministic": "warn", "max_epochs": None}),
        ("data", {"targets": ["a"], "split_ratio": [1, 2, 3], "freq": "D"}),
        ("callbacks", {"early_stopping": None, "extra": {"x": {"_target_": "a.B"}}}),
        ("logger", {"tensorboard": True}),
    ):
        validate_types({**composed, section: {**composed[section], **values}}, choices)
    with pytest.raises(UserError, match=r"trainer.detect_anomaly=1 must be true or false"):
        validate_types({**composed, "trainer": {**composed["trainer"], "detect_anomaly": 1}}, choices)
    with pytest.raises(UserError, match=r"callbacks.extra='x' must be a section"):
        validate_types({**composed, "callbacks": {**composed["callbacks"], "extra": "x"}}, choices)
