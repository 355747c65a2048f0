"""Grounding: batches against the videos, and the command."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

pytest.importorskip("av")

from grounding_module import DIM, module

from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.run import execute
from seqzoo.pipelines.video.clips import VideoClip
from seqzoo.pipelines.video.composer import Composer
from seqzoo.pipelines.video.grounding import data as data_module
from seqzoo.pipelines.video.grounding import predict as predict_module
from seqzoo.pipelines.video.grounding.data import VideoGroundingData
from seqzoo.pipelines.video.grounding.features import FeatureBank
from seqzoo.pipelines.video.grounding.videos import (
    ComposedVideo,
    ComposedWindows,
    FileStore,
    FileVideo,
    FileWindows,
    Seen,
    Window,
    collate,
)
from seqzoo.pipelines.video.reader import open_video
from seqzoo.pipelines.video.virtual import Segment, VirtualVideo

SIZE = (16, 16)
COLOURS = {"red": (230, 20, 20), "green": (20, 230, 20), "blue": (20, 20, 230), "grey": (120, 120, 120)}


class ColourScorer:
    """Which colour a frame has, one of four: the vectors of frames and of their names are the same, of length 1."""

    key, size, dim = "colours", SIZE, DIM

    def __init__(self) -> None:
        self.encoded = 0

    def encode_frames(self, frames: np.ndarray) -> np.ndarray:
        self.encoded += len(frames)
        mean = frames.reshape(len(frames), -1, 3).mean(1)
        nearest = np.abs(mean[:, None] - np.array(list(COLOURS.values()))).sum(-1).argmin(1)
        return np.eye(DIM, dtype=np.float32)[nearest]

    def encode_query(self, query: Any) -> np.ndarray:
        if query not in COLOURS:
            raise UserError(f"no colour {query!r}")
        return np.eye(DIM, dtype=np.float32)[list(COLOURS).index(query)]


def write(path: Path, pieces: list[tuple[Any, int]], fps: int = 10) -> Path:
    """A video of one colour (or picture) after the other, so many frames of each."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = SIZE[1], SIZE[0], "yuv420p"
        for colour, frames in pieces:
            own = COLOURS[colour] if isinstance(colour, str) else colour
            picture = np.broadcast_to(np.array(own, np.uint8), (*SIZE, 3))
            for _ in range(frames):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six videos of 12 seconds, grey but for a red and a blue span, with a table; and folders of one-colour clips."""
    root = tmp_path_factory.mktemp("colours")
    rows = ["path,start,end,text,split"]
    for number in range(6):
        red, blue = 20 + 5 * number, 90 - 5 * number
        pieces = [("grey", red), ("red", 15), ("grey", blue - red - 15), ("blue", 20), ("grey", 100 - blue)]
        write(root / f"{number}.mp4", pieces)
        split = ("train", "train", "train", "train", "val", "test")[number]
        rows += [f"{number}.mp4,{red / 10},{red / 10 + 1.5},red,{split}"]
        rows += [f"{number}.mp4,{blue / 10},{blue / 10 + 2},blue,{split}"]
    (root / "spans.csv").write_text("\n".join(rows) + "\n")
    for label in ("red", "green", "blue"):
        (root / "events" / label).mkdir(parents=True)
        for number in range(3):
            write(root / "events" / label / f"{label}{number}.mp4", [(label, 20 + number)])
    (root / "footage").mkdir()
    write(root / "footage" / "grey.mp4", [("grey", 300)])
    return root


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch) -> ColourScorer:
    """In place of the scorers with weights."""
    scorer = ColourScorer()
    monkeypatch.setattr(data_module, "load_scorer", lambda name, options, cache=None: scorer)
    monkeypatch.setattr(predict_module, "load_scorer", lambda name, options, cache=None: scorer)
    return scorer


def composer(folder: Path, **options: Any) -> Composer:
    events = [
        VideoClip(folder / "events" / label / f"{label}0.mp4", 0.0, None, label) for label in ("red", "green", "blue")
    ]
    footage = [VideoClip(folder / "footage" / "grey.mp4", 0.0, None, "grey"), *events]
    return Composer(events, footage, size=SIZE, min_gap=1.0, piece_seconds=(1.0, 3.0), **options)


# videos and windows ---------------------------------------------------------------------------------------------------


def test_the_bank_encodes_each_frame_once(folder: Path, tmp_path: Path) -> None:
    from seqzoo.pipelines.video.cache import FeatureCache

    scorer, made = ColourScorer(), composer(folder, flip=True)
    cache = FeatureCache(tmp_path)
    bank = FeatureBank(scorer, cache=cache, progress=False)
    bank.fill(made)
    assert scorer.encoded == 2 * (3 * 20 + 300)  # flipped ones are other pictures
    for seed in range(3):
        video = made.plan(20.0, seed)
        indices = np.random.default_rng(seed).integers(0, len(video), 40)
        np.testing.assert_array_equal(bank.at(video, indices), ColourScorer().encode_frames(video.read(indices)))
    assert scorer.encoded == 2 * (3 * 20 + 300)
    again = ColourScorer()
    FeatureBank(again, cache=cache, progress=False).fill(made)
    assert again.encoded == 0


class LeftScorer(ColourScorer):
    """The colour of the left half."""

    def encode_frames(self, frames: np.ndarray) -> np.ndarray:
        return super().encode_frames(frames[:, :, : SIZE[1] // 2])


def test_the_bank_tells_flipped_frames_apart(tmp_path: Path) -> None:
    halves = np.full((*SIZE, 3), COLOURS["red"], np.uint8)
    halves[:, SIZE[1] // 2 :] = COLOURS["blue"]
    reader = open_video(write(tmp_path / "halves.mp4", [(halves, 4)]), size=SIZE)
    video = VirtualVideo([Segment(reader, 0, 3), Segment(reader, 1, 3, True)])
    vectors = FeatureBank(LeftScorer(), progress=False).at(video, range(6))
    assert vectors.argmax(1).tolist() == [0, 0, 0, 2, 2, 2]


def test_windows_are_what_their_pixels_say(folder: Path) -> None:
    """A frame is inside where it has the colour of the query, as only events have it."""
    scorer, made = ColourScorer(), composer(folder)
    queries = {label: scorer.encode_query(label) for label in made.labels}
    bank = FeatureBank(scorer, progress=False)
    windows = ComposedWindows(made, bank, queries, seconds=20.0, fps=4.0, negatives=0.3, seed=5)
    batch = windows[np.arange(40)]
    assert batch["features"].shape == (40, 80, DIM) and batch["mask"].all()
    seen = (batch["features"] * batch["query"].unsqueeze(1)).sum(-1)
    torch.testing.assert_close(batch["inside"], seen, rtol=0, atol=0)
    empty = ~batch["inside"].any(1)
    assert 4 <= int(empty.sum()) <= 20  # of 40 a share of 0.3
    ends = batch["inside"][:, 1:] - batch["inside"][:, :-1]
    starts = torch.cat((batch["inside"][:, :1], ends.clamp_min(0)), 1)
    torch.testing.assert_close(batch["edges"][..., 0], starts / starts.sum(1, keepdim=True).clamp_min(1))
    lasts = torch.cat(((-ends).clamp_min(0), batch["inside"][:, -1:]), 1)
    torch.testing.assert_close(batch["edges"][..., 1], lasts / lasts.sum(1, keepdim=True).clamp_min(1))
    torch.testing.assert_close(batch["edges"].sum(1), (~empty).float().unsqueeze(1).expand(-1, 2))
    same = windows[np.array([7, 3])]
    torch.testing.assert_close(same["features"], batch["features"][[7, 3]], rtol=0, atol=0)


def test_windows_of_files(folder: Path) -> None:
    scorer = ColourScorer()
    store = FileStore(scorer, fps=5.0)
    videos = [
        FileVideo(
            [
                VideoClip(folder / f"{n}.mp4", (20 + 5 * n) / 10, (35 + 5 * n) / 10, "red"),
                VideoClip(folder / f"{n}.mp4", (90 - 5 * n) / 10, (110 - 5 * n) / 10, "blue"),
            ],
            12.0,
            store,
        )
        for n in range(3)
    ]
    queries = {label: scorer.encode_query(label) for label in ("red", "blue")}
    windows = FileWindows(videos, queries, seconds=4.0, negatives=0.25, seed=0)
    batch = windows[np.arange(60)]
    seen = (batch["features"] * batch["query"].unsqueeze(1)).sum(-1)
    torch.testing.assert_close(batch["inside"], seen, rtol=0, atol=0)
    assert batch["mask"].sum(1).tolist() == [20] * 60 and 0.1 < batch["inside"].mean() < 0.5
    assert not batch["inside"].any(1).all()  # some are beside the span
    whole = FileWindows(videos, queries, seconds=100.0, negatives=0.0, seed=0)[np.arange(4)]
    assert whole["mask"].sum(1).tolist() == [60] * 4 and whole["inside"].any(1).all()


def test_windows_are_near_their_span_but_for_a_share() -> None:
    """In an hour with a span of four seconds: without negatives it is in all windows of ten, else in few."""
    times = np.arange(3600.0)
    seen = Seen(times, np.zeros((3600, DIM), np.float32))
    video = SimpleNamespace(name="a", duration=3600.0, queries=[("red", [(1000.0, 1004.0)])], seen=lambda: seen)
    for negatives, least, most in ((0.0, 60, 60), (0.5, 15, 45), (1.0, 0, 5)):
        windows = FileWindows([video], {}, seconds=10.0, negatives=negatives, seed=0)  # type: ignore[list-item]
        drawn = [windows._draw(number) for number in range(60)]
        assert least <= sum(bool(window.spans) for window in drawn) <= most
        for window in drawn:
            assert len(window.times) == 10 and all(0 <= start < end <= 10 for start, end in window.spans)


def test_batches_of_windows_of_different_lengths() -> None:
    features = np.ones((3, DIM), np.float32)
    queries = {"red": np.zeros(DIM, np.float32)}
    batch = collate(
        [
            Window(np.array([0.0, 0.5, 1.0]), features, "red", [(0.5, 1.0), (1.0, 9.0)]),
            Window(np.array([0.0]), features[:1], "red", []),
            Window(np.array([0.0, 2.0]), features[:2], "red", [(0.3, 0.7)]),  # between two frames
        ],
        queries,
    )
    assert batch["mask"].tolist() == [[True] * 3, [True, False, False], [True, True, False]]
    assert batch["inside"].tolist() == [[0, 1, 1], [0, 0, 0], [0, 0, 0]]
    assert batch["edges"][0].tolist() == [[0, 0], [0.5, 0.5], [0.5, 0.5]] and not batch["edges"][1:].any()
    assert not batch["features"][1, 1:].any()


# the command ----------------------------------------------------------------------------------------------------------


def run(command: str, tmp_path: Path, *overrides: str) -> dict[str, Any]:
    """As the command line does, in this process."""
    GlobalHydra.instance().clear()
    small = ["model.dim=32", "model.depth=1", "data.batch_size=8", "data.steps=20", "trainer.max_epochs=2"]
    small += ["callbacks.progress=none", "trainer.accelerator=cpu", "data.fps=4", f"data.cache_dir={tmp_path}/cache"]
    small += ["optimizer.lr=1e-2", "mixer=gla", "logger.tensorboard=false", f"paths.runs={tmp_path}"]
    with initialize_config_module("seqzoo.conf", version_base="1.3"):
        cfg: Any = OmegaConf.to_container(compose("config", overrides=[*small, *overrides]), resolve=True)
    run_dir = tmp_path / command
    found = execute(command, {key: value for key, value in cfg.items() if key != "hydra"}, run_dir)
    return {**found, "run_dir": run_dir}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_composed_videos_from_the_command(folder: Path, tmp_path: Path, colours: ColourScorer) -> None:
    """The task is easy: the vector of a frame is that of its colour's name. What is found by training is found again by
    the checkpoint, and in a file."""
    composed = ["experiment=video/find", "data.clips=folder", f"data.path={folder / 'events'}", "data.window=20"]
    composed += ["data.labels=null"]
    composed += [f"data.footage={folder / 'footage'}", "data.val_minutes=0.5", "data.test_minutes=1", "data.min_gap=1"]
    composed += ["data.split_ratio=[0.34,0.33,0.33]", "data.event_seconds=[2,4]", "data.val_videos=2"]
    composed += ["data.test_videos=2", "task.window_overlap=4", "data.piece_seconds=[1,3]"]
    found = run("fit", tmp_path, *composed)
    assert found["test/miou"] > 0.5 > found["val/loss"]
    table = rows_of(found["run_dir"] / "test.csv")
    assert [row["method"] for row in table][1:] == ["cosine of the scorer", "whole video", "a span anywhere"]
    assert float(table[0]["miou"]) == pytest.approx(found["test/miou"], abs=1e-4)
    assert float(table[0]["miou"]) > 3 * float(table[2]["miou"])
    record = json.loads((found["run_dir"] / "scores.json").read_text())
    assert record["test"]["miou"] == pytest.approx(found["test/miou"])
    assert (found["run_dir"] / "timeline.png").stat().st_size > 5000
    checkpoint = found["run_dir"] / "checkpoints" / "best.ckpt"
    again = run("test", tmp_path, *composed, f"ckpt_path={checkpoint}")
    assert again["test/miou"] == pytest.approx(found["test/miou"], abs=1e-6)
    asked = run("predict", tmp_path, *composed, f"ckpt_path={checkpoint}", f"data.path={folder / '0.mp4'}", "query=red")
    (row,) = rows_of(asked["run_dir"] / "spans.csv")
    assert row["query"] == "red" and float(row["start"]) == pytest.approx(2.0, abs=0.3)
    assert float(row["end"]) == pytest.approx(3.5, abs=0.3) and (asked["run_dir"] / "0.png").is_file()
    colours.key = "other weights"
    for command in ("test", "predict"):
        with pytest.raises(UserError, match=r"trained (with data.scorer=concepts|on vectors of the scorer concepts)"):
            run(command, tmp_path, *composed, f"ckpt_path={checkpoint}", "query=red")


def test_a_table_of_spans_from_the_command(folder: Path, tmp_path: Path, colours: ColourScorer) -> None:
    spans = ["experiment=video/spans", "model=video_grounder_tiny", f"data.path={folder / 'spans.csv'}"]
    found = run("fit", tmp_path, *spans, "data.window=8", "task.window_overlap=2", "task.rotate=0.5")
    assert found["test/miou"] > 0.5
    queries = {row["query"]: row for row in rows_of(found["run_dir"] / "queries.csv")}
    assert set(queries) == {"red", "blue"} and queries["red"]["events"] == "1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "table"}, "data.source='table' is not a choice"),
        ({"clips": "folder"}, r"needs data.path, a folder of labels with their videos, and data.footage"),
        ({"source": "spans"}, r"data.path is missing: a table"),
        ({"fps": 0}, "data.fps=0 must be a number above 0"),
        ({"negatives": 1.0}, "data.negatives=1.0 must be from 0"),
        ({"steps": 0}, "data.steps=0"),
        ({"format": "charades"}, "data.format='charades'.*Did you mean charades_sta"),
    ],
)
def test_data_that_make_no_sense(colours: ColourScorer, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        VideoGroundingData(**options).setup()


def test_tables_with_bad_videos(folder: Path, tmp_path: Path, colours: ColourScorer) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes((folder / "0.mp4").read_bytes()[:300])
    rows = ["path,start,end,text,split"]
    rows += [f"{folder / '0.mp4'},2,3.5,red,{split}" for split in ("train", "val", "test")]
    table = tmp_path / "spans.csv"

    def setup(extra: list[str], **options: Any) -> VideoGroundingData:
        table.write_text("\n".join([*rows, *extra]) + "\n")
        data = VideoGroundingData("spans", table, window=4.0, **options)
        data.setup()
        return data

    assert setup([]).notes[0] == "train: 1 spans in 1 videos of 0.2 minutes"
    with pytest.raises(UserError, match=r"1 of 2 videos were skipped: .*more than 5%; the first is .*broken.mp4"):
        setup([f"{broken},0,1,red,train"])
    with pytest.raises(UserError, match=r"spans.csv, line 5: .*broken.mp4"):
        setup([f"{broken},0,1,red,test"])
    late = [f"{folder / '1.mp4'},11,12.4,red,train"]
    with pytest.raises(UserError, match=r"spans.csv, line 5: the span from 11 to 12.4 seconds ends after"):
        setup(late)
    assert setup(late, end_tolerance=0.5).sets["train"][1].queries == [("red", [(11.0, 12.0)])]


def test_predict_says_what_is_wrong(folder: Path, tmp_path: Path, colours: ColourScorer) -> None:
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))

    def predict(path: Any, query: Any) -> dict[str, Any]:
        cfg = {"data": {"path": path, "cache_gb": 0}, "query": query}
        return predict_module.predict(trainer, module(), cfg, tmp_path)

    for path, query, message in (
        (folder / "0.mp4", " ", "the query is empty"),
        (folder / "0.mp4", None, "query is missing"),
        (folder / "0.mp4", ["red", ""], "query 2 of 2 is empty"),
        (None, "red", "data.path is missing"),
        (folder / "7.mp4", "red", r"no such file or folder: .*7.mp4. Did you mean"),
    ):
        with pytest.raises(UserError, match=message):
            predict(path, query)
    text = tmp_path / "text.mp4"
    text.write_text("this is not a video")
    with pytest.raises(UserError, match=r"text.mp4"):
        predict(text, "red")
    found = predict(folder / "0.mp4", ["red", "blue"])
    assert found["videos"] == 1 and found["seconds"] == pytest.approx(12.0)


def test_a_virtual_video_of_hours_is_looked_at_in_windows(folder: Path) -> None:
    """Every frame has a value, and as few are encoded as there are pictures."""
    reader = open_video(folder / "0.mp4", size=SIZE)
    video = VirtualVideo([Segment(reader, 0, len(reader))] * 300)  # an hour
    scorer = ColourScorer()
    composed = ComposedVideo(video, FeatureBank(scorer, progress=False), fps=2.0)
    seen = composed.seen()
    assert scorer.encoded <= 120 and seen.features.shape == (7200, DIM)
    found = module().scores(seen, scorer.encode_query("red"))
    assert np.isfinite(found.probabilities).all() and len(found.probabilities) == 7200
