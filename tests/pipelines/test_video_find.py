"""Search in videos: the spans and frames of colours that are there, files and numbers, and what bad input says."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.video.faults import VideoError
from seqzoo.pipelines.video.reader import open_video
from seqzoo.pipelines.video.search import predict as module
from seqzoo.pipelines.video.search.data import SearchData
from seqzoo.pipelines.video.search.finding import SPANS, check_spans, decode_spans, find
from seqzoo.pipelines.video.search.task import NEEDS_CHECKPOINT, Data, predict

av = pytest.importorskip("av", reason="av (seqzoo[video]) is not installed")
COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "grey": (120, 120, 120)}


class Hues:
    """Scores how much of a frame is of the colour that the query names."""

    key, size, dim = "hues", (16, 24), 3

    def encode_frames(self, frames: np.ndarray) -> np.ndarray:
        mean = frames.reshape(len(frames), -1, 3).mean(1)
        vectors = mean - mean.min(1, keepdims=True) + 1
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    def encode_query(self, query: str | Path) -> np.ndarray:
        if query not in COLOURS:
            raise UserError(f"{query!r} is no colour")
        vector = np.array(COLOURS[str(query)], dtype=np.float32) - 19
        return vector / np.linalg.norm(vector)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No pictures, which take longer than the search; the names that they would have."""
    names: list[str] = []
    monkeypatch.setattr(module, "plot_search", lambda *given, **options: names.append(given[5].name))
    monkeypatch.setattr(module, "plot_sheet", lambda *given, **options: names.append(given[3].name))
    return names


@pytest.fixture(autouse=True)
def hues(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SEQZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_scorer", lambda task, data, cfg: Hues())


def write_video(path: Path, colours: list[tuple[str, int]], rate: int = 10) -> Path:
    """A video of colours, each for so many frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for colour, frames in colours:
            picture = np.broadcast_to(np.array(COLOURS[colour], dtype=np.uint8), (32, 48, 3))
            for _ in range(frames):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                for packet in stream.encode(frame):
                    container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def config(path: Path, query: Any, **task: Any) -> dict[str, Any]:
    options = {"scorer": "concepts", "fps": 5.0, "sampler": "tass", "budget": 4, "spans": dict(SPANS)}
    return {
        "task": {"name": "video_search", **options, **task},
        "data": {"path": str(path)},
        "query": query,
        "callbacks": {"progress": "none"},
    }


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


# a video --------------------------------------------------------------------------------------------------------------


def test_what_is_seen_when(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Red from 4 to 6 seconds, blue from 10 to 11 and 15 to 17 of twenty; a look every 0.2 seconds."""
    video = write_video(
        tmp_path / "colours.mp4",
        [("grey", 40), ("red", 20), ("grey", 40), ("blue", 10), ("grey", 40), ("blue", 20), ("grey", 30)],
    )
    run = tmp_path / "run"
    metrics = predict(None, None, config(video, ["red", "blue", "green"], sampler="top_k"), run)
    spans = rows_of(run / "spans.csv")
    found = {
        name: [(float(r["start"]), float(r["end"])) for r in spans if r["query"] == name] for name in ("red", "blue")
    }
    assert found["red"] == [pytest.approx((3.9, 5.9), abs=1e-3)]  # half a step before the first frame that has it
    assert sorted(found["blue"]) == [pytest.approx((9.9, 10.9), abs=1e-3), pytest.approx((14.9, 16.9), abs=1e-3)]
    assert not [row for row in spans if row["query"] == "green"]
    frames = rows_of(run / "frames.csv")
    for name, times in (("red", (4, 6)), ("blue", (10, 17))):
        chosen = [float(row["time"]) for row in frames if row["query"] == name]
        assert len(chosen) == 4 and chosen == sorted(chosen) and times[0] <= chosen[0] and chosen[-1] < times[1]
    assert int(frames[0]["frame"]) == round(float(frames[0]["time"]) * 10)
    assert metrics["spans"] == 3 and metrics["frames_read"] == 100 and metrics["seconds"] == pytest.approx(20)
    out = capsys.readouterr().out
    assert "nothing stands out for 'green' in colours.mp4" in out and "100 frames scored, 100 of them read now" in out
    pictures = {path.name for path in run.glob("*.png")}
    assert pictures in (set(), {"colours.png", *(f"colours-{name}.png" for name in ("red", "blue", "green"))})

    # another query decodes nothing: all vectors are known
    again = predict(None, None, config(video, "blue"), tmp_path / "again")
    assert again["frames_read"] == 0 and again["frames_scored"] == 100
    same = [{**row} for row in rows_of(tmp_path / "again" / "spans.csv")]
    assert same == [row for row in spans if row["query"] == "blue"]


def test_time_search_looks_at_few_frames_and_says_which(tmp_path: Path, undrawn: list[str]):
    video = write_video(tmp_path / "long.mp4", [("grey", 500), ("red", 30), ("grey", 470)])
    options = {"sampler": "time_search", "sampler_options": {"max_scored": 0.2}}
    metrics = predict(None, None, config(video, "red", **options), tmp_path / "run")
    assert metrics["frames_read"] == metrics["frames_scored"] <= 100 < 500
    chosen = [float(row["time"]) for row in rows_of(tmp_path / "run" / "frames.csv")]
    assert chosen and all(50 <= time < 53 for time in chosen)
    ((span),) = rows_of(tmp_path / "run" / "spans.csv")
    assert float(span["start"]) == pytest.approx(50, abs=0.7) and float(span["end"]) == pytest.approx(53, abs=0.7)
    (trace,) = json.loads((tmp_path / "run" / "trace.json").read_text())
    assert trace["query"] == "red" and trace["frames"] <= 100 and trace["looks"][0]["start"] == 0
    looked = {time for look in trace["looks"] for time in look["looked_at"]}
    assert max(looked) <= 100 and len(looked) <= 100
    # what is in the cache is not looked at by a search that would not look there
    predict(None, None, config(video, "red"), tmp_path / "whole")
    again = predict(None, None, config(video, "red", **options), tmp_path / "again")
    assert again["frames_read"] == 0 and again["frames_scored"] == metrics["frames_scored"]
    assert rows_of(tmp_path / "again" / "frames.csv") == rows_of(tmp_path / "run" / "frames.csv")


def test_one_frame_and_a_budget_above_the_frames(tmp_path: Path):
    video = write_video(tmp_path / "one.mp4", [("red", 1)])
    metrics = predict(None, None, config(video, "red", budget=64), tmp_path / "run")
    assert metrics["frames_chosen"] == 1 and rows_of(tmp_path / "run" / "frames.csv")[0]["frame"] == "0"
    assert len(list((tmp_path / "run").glob("*.png"))) in (0, 2)


def test_ten_hours_are_looked_at_less_often(tmp_path: Path, undrawn: list[str], capsys: pytest.CaptureFixture[str]):
    from seqzoo.pipelines.video.virtual import Segment, VirtualVideo

    grey = open_video(write_video(tmp_path / "grey.mp4", [("grey", 60)]), size=(16, 24))
    red = open_video(write_video(tmp_path / "red.mp4", [("red", 60)]), size=(16, 24))
    minutes = [Segment(red if number in (3000, 3001, 3002) else grey, 0, 60) for number in range(6000)]
    video = VirtualVideo(minutes)
    assert video.duration == pytest.approx(36_000)
    search = find(video, Hues(), "red", fps=2.0, max_frames=6000, budget=8, progress=False)
    assert len(search.times) <= 6000 and search.fps == pytest.approx(1 / 6) and search.encoded <= 120
    (found,) = search.found
    assert [span.start for span in found.spans] == [pytest.approx(18_000, abs=6)]
    assert found.spans[0].end == pytest.approx(18_018, abs=6)

    with open_video(tmp_path / "grey.mp4") as reader:
        assert reader.duration == pytest.approx(6)
    predict(None, None, config(tmp_path / "grey.mp4", "red", max_frames=6), tmp_path / "run")
    assert "looked at 1 frames a second, not 5, for task.max_frames=6" in capsys.readouterr().out


# several --------------------------------------------------------------------------------------------------------------


def test_a_folder_leaves_out_what_cannot_be_read(
    tmp_path: Path, undrawn: list[str], capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "videos"
    first = write_video(folder / "a.mp4", [("grey", 20), ("red", 10)])
    content = first.read_bytes()
    for number in range(1, 20):
        (folder / f"b{number:02d}.mp4").write_bytes(content)
    write_video(folder / "inner" / "a.mp4", [("red", 5), ("grey", 20)])
    (folder / "empty.mp4").write_bytes(b"")
    metrics = predict(None, None, config(folder, "red"), tmp_path / "run")
    assert metrics["videos"] == 21 and metrics["skipped"] == 1
    assert metrics["frames_read"] == 15 + 13  # twenty of them are one video
    said = capsys.readouterr()
    assert "empty.mp4" in said.err and "1 of 22 videos were skipped: 1 empty" in said.out
    assert {row["video"] for row in rows_of(tmp_path / "run" / "spans.csv")} == {
        str(path) for path in folder.rglob("*.mp4") if path.name != "empty.mp4"
    }
    assert {"a-1.png", "a-2.png", "a-2-red.png", "b01.png", "b01-red.png"} <= set(undrawn) and len(undrawn) == 42
    (folder / "text.mp4").write_text("a text\n")
    with pytest.raises(UserError, match=r"2 of 23 videos were skipped: .*more than 5%"):
        predict(None, None, config(folder, "red"), tmp_path / "more")


def test_a_table_has_its_own_queries(tmp_path: Path, undrawn: list[str]):
    write_video(tmp_path / "videos" / "a.mp4", [("grey", 20), ("red", 10)])
    write_video(tmp_path / "videos" / "b.mp4", [("blue", 10), ("grey", 20)])
    table = tmp_path / "table.csv"
    table.write_text("path,text\nvideos/a.mp4,red\nvideos/b.mp4,blue\nvideos/a.mp4,green\nvideos/a.mp4,red\n")
    a, b = tmp_path / "videos" / "a.mp4", tmp_path / "videos" / "b.mp4"
    assert SearchData(table).jobs(None) == {a: ["red", "green"], b: ["blue"]}
    assert SearchData(table).jobs("blue") == {a: ["blue"], b: ["blue"]}
    predict(None, None, config(table, None), tmp_path / "run")
    assert [(row["video"], row["query"]) for row in rows_of(tmp_path / "run" / "spans.csv")] == [
        (str(a), "red"),
        (str(b), "blue"),
    ]
    table.write_text("path,text\nvideos/a.mp4,\n")
    with pytest.raises(UserError, match=r"table.csv, line 2 has no text to look for"):
        SearchData(table).jobs(None)
    table.write_text("name\nvideos/a.mp4\n")
    with pytest.raises(UserError, match=r"line 2 has no path of a video; columns: path, file"):
        SearchData(table).jobs("red")


# what is wrong --------------------------------------------------------------------------------------------------------


def test_wrong_input_is_said_before_a_frame_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    video = write_video(tmp_path / "a.mp4", [("red", 5)])
    monkeypatch.setattr(module, "find", None)
    run = tmp_path / "run"
    wrong: list[tuple[dict[str, Any], str]] = [
        (config(video, None), "query is missing"),
        (config(video, ""), "the query is empty, ''"),
        (config(video, ["red", "  "]), "query 2 of 2 is empty"),
        (config(video, []), "query is an empty list"),
        (config(video, "purple"), "'purple' is no colour"),
        (config(video, "red", sampler="tas"), "unknown sampler 'tas'. Did you mean tass"),
        (config(video, "red", sampler_options={"distance": 1}), "the sampler 'tass' has no option 'distance'"),
        (config(video, "red", sampler_options="x"), "must be a section of options"),
        (config(video, "red", budget=0), "task.budget=0 must be a whole number of at least 1"),
        (config(video, "red", spans={"hihg": 0.5}), "unknown option of spans 'hihg'. Did you mean high"),
        (config(tmp_path / "b.mp4", "red"), "no such file or folder: .*b.mp4. Did you mean a.mp4"),
        ({**config(video, "red"), "output": "x.txt"}, "give the name of a .csv file"),
    ]
    for cfg, message in wrong:
        with pytest.raises(UserError, match=message):
            predict(None, None, cfg, run)
    assert not run.exists()


def test_scorers_and_their_options_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()  # the command's own choice of a scorer
    video = write_video(tmp_path / "a.mp4", [("red", 5)])
    monkeypatch.setenv("SEQZOO_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"unknown scorer 'clap'. Did you mean clip"):
        predict(None, None, config(video, "red", scorer="clap"), tmp_path / "run")
    with pytest.raises(UserError, match=r"scorer 'example' has no option 'encodr'. Did you mean encoder"):
        options = {"scorer": "example", "scorer_options": {"encodr": "x"}}
        predict(None, None, config(video, "red", **options), tmp_path / "run")


def test_a_single_file_that_is_no_video_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "text.mp4").write_text("a text\n")
    monkeypatch.setattr(module, "_scorer", None)  # before any weights are loaded
    with pytest.raises(VideoError, match=r"text.mp4 is a text file"):
        predict(None, None, config(tmp_path / "text.mp4", "red"), tmp_path / "run")


def test_a_single_file_that_breaks_off_is_its_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*given: Any, **options: Any) -> None:
        raise VideoError("frame 3 cannot be decoded")

    monkeypatch.setattr(module, "find", broken)
    with pytest.raises(VideoError, match=r"^frame 3 cannot be decoded$"):
        predict(None, None, config(write_video(tmp_path / "a.mp4", [("red", 5)]), "red"), tmp_path / "run")


def test_an_example_is_named_by_its_file(tmp_path: Path):
    (tmp_path / "clip.mp4").write_bytes(b"x")
    assert module._named(f"{tmp_path}/clip.mp4#t=3,5") == "clip.mp4#t=3,5"
    assert module._named("a red/blue car") == "a red/blue car"
    used: set[str] = set()
    names = ["a red/blue car", "a red blue car", "A red blue car!", "???"]
    assert [module._slug(name, used) for name in names] == [
        "a_red_blue_car",
        "a_red_blue_car_2",
        "A_red_blue_car_3",
        "query",
    ]


# spans ----------------------------------------------------------------------------------------------------------------


def test_the_best_span_is_first_and_what_was_not_looked_at_is_left_out():
    times = np.arange(10.0)
    scores = np.array([0.1, 0.8, 0.1, np.nan, 0.1, 0.9, 0.9, np.nan, 0.1, 0.1])
    spans = decode_spans(times, scores, 10.0, {**SPANS, "max_gap": 0.0})
    assert spans == [pytest.approx((4.5, 7.0, 0.9)), pytest.approx((0.5, 1.5, 0.8))]
    # the first and the last frame stand for all up to the ends of the video
    edges = decode_spans(times + 0.5, np.array([0.9] + [0.1] * 8 + [0.8]), 9.7, SPANS)
    assert edges == [pytest.approx((0.0, 1.0, 0.9)), pytest.approx((9.0, 9.7, 0.8))]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"high": "x"}, "spans.high='x' must be a number"),
        ({"max_gap": -1}, "spans.max_gap=-1 must be at least 0"),
        ({"low": 0.6}, "spans.low=0.6 and spans.high=0.5 must be in order"),
        ({"high": None}, "spans.high=None must be a number"),
    ],
)
def test_wrong_options_of_spans(options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        check_spans(options)
    assert check_spans({"threshold": None, "floor": 0.1})["floor"] == 0.1


# the config -----------------------------------------------------------------------------------------------------------


def test_the_experiment_is_what_the_task_reads(tmp_path: Path):
    pytest.importorskip("hydra")
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    from seqzoo.pipelines.validate import validate_names

    GlobalHydra.instance().clear()
    with initialize_config_module("seqzoo.conf", version_base="1.3"):
        given = ["experiment=video/search", "data.path=my.mp4", "query='a taxi cab'"]
        cfg = compose("config", overrides=given)
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    validate_names(plain)
    assert not NEEDS_CHECKPOINT and plain["model"] is None and plain["query"] == "a taxi cab"
    assert Data(**plain["data"]).path == Path("my.mp4")
    assert set(plain["task"]["spans"]) == set(SPANS)
    assert plain["task"]["spans"] == SPANS


def test_the_command_finds(tmp_path: Path, undrawn: list[str]):
    """The whole way through the command's own entry."""
    from seqzoo.pipelines.run import execute

    video = write_video(tmp_path / "a.mp4", [("grey", 40), ("red", 20)])
    cfg = {**config(video, "red"), "seed": 0, "trainer": {}, "optimizer": None, "scheduler": None, "model": None}
    metrics = execute("predict", cfg, tmp_path / "run")
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert written["spans"] == metrics["spans"] == 1
    with pytest.raises(UserError, match="fit: the task 'video_search' trains nothing"):
        execute("fit", cfg, tmp_path / "fit")
