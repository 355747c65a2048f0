"""The events pipeline: targets and loss, stitched recordings, thresholds, words, runs and their reports."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

soundfile = pytest.importorskip("soundfile", reason="needs seqzoo[audio]")
pytest.importorskip("torchaudio", reason="needs seqzoo[audio]")

from event_recordings import COMPOSED, RATE, composed, fill  # noqa: E402
from hydra import compose, initialize_config_module  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

from seqzoo.pipelines.audio import pictures  # noqa: E402
from seqzoo.pipelines.audio.events import task  # noqa: E402
from seqzoo.pipelines.audio.events.data import AudioEventData  # noqa: E402
from seqzoo.pipelines.audio.events.module import (  # noqa: E402
    AudioEventModule,
    event_loss,
    label_text,
    positive_weights,
    token_targets,
)
from seqzoo.pipelines.audio.events.recordings import EventRecording  # noqa: E402
from seqzoo.pipelines.audio.pictures import plot_timeline  # noqa: E402
from seqzoo.pipelines.checkpoints import load_checkpoint  # noqa: E402
from seqzoo.pipelines.errors import UserError  # noqa: E402
from seqzoo.pipelines.run import execute  # noqa: E402
from seqzoo.zoo import load_model  # noqa: E402

MODEL = {
    "name": "audio_detector_tiny",
    "mixer": {"name": "softmax", "num_heads": 2},
    "dim": 16,
    "depth": 1,
    "front_end": {"name": "log_mel", "stack": 2, "num_mels": 16, "norm": "fixed"},
}
OPTIMIZER = {"name": "adamw", "lr": 1e-2, "weight_decay": 0.0, "betas": [0.9, 0.999]}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("events"))


def built(data: AudioEventData, model: dict[str, Any] | None = None, **options: Any) -> AudioEventModule:
    torch.manual_seed(0)
    return AudioEventModule(
        {**MODEL, **(model or {})}, {"window_overlap": 0.5, **options}, OPTIMIZER, {"name": "none"}, data.schema()
    ).eval()


# targets and loss -----------------------------------------------------------------------------------------------------


def test_targets_by_hand() -> None:
    times = torch.tensor([0.5, 1.5, 2.5, 3.5], dtype=torch.float64)
    spans = torch.tensor([[[1.0, 2.5], [1.5, 4.0], [0.0, 4.0]], [[0.0, 0.4], [3.5, 3.6], [0, 0]]], dtype=torch.float64)
    classes = torch.tensor([[0, 2, -1], [1, 0, -1]])
    found = token_targets(times, spans, classes, 3)
    assert found[0].tolist() == [[0, 0, 0], [1, 0, 1], [0, 0, 1], [0, 0, 1]]
    assert found[1].tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0]]
    assert token_targets(times, spans[:, :0], classes[:, :0], 3).sum() == 0
    doubled = token_targets(times, torch.cat((spans, spans), 1), torch.cat((classes, classes), 1), 3)
    assert torch.equal(doubled, found)


@pytest.mark.parametrize("kind", ["bce", "focal"])
def test_loss_is_its_formula(kind: str) -> None:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 3, generator=rng, dtype=torch.float64)
    targets = (torch.rand(2, 5, 3, generator=rng) < 0.4).double()
    lengths, weights, gamma = torch.tensor([5, 2]), torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64), 2.0
    found = event_loss(logits, targets, lengths, weights=weights, kind=kind, gamma=gamma)
    total = 0.0
    for row, length in enumerate(lengths.tolist()):
        for token in range(length):
            for label in range(3):
                p = 1 / (1 + np.exp(-float(logits[row, token, label])))
                right = p if targets[row, token, label] else 1 - p
                weight = float(weights[label]) if targets[row, token, label] else 1.0
                total -= weight * np.log(right) * ((1 - right) ** gamma if kind == "focal" else 1)
    assert float(found) == pytest.approx(total / (7 * 3), rel=1e-12)


def test_weights_of_rare_labels() -> None:
    active = torch.tensor([0.5, 0.2, 0.1, 0.0001, 0.9])
    assert positive_weights(active, 0.5).tolist() == pytest.approx([1, 2, 3, 20, 1])
    assert positive_weights(active, 0.0).tolist() == [1, 1, 1, 1, 1]
    assert positive_weights(active, 1.0).tolist() == pytest.approx([1, 4, 9, 20, 1])


# whole recordings -----------------------------------------------------------------------------------------------------


class Samples(EventRecording):
    """A recording in memory that remembers how much of it was read at once."""

    def __init__(self, samples: np.ndarray) -> None:
        self.data, self.frames, self.sample_rate = samples.astype(np.float32), len(samples), RATE
        self.name, self.truth, self.condition, self.asked = "samples", [(0.5, 1.0, 0)], "", []

    def samples(self, start: int, stop: int) -> np.ndarray:
        self.asked.append((start, stop))
        return self.data[start:stop]


@pytest.mark.parametrize("frames", [700, 2 * RATE, 5 * RATE + 123, 9 * RATE, 11 * RATE - 1])
@pytest.mark.parametrize("causal", [False, True])
def test_a_long_recording_is_heard_as_a_whole(root: Path, frames: int, causal: bool) -> None:
    """In windows where a token hears few around it, with the state where it hears the past alone."""
    mixer = {"name": "linear", "num_heads": 2} if causal else {"name": "softmax", "num_heads": 2, "window_size": 5}
    model = {"mixer": mixer, "depth": 2, "causal": causal, "position": "none"}
    module = built(composed(root), model, windows_at_once=3)
    recording = Samples(0.1 * np.random.default_rng(0).standard_normal(frames))
    found = module.logits(recording)
    with torch.no_grad():
        whole = module.net(torch.from_numpy(recording.data)[None]).y[0]
    assert found.shape == whole.shape
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)
    # of a window of 2 seconds, and the last frame's width
    assert max(stop - start for start, stop in recording.asked) <= 2.1 * RATE


def test_windows_share_the_overlap(root: Path) -> None:
    module = built(composed(root), window=2.0, window_overlap=0.8, windows_at_once=1)
    recording = Samples(np.zeros(7 * RATE))
    module.logits(recording)
    front = module.net.encoder.front_end
    step, context = round(1.2 * RATE / front.hop_length), round(0.4 * RATE / front.hop_length)
    starts = [start // front.hop_length for start, _ in recording.asked]
    assert starts == [max(step * number - context, 0) for number in range(len(starts))] and len(starts) == 6
    with pytest.raises(UserError, match=r"task\.window_overlap=2 must be below the window of 2 seconds"):
        built(composed(root), window=2.0, window_overlap=2.0)


def test_times_of_tokens_and_decoder(root: Path) -> None:
    module = built(composed(root), median_seconds=0.1, threshold=0.6, low_ratio=0.5)
    front = module.net.encoder.front_end
    scores = module.scores(Samples(np.zeros(2 * RATE)))
    times = scores.first + scores.step * np.arange(len(scores.probabilities))
    np.testing.assert_allclose(times, front.times(len(times)).numpy(), rtol=1e-12)
    options = module.decoder_options()
    assert (options["threshold"], options["low"], options["median"]) == (0.6, 0.3, 5)
    probabilities = np.zeros((20, 2), dtype=np.float32)
    probabilities[5:12, 1] = 0.9
    found = module.decode(scores._replace(probabilities=probabilities))
    assert [(span.label, span.start, span.end) for span in found] == [
        (1, pytest.approx(front.span(5, 11)[0]), pytest.approx(front.span(5, 11)[1]))
    ]


def test_words_can_be_asked_for(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from seqzoo.pipelines.audio.events import module as events

    table = {"low": 0, "high": 1, "a deep tone": 0}
    monkeypatch.setattr(
        events, "_vectors", lambda texts: F.one_hot(torch.tensor([table[t] for t in texts]), 384).float()
    )
    module = built(composed(root), {"head": "text"})
    module.set_labels_in_words()
    recording = Samples(0.1 * np.random.default_rng(0).standard_normal(3 * RATE))
    own = module.scores(recording).probabilities
    asked = module.query(recording, ["a deep tone", "high", "low"]).probabilities
    np.testing.assert_allclose(asked[:, [1, 2]], own, atol=1e-6)  # labels are high, low
    np.testing.assert_array_equal(asked[:, 0], asked[:, 2])
    with pytest.raises(UserError, match=r"any words can be asked for with model\.head=text"):
        built(composed(root)).query(recording, ["x"])
    assert [label_text(x) for x in ("7", "vm-goodbye", "digits/mon-3", "door_slam")] == [
        "seven",
        "vm goodbye",
        "digits mon 3",
        "door slam",
    ]


def test_validation_chooses_the_threshold(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for fixed, expected in ((None, 0.7), (0.4, 0.4)):
        module = built(composed(root), threshold=fixed)
        logged: dict[str, float] = {}
        monkeypatch.setattr(module, "_over_ranks", lambda flat: flat)
        monkeypatch.setattr(module, "log_dict", lambda values, log=logged, **_: log.update(values))
        module.on_validation_epoch_start()
        for threshold, sums in module._sums.items():
            found = [(0.0, 1.0, 0), (5.0, 6.0, 0)] if threshold < 0.65 else [(0.0, 1.0, 0)] if threshold < 0.75 else []
            sums.update([(0.0, 1.0, 0)], found, 10.0)
        module.on_validation_epoch_end()
        assert float(module.threshold) == logged["val/threshold"] == expected
        assert logged["val/event_f1"] == pytest.approx(2 / 3 if fixed else 1)
        assert float(module.state_dict()["threshold"]) == expected


def test_baselines_call_everything_what_is_most_frequent() -> None:
    samples = 0.01 * np.random.default_rng(0).standard_normal(20 * RATE)
    samples[5 * RATE : 6 * RATE] *= 4  # 12 dB
    samples[12 * RATE : 13 * RATE] *= 4
    recording = Samples(samples)
    recording.truth = [(5.0, 6.0, 1), (12.0, 13.0, 0)]
    schema = {"per_second": [0.1, 0.4], "event_seconds": 1.0}
    assert 5 <= task.energy_margin([recording]) <= 10
    found = task.baselines([recording], schema, 8.0, ["a", "b"])
    energy = found["energy detector: always 'b'"]
    assert [row["found"] for row in energy["per_class"]] == [0, 2] and energy["event_f1"] == 0.5
    assert energy["event_f1_any"] == 1.0
    assert [row["found"] for row in found["chance"]["per_class"]] == [2, 8]


# the command ----------------------------------------------------------------------------------------------------------


def config(root: Path, run: Path, *overrides: str) -> dict[str, Any]:
    with initialize_config_module("seqzoo.conf", version_base="1.3"):
        cfg = compose(
            "config",
            overrides=[
                "experiment=audio/find",
                f"data.path={root}/clips",
                f"data.backgrounds={root}/backgrounds",
                *(f"data.{key}={json.dumps(value)}" for key, value in COMPOSED.items()),
                "data.train_events_per_minute=null",
                "model=audio_detector_tiny",
                "model.dim=16",
                "model.depth=1",
                "model.front_end.stack=2",
                "model.front_end.num_mels=16",
                "mixer=softmax",
                "mixer.num_heads=2",
                "task.window_overlap=0.5",
                "optimizer.lr=2.0e-2",
                "trainer.max_epochs=2",
                "trainer.accelerator=cpu",
                "logger.tensorboard=false",
                "callbacks.progress=none",
                f"hydra.run.dir={run}",
                f"paths.runs={run.parent}",
                *overrides,
            ],
        )
    found = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


@pytest.fixture(scope="module")
def trained(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "one"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEQZOO_CWD", str(run.parent))
        found = execute("fit", config(root, run, "data.steps=25"), run)
    assert found["test/20 dB/event_f1"] > 0.6  # tones in noise are easily told
    assert found["test/event_f1"] == pytest.approx((found["test/20 dB/event_f1"] + found["test/10 dB/event_f1"]) / 2)
    return run


def test_a_run_leaves_tables_and_a_picture(trained: Path) -> None:
    with (trained / "test.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["condition"] for row in rows] == ["20 dB"] * 3 + ["10 dB"] * 3
    assert rows[1]["method"] == "energy detector: always 'high'" and rows[2]["method"] == "chance"
    assert float(rows[0]["event_f1"]) > float(rows[1]["event_f1"]) > float(rows[2]["event_f1"])
    assert float(rows[1]["event_f1_any"]) > float(rows[1]["event_f1"])
    with (trained / "labels.csv").open() as file:
        each = list(csv.DictReader(file))
    assert [(row["label"], row["condition"]) for row in each] == [
        (label, condition) for condition in ("20 dB", "10 dB") for label in ("high", "low")
    ]
    assert sum(int(row["events"]) for row in each[:2]) == int(rows[0]["events"])
    assert (trained / "timeline.png").is_file() or pytest.importorskip("matplotlib") is None
    record = json.loads((trained / "scores.json").read_text())
    assert record["test"]["20 dB"]["event_f1"] == float(rows[0]["event_f1"])
    saved = load_model(trained / "model")
    assert saved.encoder.sample_rate == RATE and saved.num_classes == 2


def test_a_checkpoint_gives_the_same_scores_and_keeps_its_threshold(root: Path, trained: Path, tmp_path: Path) -> None:
    path = trained / "checkpoints" / "best.ckpt"
    cfg = config(root, tmp_path / "again", f"ckpt_path={path}")
    found = execute("test", cfg, tmp_path / "again")
    rows = [(trained / "test.csv").read_text(), (tmp_path / "again" / "test.csv").read_text()]
    assert rows[0] == rows[1] and found["test/20 dB/event_f1"] > 0.6
    module = task.load_module(load_checkpoint(path), path, cfg)
    record = json.loads((trained / "scores.json").read_text())
    assert float(module.threshold) == record["threshold"]
    with pytest.raises(UserError, match=r"was trained at 4000 Hz, here it is data\.sample_rate=8000"):
        task.check_schema(module, AudioEventData(sample_rate=8000), path)


def test_decoding_can_be_changed_after_training(root: Path, trained: Path, tmp_path: Path) -> None:
    path = trained / "checkpoints" / "best.ckpt"
    cfg = config(root, tmp_path / "x", f"ckpt_path={path}", "task.threshold=0.123", "task.min_duration=0.25")
    module = task.load_module(load_checkpoint(path), path, cfg)
    options = module.decoder_options()
    assert (options["threshold"], options["min_duration"]) == (0.123, 0.25)
    assert options["low"] == pytest.approx(0.0615)
    del cfg["task"]["min_duration"]
    cfg["task"]["threshold"] = None
    saved = json.loads((trained / "scores.json").read_text())["threshold"]
    options = task.load_module(load_checkpoint(path), path, cfg).decoder_options()
    assert (options["threshold"], options["min_duration"]) == (saved, 0.1)


def test_a_model_is_tested_on_spans_of_its_labels(root: Path, trained: Path, tmp_path: Path) -> None:
    path = trained / "checkpoints" / "best.ckpt"
    cfg = config(root, tmp_path / "own", f"ckpt_path={path}")
    cfg["data"] = {"source": "spans", "path": str(root / "own" / "spans.csv"), "sample_rate": RATE, "overlap": True}
    found = execute("test", cfg, tmp_path / "own")
    assert found["test/miou"] > 0.3
    (root / "own" / "other.csv").write_text((root / "own" / "spans.csv").read_text().replace("low", "deep"))
    cfg["data"]["path"] = str(root / "own" / "other.csv")
    with pytest.raises(UserError, match="has the label 'deep', which the model does not know"):
        execute("test", cfg, tmp_path / "other")


def test_choices_of_the_task(root: Path) -> None:
    data = composed(root)
    with pytest.raises(UserError, match=r"task.criterion='bse' is not a choice. Did you mean bce\?"):
        built(data, criterion="bse")
    with pytest.raises(UserError, match=r"data\.overlap"):
        built(data, augment={"mixup": 0.5})
    with pytest.raises(UserError, match="is no detector of events"):
        built(data, {"name": "audio_classifier_tiny"})


def test_shifts_move_the_spans_too(root: Path) -> None:
    data = composed(root)
    module = built(data, augment={"shift_seconds": 0.3}, seed=4)
    seen: dict[str, torch.Tensor] = {}
    features = module.net.encoder.features

    def heard(samples: torch.Tensor, lengths: torch.Tensor) -> Any:
        seen["samples"] = samples
        return features(samples, lengths)

    def loss(logits: torch.Tensor, lengths: torch.Tensor, spans: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        seen["spans"] = spans
        return logits.sum()

    module.net.encoder.features = heard  # type: ignore[method-assign]
    module._loss = loss  # type: ignore[method-assign]
    module.log = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    batch = data._windows()[np.arange(4)]
    module.training_step(batch, 0)
    for row in range(4):
        moved = (seen["spans"][row] - batch["spans"][row]) * RATE
        shift = round(float(moved[0, 0]))
        assert torch.allclose(moved, torch.full_like(moved, shift)) and 0 < abs(shift) <= 0.3 * RATE
        before, after = batch["samples"][row], seen["samples"][row]
        assert torch.equal(after[shift:], before[:-shift]) if shift > 0 else torch.equal(after[:shift], before[-shift:])


def test_timeline_of_many_labels_shows_those_that_sound_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    drawn: list[Any] = []
    monkeypatch.setattr(pictures, "draw_spans", lambda axis, truth, found, *_: drawn.append((truth, found)))
    found = [(float(number), number + 0.5, label) for number, label in enumerate([*range(40, 71), 5, 5])]
    pictures.plot_timeline([(0.0, 1.0, 70)], found, [str(n) for n in range(100)], tmp_path / "t.png", seconds=50.0)
    truth, shown = drawn[0]
    # 30 of 32 labels: 5, 40 .. 67 and 70
    assert truth == [(0.0, 1.0, 29)]
    assert [label for _, _, label in shown] == [*range(1, 30), 0, 0]


def test_timeline_of_a_long_recording_says_what_it_shows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    truth, found = [(1.0, 2.0, 0), (700.0, 701.0, 1)], [(1.1, 2.0, 1)]
    path = plot_timeline(truth, found, ["a", "b"], tmp_path / "t.png", seconds=900.0, title="x")
    assert path is not None and path.read_bytes()[:4] == b"\x89PNG"
    assert plot_timeline(None, [], ["a"], tmp_path / "u.png", seconds=2.5) is not None
