"""The data of events: composed windows and recordings, tables of spans, what cannot be read."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

soundfile = pytest.importorskip("soundfile", reason="needs seqzoo[audio]")
pytest.importorskip("torchaudio", reason="needs seqzoo[audio]")

from event_recordings import COMPOSED, RATE, composed, fill, spans, write  # noqa: E402

from seqzoo.pipelines.audio.events.data import AudioEventData  # noqa: E402
from seqzoo.pipelines.audio.events.recordings import EventRecording, collate  # noqa: E402
from seqzoo.pipelines.errors import UserError  # noqa: E402
from seqzoo.pipelines.loading import NumberSampler, ResumableLoader, loader_options  # noqa: E402


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("events"))


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


def test_collate_of_windows_without_events() -> None:
    class Window:
        samples, truth, recording, start = np.ones(3, np.float32), [], 5, 1.5

    batch = collate([Window(), Window()], 4, RATE)  # type: ignore[list-item]
    assert batch["samples"].tolist() == [[1, 1, 1, 0]] * 2 and batch["lengths"].tolist() == [3, 3]
    assert batch["spans"].shape == (2, 0, 2) and batch["classes"].shape == (2, 0)
    assert batch["start"].tolist() == [1.5, 1.5] and batch["recording"].tolist() == [5, 5]
