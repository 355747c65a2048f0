"""The events pipeline: windows and truth, stitched recordings, loss, runs and reports, tables of spans, bad input."""

from __future__ import annotations

import csv
import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

soundfile = pytest.importorskip("soundfile", reason="needs seqzoo[audio]")
pytest.importorskip("torchaudio", reason="needs seqzoo[audio]")

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
from seqzoo.pipelines.audio.events.recordings import EventRecording, NumberSampler, collate  # noqa: E402
from seqzoo.pipelines.audio.pictures import plot_timeline  # noqa: E402
from seqzoo.pipelines.checkpoints import load_checkpoint  # noqa: E402
from seqzoo.pipelines.errors import UserError  # noqa: E402
from seqzoo.pipelines.loading import ResumableLoader, loader_options  # noqa: E402
from seqzoo.pipelines.run import execute  # noqa: E402
from seqzoo.zoo import load_model  # noqa: E402

RATE = 4000
COMPOSED: dict[str, Any] = {
    "clips": "folder",
    "sample_rate": RATE,
    "snr_db": 10.0,
    "test_snr_db": [20.0, 10.0],
    "events_per_minute": 60.0,
    "window": 2.0,
    "val_recordings": 2,
    "val_minutes": 0.2,
    "test_minutes": 0.3,
    "batch_size": 4,
    "steps": 6,
}
MODEL = {
    "name": "audio_detector_tiny",
    "mixer": {"name": "softmax", "num_heads": 2},
    "dim": 16,
    "depth": 1,
    "front_end": {"name": "log_mel", "stack": 2, "num_mels": 16, "norm": "fixed"},
}
OPTIMIZER = {"name": "adamw", "lr": 1e-2, "weight_decay": 0.0, "betas": [0.9, 0.999]}


def write(path: Path, samples: np.ndarray, rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples.astype(np.float32), rate, subtype="FLOAT")
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tones of two heights as clips, noise as a background, and recordings with a table."""
    folder, rng = tmp_path_factory.mktemp("events"), np.random.default_rng(0)
    write(folder / "backgrounds" / "noise.wav", 0.1 * rng.standard_normal(40 * RATE))
    time = np.arange(RATE) / RATE
    for label, hertz in (("low", 300), ("high", 1100)):
        for number in range(12):
            tone = 0.5 * np.sin(2 * np.pi * (hertz + 10 * number) * time[: RATE // 4 + 100 * number])
            write(folder / "clips" / label / f"{number}.wav", tone)
    rows = ["path,start,end,label"]
    for number in range(6):
        samples = 0.05 * rng.standard_normal(8 * RATE + number)
        for start, label, hertz in ((1.0, "low", 300), (4.5 + 0.1 * number, "high", 1100)):
            place = round(start * RATE)
            samples[place : place + RATE] += 0.5 * np.sin(2 * np.pi * hertz * time)
            rows.append(f"r{number}.wav,{start:.1f},{start + 1:.1f},{label}")
        write(folder / "own" / f"r{number}.wav", samples)
    (folder / "own" / "spans.csv").write_text("\n".join(rows) + "\n")
    return folder


def composed(root: Path, **options: Any) -> AudioEventData:
    given = {"path": root / "clips", "backgrounds": root / "backgrounds", **COMPOSED, **options}
    data = AudioEventData(**given)
    data.setup("fit")
    return data


def spans(root: Path, table: str = "spans.csv", **options: Any) -> AudioEventData:
    given = {"overlap": True, "sample_rate": RATE, "window": 2.0, "split_ratio": [0.6, 0.2, 0.2], "batch_size": 5}
    data = AudioEventData("spans", root / "own" / table, **{**given, **options})
    data.setup("fit")
    return data


def built(data: AudioEventData, model: dict[str, Any] | None = None, **options: Any) -> AudioEventModule:
    torch.manual_seed(0)
    return AudioEventModule(
        {**MODEL, **(model or {})}, {"window_overlap": 0.5, **options}, OPTIMIZER, {"name": "none"}, data.schema()
    ).eval()


# data -----------------------------------------------------------------------------------------------------------------


def test_splits_share_no_clip_and_no_background(root: Path) -> None:
    data = composed(root)
    names = {split: {clip.name for clip in composer.bank.clips} for split, composer in data.composers.items()}
    assert sum(map(len, names.values())) == 24 == len(set.union(*names.values())) and all(names.values())
    stretches = [(b.start, b.stop) for split in ("train", "val", "test") for b in data.composers[split].backgrounds]
    assert all(before[1] < after[0] for before, after in itertools.pairwise(stretches))
    assert [clip for clip in data.composers["val"].bank.clips if clip.split != "val"] == []


def test_digits_share_no_speaker(root: Path, tmp_path: Path) -> None:
    for speaker in ("ann", "bob", "cy", "dee"):
        for digit in range(2):
            write(tmp_path / f"{digit}_{speaker}_0.wav", 0.3 * np.sin(np.arange(900) * (0.3 + digit)))
    data = composed(root, path=tmp_path, clips="digits")
    groups = [{clip.group for clip in composer.bank.clips} for composer in data.composers.values()]
    assert sum(map(len, groups)) == 4 == len(set.union(*groups))
    assert any("of " in note for note in data.notes)


def test_windows_hold_what_the_truth_says(root: Path) -> None:
    data = composed(root, snr_db=60.0)
    batch = data._windows()[np.arange(40)]
    assert batch["samples"].shape == (40, 2 * RATE) and batch["samples"].dtype == torch.float32
    assert (batch["lengths"] == 2 * RATE).all()
    assert batch["recording"].tolist() == list(range(40))
    there = batch["classes"] >= 0
    begin, end = batch["spans"][..., 0], batch["spans"][..., 1]
    assert (begin[there] < end[there]).all() and (begin[there] >= 0).all() and (end[there] <= 2).all()
    assert (begin[there] == 0).any() and (end[there] == 2).any()  # some are cut by the window
    loud = batch["samples"].square().unfold(1, 40, 40).mean(2)
    for row in range(40):
        inside = torch.zeros(2 * RATE, dtype=torch.bool)
        for (a, b), label in zip(batch["spans"][row].tolist(), batch["classes"][row].tolist(), strict=True):
            if label >= 0:
                inside[round(a * RATE) : round(b * RATE)] = True
        cells = inside.unfold(0, 40, 40)
        whole, none = cells.all(1), ~cells.any(1)
        if whole.any():
            assert loud[row][none].max() < loud[row][whole][1:-1].min()


def test_windows_are_numbers_and_never_come_again(root: Path) -> None:
    data = composed(root)
    first, again = data._windows()[np.array([7, 3])], composed(root)._windows()[np.array([3])]
    assert torch.equal(first["samples"][1], again["samples"][0])
    assert not torch.equal(first["samples"][0], first["samples"][1])
    other = composed(root, seed=1)._windows()[np.array([3])]
    assert not torch.equal(other["samples"], again["samples"])
    sampler = NumberSampler(4, steps=3)
    seen = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        seen += [batch.tolist() for batch in sampler]
    assert [number for batch in seen for number in batch] == list(range(36))
    # a resumed run goes on where it was
    loader = ResumableLoader(data._windows(), sampler=NumberSampler(4, steps=3), **loader_options(0))
    loader.load_state_dict({"epoch": 1, "taken": 2})
    assert [batch["recording"].tolist() for batch in loader] == [seen[5]]


def test_validation_does_not_depend_on_the_seed_of_training(root: Path) -> None:
    one, other = composed(root), composed(root, seed=5)
    for before, after in zip(one.recordings["val"], other.recordings["val"], strict=True):
        assert before.truth == after.truth
        np.testing.assert_array_equal(before.samples(100, 900), after.samples(100, 900))
    assert composed(root, split_seed=1).recordings["val"][0].truth != one.recordings["val"][0].truth
    assert [r.condition for r in one.recordings["test"]] == ["20 dB", "10 dB"]
    loud, soft = one.recordings["test"]
    assert loud.truth == soft.truth and loud.frames == 18 * RATE
    place = round(loud.truth[0][0] * RATE)
    assert not np.allclose(loud.samples(place, place + 500), soft.samples(place, place + 500), atol=1e-3)


def test_how_often_labels_sound(root: Path) -> None:
    data = composed(root)
    facts = data.schema()
    lengths = {label: [] for label in facts["labels"]}
    bank = data.composers["train"].bank
    for number, clip in enumerate(bank.clips):
        lengths[clip.label].append(len(bank.get(number)) / RATE)
    assert facts["active"] == pytest.approx([0.5 * np.mean(lengths[label]) for label in facts["labels"]])
    assert facts["per_second"] == [0.5, 0.5]
    assert facts["event_seconds"] == pytest.approx(np.mean([np.mean(own) for own in lengths.values()]))
    denser = composed(root, train_events_per_minute=120.0).schema()
    assert denser["active"] == pytest.approx([2 * share for share in facts["active"]])
    assert (denser["per_second"], denser["event_seconds"]) == ([0.5, 0.5], pytest.approx(facts["event_seconds"]))


def test_recordings_can_go_to_another_process(root: Path) -> None:
    for recording in (composed(root).recordings["val"][0], spans(root).recordings["val"][0]):
        copy: EventRecording = pickle.loads(pickle.dumps(recording))
        np.testing.assert_array_equal(copy.samples(11, 555), recording.samples(11, 555))
        assert copy.truth == recording.truth


# spans of one's own ---------------------------------------------------------------------------------------------------


def test_a_table_of_spans(root: Path) -> None:
    data = spans(root)
    assert data.labels == ["high", "low"]
    sizes = {split: len(found) for split, found in data.recordings.items()}
    assert sum(sizes.values()) == 6 and all(sizes.values())
    for recordings in data.recordings.values():
        for recording in recordings:
            shift = 0.1 * int(Path(recording.name).stem[1:])
            assert recording.truth == [(1.0, 2.0, 1), (pytest.approx(4.5 + shift), pytest.approx(5.5 + shift), 0)]
    seconds = sum(recording.seconds for recording in data.recordings["train"])
    number = sizes["train"]
    assert data.schema()["active"] == pytest.approx([number / seconds] * 2)
    assert data.schema()["event_seconds"] == pytest.approx(1.0)


def test_windows_of_files_are_their_samples(root: Path) -> None:
    data = spans(root)
    batch = data._windows()[np.arange(60)]
    starts = batch["start"].tolist()
    assert min(starts) < 1 < 5 < max(starts)
    for row, (number, start) in enumerate(zip(batch["recording"].tolist(), starts, strict=True)):
        recording = data.recordings["train"][number]
        place = round(start * RATE)
        expected = recording.samples(place, place + 2 * RATE)
        np.testing.assert_array_equal(batch["samples"][row].numpy(), expected)
        inside = [
            (max(a - start, 0), min(b - start, 2.0), label)
            for a, b, label in recording.truth
            if a < start + 2 and b > start
        ]
        count = int((batch["classes"][row] >= 0).sum())
        pairs = zip(batch["spans"][row].tolist(), batch["classes"][row].tolist(), strict=True)
        found = [(*span, label) for span, label in pairs]
        assert found[:count] == [pytest.approx(span) for span in inside]


def test_half_of_the_windows_are_near_an_event(root: Path, tmp_path: Path) -> None:
    rows = []
    for number in range(3):
        write(tmp_path / f"{number}.wav", np.zeros(60 * RATE))
        rows.append(f"{number}.wav,30,30.5,a,{('train', 'val', 'test')[number]}")
    (tmp_path / "t.csv").write_text("path,start,end,label,split\n" + "\n".join(rows) + "\n")
    data = AudioEventData("spans", tmp_path / "t.csv", sample_rate=RATE, window=2.0, overlap=True)
    data.setup("fit")
    heard = (data._windows()[np.arange(300)]["classes"] >= 0).any(1).float().mean()
    assert 0.42 < heard < 0.64  # a half, and of the others 2.5 of 58 seconds


def test_windows_longer_than_a_recording_are_filled_up(root: Path) -> None:
    data = spans(root, window=9.0)
    batch = data._windows()[np.arange(3)]
    assert batch["samples"].shape == (3, 9 * RATE)
    for row, length in enumerate(batch["lengths"].tolist()):
        assert 8 * RATE <= length < 9 * RATE and not batch["samples"][row, length:].any()
        assert (batch["start"] == 0).all()


def own_table(root: Path, name: str, rows: list[str]) -> str:
    (root / "own" / name).write_text("path,start,end,label\n" + "\n".join(rows) + "\n")
    return name


def test_spans_that_cannot_be(root: Path) -> None:
    rows = [f"r{number}.wav,1,2,low" for number in range(6)]
    beyond = own_table(root, "beyond.csv", [*rows[:3], "r3.wav,7,9.5,low", *rows[4:]])
    with pytest.raises(UserError, match=r"beyond.csv, line 5: the span from 7 to 9.5 seconds ends after .*r3.wav"):
        spans(root, beyond)
    twice = own_table(root, "twice.csv", [*rows, "r2.wav,1.5,3,high", "r3.wav,1.5,3,high", "r4.wav,4,5,high"])
    message = r"spans of .*r2.wav overlap: .*line 4' \(1 to 2.0\) and .*line 8' \(1.5 to 3.0\); .* one label at a time"
    with pytest.raises(UserError, match=message):
        spans(root, twice, overlap=False)
    missing = own_table(root, "missing.csv", [*rows, "r9.wav,1,2,low"])
    with pytest.raises(UserError, match=r"missing.csv, line 8: .*r9.wav"):
        spans(root, missing)
    with pytest.raises(UserError, match=r"data\.path is missing: a table"):
        AudioEventData("spans").setup("fit")


def test_bad_recordings_are_skipped_and_counted(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"b{number}" for number in range(45)]
    for name in names:
        write(root / "own" / f"{name}.wav", np.full(RATE, 0.1))
    (root / "own" / "b7.wav").write_text("no audio at all")
    rows = [f"{name}.wav,0.1,0.5,low" for name in names]
    table = "path,start,end,label,split\n" + "".join(f"{row},train\n" for row in rows)
    ends = "r0.wav,1,2,low,val\nr1.wav,1,2,low,test\n"
    (root / "own" / "bad.csv").write_text(table + ends)
    data = spans(root, "bad.csv")
    assert len(data.recordings["train"]) == 44
    assert "1 of 45 audio files were skipped" in (data.bad.report() if data.bad else "")
    assert "b7.wav" in capsys.readouterr().err
    (root / "own" / "b8.wav").write_text("no audio")
    (root / "own" / "b9.wav").write_text("no audio")
    with pytest.raises(UserError, match=r"3 of 45 audio files were skipped.*more than 5%"):
        spans(root, "bad.csv")
    # evaluation leaves nothing out
    (root / "own" / "bad.csv").write_text(
        table.replace("b8.wav,0.1,0.5,low,train\nb9.wav,0.1,0.5,low,train\n", "") + "b9.wav,0.1,0.5,low,val\n" + ends
    )
    with pytest.raises(UserError, match=r"b9\.wav is a text file"):
        spans(root, "bad.csv")


def test_a_file_that_breaks_later_is_replaced(root: Path, tmp_path: Path) -> None:
    for number in range(30):
        write(tmp_path / f"{number}.wav", np.full(3 * RATE, 0.1))
    rows = [f"{number}.wav,0.5,1.5,low,{'train' if number < 28 else 'val'}" for number in range(30)]
    (tmp_path / "t.csv").write_text("path,start,end,label,split\n" + "\n".join(rows) + "\n")
    data = AudioEventData("spans", tmp_path / "t.csv", sample_rate=RATE, window=1.0, overlap=True)
    data.setup("fit")
    write(tmp_path / "3.wav", np.full(3 * RATE, np.nan))
    batch = data._windows()[np.arange(200)]
    assert 3 not in batch["recording"].tolist() and len(set(batch["recording"].tolist())) == 27
    assert data.bad is not None and data.bad.causes == {"not finite": 1}


def test_clips_that_are_longer_than_a_window_are_left_out_in_training(root: Path, tmp_path: Path) -> None:
    for split, seconds in (("train", (1, 2, 3)), ("val", (1, 3)), ("test", (1,))):
        for length in seconds:
            write(tmp_path / split / "a" / f"{length}.wav", 0.3 * np.sin(np.arange(length * RATE) * 0.3))
    data = composed(root, path=tmp_path, window=0.5, train_speed=[0.9, 1.0], events_per_minute=10.0)
    # half a second with one on either side, of which a clip at 0.9 of its speed takes more
    assert [Path(clip.name).name for clip in data.composers["train"].bank.clips] == ["1.wav", "2.wav"]
    assert "train: 1 clips are left out, longer than 2.25 seconds, which fit into data.window=0.5" in data.notes
    assert len(data.composers["val"].bank.clips) == 2
    data._windows()[np.arange(20)]


def test_bad_clips_are_skipped_in_training_alone(root: Path, tmp_path: Path) -> None:
    for number in range(60):
        sound = 0.3 * np.sin(np.arange(1000) * (0.3 + 0.01 * number))
        write(tmp_path / ("train" if number < 40 else "val" if number < 50 else "test") / "a" / f"{number}.wav", sound)
    write(tmp_path / "train" / "a" / "7.wav", np.full(1000, np.nan))
    data = composed(root, path=tmp_path)
    assert data.bad is not None and data.bad.causes == {"not finite": 1}
    data._windows()[np.arange(30)]
    assert "1 of 40 audio files were skipped: 1 not finite" in data.bad.report()
    write(tmp_path / "val" / "a" / "45.wav", np.full(1000, np.nan))
    with pytest.raises(UserError, match=r"45\.wav holds NaN"):
        composed(root, path=tmp_path, val_minutes=2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "composd"}, r"data.source='composd' is not a choice. Did you mean composed\?"),
        ({"clips": "digit"}, r"data.clips='digit' is not a choice. Did you mean digits\?"),
        ({"steps": 0}, "data.steps=0 must be a whole number of at least 1"),
        ({"window": 0.0}, "data.window=0.0 must be above 0"),
        ({"test_snr_db": []}, "data.test_snr_db is empty"),
        ({"snr_db": "loud"}, "snr_db='loud' must be a number"),
        ({"snr_db": float("nan")}, "snr_db=nan must be a number"),
        ({"backgrounds": None}, "data.backgrounds is missing"),
        ({"path": None}, "data.path is missing: the folder of the clips"),
        ({"split_ratio": [0.8, 0.2, 0.0]}, "no clip for test"),
        ({"val_minutes": 0.004, "val_recordings": 40, "events_per_minute": 80.0}, "more than the recording of 0.24"),
    ],
)
def test_data_that_cannot_be(root: Path, options: dict[str, Any], message: str) -> None:
    given = {"path": root / "clips", "backgrounds": root / "backgrounds", **COMPOSED, **options}
    with pytest.raises(UserError, match=message):
        AudioEventData(**given).setup("fit")


def test_backgrounds_that_are_missing(root: Path) -> None:
    with pytest.raises(UserError, match=r"no such folder of backgrounds: .* Did you mean backgrounds\?"):
        AudioEventData(path=root / "clips", backgrounds=root / "background", **COMPOSED).setup("fit")


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


def test_collate_of_windows_without_events() -> None:
    class Window:
        samples, truth, recording, start = np.ones(3, np.float32), [], 5, 1.5

    batch = collate([Window(), Window()], 4, RATE)  # type: ignore[list-item]
    assert batch["samples"].tolist() == [[1, 1, 1, 0]] * 2 and batch["lengths"].tolist() == [3, 3]
    assert batch["spans"].shape == (2, 0, 2) and batch["classes"].shape == (2, 0)
    assert batch["start"].tolist() == [1.5, 1.5] and batch["recording"].tolist() == [5, 5]


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
