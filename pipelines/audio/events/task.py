"""What the command does for events: build, check, report and find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ...checkpoints import check_same_run, saved_parameters
from ...errors import UserError
from ...nets import mixer_class, mixer_name
from ...results import print_table, write_csv, write_metrics
from .baseline import MARGINS, chance_spans, energy_spans, frame_levels, over_background
from .data import AudioEventData
from .module import AudioEventModule
from .recordings import EventRecording
from .scores import SCORES, EventSums

Data = AudioEventData
# What a trained model does otherwise without being another one.
DECODING = ("window", "window_overlap", "windows_at_once", "low_ratio", "median_seconds", "max_gap", "min_duration")


def build_data(cfg: dict[str, Any]) -> AudioEventData:
    """The data module of a config."""
    data = AudioEventData(**cfg["data"], seed=cfg["seed"])
    data.tested = bool(cfg.get("test_after_fit"))
    return data


def build_module(cfg: dict[str, Any], data: AudioEventData) -> AudioEventModule:
    """The module of a config, for the labels of the data, with the statistics of their features; says what the data
    have."""
    model, schema = dict(cfg["model"]), data.schema()
    task = {**cfg["task"], "seed": cfg["seed"]}
    module = AudioEventModule(
        model, task, cfg["optimizer"], cfg["scheduler"], schema, mixer_class=mixer_class(model, cfg)
    )
    module.net.encoder.measure(data.measured())
    module.set_labels_in_words()
    print(f"{schema['title']}: {len(data.labels)} labels", *data.notes, sep="\n", flush=True)
    return module


def load_module(checkpoint: dict[str, Any], path: Path, cfg: dict[str, Any]) -> AudioEventModule:
    """The module that a checkpoint holds, which hears and decodes as the config says; a threshold of null is that of
    its validation. Raises UserError when it is not one of events."""
    saved = saved_parameters(checkpoint, "audio_events", path)
    given = cfg.get("task") or {}
    saved["task"] = {**saved["task"], **{key: given[key] for key in DECODING if key in given}}
    module = AudioEventModule(**saved, mixer_class=mixer_class(saved["model"], cfg))
    module.load_state_dict(checkpoint["state_dict"])
    if given.get("threshold") is not None:
        module.threshold.fill_(float(given["threshold"]))
    return module


def check_resume(checkpoint: dict[str, Any], module: AudioEventModule, path: Path) -> None:
    """Raise UserError naming what differs when a checkpoint is of another model or other data."""
    check_same_run(checkpoint, module.hparams, path)


def check_schema(module: AudioEventModule, data: AudioEventData, path: Path) -> None:
    """Number the labels as the checkpoint does. Raises UserError when it was trained at another sample rate."""
    there, here = module.schema["sample_rate"], data.sample_rate
    if there != here:
        raise UserError(f"{path} was trained at {there} Hz, here it is data.sample_rate={here}")
    data.use_labels(module.schema["labels"])
    # the test may be of other recordings than those that training knew
    module.schema["conditions"] = data.schema()["conditions"]


def prepare_test(module: AudioEventModule, data: AudioEventData) -> None:
    """Nothing to choose: the threshold is that of the checkpoint's validation."""


def report(
    trainer: Any, module: AudioEventModule, data: AudioEventData, run_dir: Path, cfg: dict[str, Any]
) -> dict[str, Any]:
    """Print and write the scores beside an energy detector and chance, a table by label, and a timeline."""
    from ..pictures import plot_timeline

    labels, schema = module.schema["labels"], data.schema()
    model = module.hparams["model"]
    name = f"{model['name']}, {mixer_name(model)}"
    found = {condition: sums.compute() for condition, sums in module.test_sums.items()}
    margin = energy_margin(data.recordings["val"])
    rows, each = [], []
    for condition, own in found.items():
        tested = [recording for recording in data.recordings["test"] if recording.condition == condition]
        heading = {"condition": condition} if condition else {}
        methods = {name: own, **baselines(tested, module.schema, margin, labels)}
        rows += [{"method": method, **heading, **_chosen(scores)} for method, scores in methods.items()]
        each += [{"label": label, **heading, **row} for label, row in zip(labels, own["per_class"], strict=True)]
    minutes = sum(recording.seconds for recording in data.recordings["test"]) / 60
    print_table(rows, title=f"test: {schema['title']}, {minutes:.0f} minutes, {len(labels)} labels")
    write_csv(run_dir / "test.csv", rows)
    write_csv(run_dir / "labels.csv", each)
    first = data.recordings["test"][0]
    if first.name in module.found:
        plot_timeline(
            first.truth,
            [(span.start, span.end, span.label) for span in module.found[first.name]],
            labels,
            run_dir / "timeline.png",
            seconds=first.seconds,
            title=f"{first.name}: event F1 {found[first.condition]['event_f1']:.2f} over all recordings of its kind",
        )
    if data.bad is not None and data.bad.causes:
        print(data.bad.report(), flush=True)
    record = {
        "title": schema["title"],
        "test": {condition or "all": _chosen(own) for condition, own in found.items()},
        "rows": rows,
        "threshold": float(module.threshold),
        "energy_margin_db": margin,
        "parameters": sum(p.numel() for p in module.net.parameters()),
    }
    write_metrics(run_dir, record, "scores")
    print(f"tables and pictures in {run_dir}", flush=True)
    values = {
        f"test/{condition}/{key}" if condition else f"test/{key}": own[key]
        for condition, own in found.items()
        for key in ("event_f1", "miou", "segment_f1")
    }
    return {**values, "test/event_f1": float(np.mean([own["event_f1"] for own in found.values()]))}


def _chosen(scores: dict[str, Any]) -> dict[str, Any]:
    return {key: scores[key] for key in (*SCORES, "events", "found")}


def energy_margin(recordings: list[EventRecording]) -> float:
    """The margin in dB with which the energy detector finds most in validation, labels not looked at."""
    levels = [(r, over_background(frame_levels(r.samples, r.frames, r.sample_rate))) for r in recordings]
    best = []
    for margin in MARGINS:
        sums = EventSums(1)
        for recording, excess in levels:
            spans = energy_spans(excess, recording.sample_rate, margin_db=margin)
            truth = [(start, end, 0) for start, end, _ in recording.truth]
            sums.update(truth, [(span.start, span.end, 0) for span in spans], recording.seconds)
        best.append((float(np.nan_to_num(sums.compute()["event_f1_any"])), margin))
    return max(best)[1]


def baselines(
    recordings: list[EventRecording], schema: dict[str, Any], margin: float, labels: list[str]
) -> dict[str, dict[str, Any]]:
    """Scores of an energy detector that calls everything what is most frequent, and of chance: as many events as in
    training, of the mean length, anywhere."""
    energy, chance = EventSums(len(labels)), EventSums(len(labels))
    most = int(np.argmax(schema["per_second"]))
    for number, recording in enumerate(recordings):
        excess = over_background(frame_levels(recording.samples, recording.frames, recording.sample_rate))
        spans = energy_spans(excess, recording.sample_rate, margin_db=margin, label=most)
        energy.update(recording.truth, [(span.start, span.end, span.label) for span in spans], recording.seconds)
        guessed = chance_spans(
            recording.seconds,
            per_second=schema["per_second"],
            length=schema["event_seconds"],
            rng=np.random.default_rng([0, number]),
        )
        chance.update(recording.truth, guessed, recording.seconds)
    return {f"energy detector: always {labels[most]!r}": energy.compute(), "chance": chance.compute()}


def predict(trainer: Any, module: AudioEventModule, cfg: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Find the events of the recordings of `data.path`."""
    from .predict import predict as find

    return find(trainer, module, cfg, run_dir)
