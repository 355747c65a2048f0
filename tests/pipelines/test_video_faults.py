"""Video files that cannot be used, or in part: one clear message with the file and the cause, never a hang."""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

av = pytest.importorskip("av", reason="needs seqzoo[video]")

from video_files import numbers_in, write_sound, write_video  # noqa: E402

from seqzoo.pipelines.errors import UserError  # noqa: E402
from seqzoo.pipelines.video import faults  # noqa: E402
from seqzoo.pipelines.video.backends import av_backend  # noqa: E402
from seqzoo.pipelines.video.faults import CAUSES, VideoError, say_once  # noqa: E402
from seqzoo.pipelines.video.reader import open_video  # noqa: E402


def error_of(path: Path) -> VideoError:
    with pytest.raises(VideoError) as caught:
        open_video(path).read([0])
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and caught.value.cause in CAUSES
    return caught.value


def boxes(data: bytes) -> dict[bytes, int]:
    """Where the boxes of an MP4 file begin."""
    found, place = {}, 0
    while place < len(data):
        found[data[place + 4 : place + 8]] = place
        place += int.from_bytes(data[place : place + 4], "big")
    return found


def test_not_a_video(tmp_path: Path) -> None:
    for name, content, cause, match in (
        ("empty.mp4", b"", "empty", "0 bytes"),
        ("text.mp4", b"just a text\nof two lines", "not video", "is a text file, not a video: it begins with 'just a"),
        ("list.m3u8", b"#EXTM3U\n/etc/passwd\n", "not video", "text file"),
        ("zip.mp4", b"PK\x03\x04" + bytes(100), "not video", "ZIP archive"),
        ("pointer.mp4", b"version https://git-lfs.github.com/spec/v1\n", "not video", "git lfs pull"),
        ("zeros.mp4", bytes(70000), "not video", "zero bytes and nothing else"),
        ("noise.mp4", random.Random(0).randbytes(5000), "not video", "is not a video that can be read"),
        ("noise.mkv", b"\x1aE\xdf\xa3" + random.Random(1).randbytes(5000), "not video", "is not a video"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        error = error_of(path)
        assert error.cause == cause and match in str(error), error


def test_missing(tmp_path: Path) -> None:
    write_video(tmp_path / "holiday.mp4", 2)
    with pytest.raises(VideoError, match="no such file"):  # before anything is asked
        open_video(tmp_path / "a.mp4")
    (tmp_path / "holiday.txt").write_text("")
    assert str(error_of(tmp_path / "holidy.mp4")).endswith("holidy.mp4. Did you mean holiday.mp4?")
    assert "there is no folder" in str(error_of(tmp_path / "none" / "a.mp4"))
    assert "is a folder, not a video file" in str(error_of(tmp_path))
    pipe = tmp_path / "pipe.mp4"
    os.mkfifo(pipe)  # to open it would wait for ever
    assert "not a regular file" in str(error_of(pipe))
    reader = open_video(tmp_path / "holiday.mp4")
    (tmp_path / "holiday.mp4").unlink()
    with pytest.raises(VideoError, match="no such file") as caught:
        reader.read([0])
    assert caught.value.cause == "missing"


def test_no_video_stream(tmp_path: Path) -> None:
    error = error_of(write_sound(tmp_path / "sound.mp4"))
    assert error.cause == "no video" and "has no video stream (only audio)" in str(error)


def test_a_cover_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "song.mp3"
    picture = np.zeros((16, 16, 3), np.uint8)
    with av.open(str(path), "w") as file:
        sound, cover = file.add_stream("mp3", rate=16000), file.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 16, 16, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        file.mux(cover.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        for begin in range(0, 16000, 1152):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.int16), format="s16p", layout="mono")
            frame.sample_rate, frame.pts = 16000, begin
            file.mux(sound.encode(frame))
        file.mux(sound.encode())
    assert error_of(path).cause == "no video"


def test_index_cut_off(tmp_path: Path) -> None:
    """An MP4 file that was not written to its end: its index is not there, or not whole."""
    data = write_video(tmp_path / "a.mp4", 40).read_bytes()
    at = boxes(data)
    path = tmp_path / "cut.mp4"
    for length, match in (
        (at[b"moov"], "whose index (moov) is not there (it was never written)"),
        (at[b"mdat"] + 500, "is not there (its boxes say"),
        (at[b"moov"] + 100, "its index (moov) is"),
    ):
        path.write_bytes(data[:length])
        error = error_of(path)
        assert error.cause == "cut off" and match in str(error), error


def test_samples_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The index in front, not all of the frames behind it: those that are there, said once."""
    data = write_video(tmp_path / "a.mp4", 40, container={"movflags": "faststart"}).read_bytes()
    begin = boxes(data)[b"mdat"]
    path = tmp_path / "half.mp4"
    path.write_bytes(data[: begin + (len(data) - begin) * 2 // 3])
    reader = open_video(path)
    number = len(reader)
    found = numbers_in(reader.read(range(number)))
    assert 13 <= number < 40 and found[:-3] == list(range(number - 3))
    np.testing.assert_allclose(reader.times, np.array(found) / 25, rtol=0, atol=1e-3)
    assert reader.index_at([1.5]).tolist() == [number - 1]
    with pytest.raises(UserError, match=f"frames 0 to {number - 1}, not 39"):
        reader.read([39])
    assert len(open_video(path)) == number
    said = [line for line in capsys.readouterr().err.splitlines() if "can be decoded" in line]
    assert len(said) == 1 and f"{number} frames" in said[0] and "its header says 40 frames and 1.6 seconds" in said[0]
    path.write_bytes(data[: begin + 100])
    assert error_of(path).cause == "cut off"


def test_matroska_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = write_video(tmp_path / "a.mkv", 200).read_bytes()
    path = tmp_path / "half.mkv"
    path.write_bytes(data[: len(data) // 2])
    reader = open_video(path)
    found = numbers_in(reader.read(range(len(reader))))
    assert 60 < len(reader) < 140 and found[:-3] == list(range(len(reader) - 3))
    # those between that follow their references in the file are missing
    np.testing.assert_allclose(reader.times, np.array(found) / 25, rtol=0, atol=1e-3)
    assert "its header says 8 seconds" in capsys.readouterr().err


@pytest.mark.parametrize("key_every", [8, 1000])
def test_end_of_zeros(key_every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that stopped: the index and the first frames are there, then zeros. The last frame that comes out of the
    decoder is found by halving over the key frames, without decoding all that is before."""
    options = {"x264-params": f"keyint={key_every}:min-keyint={key_every}:scenecut=0"}
    data = write_video(tmp_path / "a.mp4", 120, options=options, container={"movflags": "faststart"}).read_bytes()
    begin = (len(data) + boxes(data)[b"mdat"]) // 2
    path = tmp_path / "zeros.mp4"
    path.write_bytes(data[:begin] + bytes(len(data) - begin))
    reader, decoded = open_video(path), []
    with monkeypatch.context() as patch:
        real = av_backend.AvDecoder._next
        patch.setattr(av_backend.AvDecoder, "_next", lambda decoder: decoded.append(real(decoder)) or decoded[-1])
        assert 30 < len(reader) < 100
    assert len(decoded) < (40 if key_every == 8 else 200)
    found = numbers_in(reader.read(range(len(reader))))
    whole = len(found) - 16  # the decoder conceals what is damaged in the last frames
    assert found[:whole] == list(range(whole))
    assert reader.backend == "av"


@pytest.mark.parametrize("codec", ["libx264", "libvpx-vp9"])  # of VP9 zeros are taken for key frames
def test_hole_in_the_middle(codec: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Frames that cannot be decoded are the one before them; those after the next key frame are right."""
    options = {"x264-params": "keyint=10:min-keyint=10:scenecut=0"}
    if codec == "libvpx-vp9":
        options = {"cpu-used": "8", "deadline": "realtime", "lag-in-frames": "0"}
    path = write_video(tmp_path / "a.mp4", 60, codec=codec, key_every=10, between=0, options=options)
    data = bytearray(path.read_bytes())
    with av.open(str(tmp_path / "a.mp4")) as file:
        places = [(packet.pos, packet.size) for packet in file.demux(video=0) if packet.size]
    for place, size in places[20:44]:
        data[place : place + size] = bytes(size)
    path = tmp_path / "hole.mp4"
    path.write_bytes(data)
    reader = open_video(path, backend="av")
    found = numbers_in(reader.read(range(60)))
    assert found[:20] == list(range(20)) and found[20:44] == [19] * 24 and found[50:] == list(range(50, 60))
    for number in (22, 38, 31, 41):  # two key frames are lost
        assert numbers_in(reader.read([number])) == numbers_in(open_video(path).read([number])) == [19]
    assert numbers_in(open_video(path).read([55, 21])) == [55, 19]
    assert capsys.readouterr().err.count("replaced with the one shown before") == 1


def test_stream_that_comes_up_later(tmp_path: Path) -> None:
    """In a transport stream, of which nothing was there when it was opened: PyAV before 19 fails at its packet."""
    data = bytearray(write_video(tmp_path / "a.ts", 60, key_every=1, between=0).read_bytes())
    starts = [k for k in range(0, len(data), 188) if data[k + 1] & 0x40 and data[k + 1 : k + 3] == b"\x41\x00"]
    data[starts[-9] + 2] = 0x33  # the packets of one frame have a number of their own
    path = tmp_path / "late.ts"
    path.write_bytes(data)
    if int(av.__version__.split(".")[0]) < 19:
        with av.open(str(path)) as file, pytest.raises(IndexError):
            list(file.demux(video=0))
    reader = open_video(path)
    found = numbers_in(reader.read(range(len(reader))))
    assert found == [*range(51), *range(52, 60)]


def test_colour_space_that_is_none(tmp_path: Path) -> None:
    """A number that stands for nothing: BT.601, as where none is stated."""
    content = [
        write_video(tmp_path / f"{number}.ts", 10, codec="mpeg2video", color={"colorspace": number})
        for number in (3, 6)
    ]
    with av.open(str(content[0])) as file:
        frame = next(file.decode(video=0))
        assert frame.colorspace == 3
        with pytest.raises(av.FFmpegError):
            frame.reformat(format="rgb24")
    found, expected = (open_video(path, backend="av").read(range(10)) for path in content)
    np.testing.assert_array_equal(found, expected)


def test_packets_end_where_the_file_cannot_be_read_on() -> None:
    """And a last empty one makes the decoder give what it holds."""

    class Container:
        def demux(self, stream: object) -> Iterator[av.Packet]:
            yield av.Packet(5)
            raise av.error.InvalidDataError(1, "damaged")

    assert [packet.size for packet in av_backend._packets(av, Container(), None)] == [5, 0]


def test_hidden_frames() -> None:
    """VP8 frames that are decoded and not shown, by the bit of their first byte (RFC 6386, 9.1)."""
    shown_key, hidden_key, shown, hidden = (bytes([value, 2, 0]) for value in (0x10, 0x00, 0xF1, 0xE1))
    assert [av_backend._hidden(packet) for packet in (shown_key, hidden_key, shown, hidden)] == [
        False,
        True,
        False,
        True,
    ]


def test_header_lies(tmp_path: Path) -> None:
    """A header that says twice the frames and a length of hours: what can be decoded counts."""
    data = bytearray(write_video(tmp_path / "a.mkv", 40).read_bytes())
    place = data.index(b"\x44\x89\x88") + 3  # Duration, 8 bytes
    import struct

    data[place : place + 8] = struct.pack(">d", 4e7)
    path = tmp_path / "long.mkv"
    path.write_bytes(data)
    reader = open_video(path)
    assert len(reader) == 40 and reader.duration == pytest.approx(1.6, abs=2e-3)


def test_odd_names(tmp_path: Path) -> None:
    """Names that FFmpeg would take for a protocol, a pattern or an option."""
    content = write_video(tmp_path / "a.mp4", 3).read_bytes()
    for name in ("12:30 a.mp4", "%03d.mp4", "-y.mp4", "ä ö.mp4", "pipe:0"):
        (tmp_path / name).write_bytes(content)
        for backend in ("auto", "av"):
            assert numbers_in(open_video(tmp_path / name, backend=backend).read([2])) == [2]


def test_relative_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = write_video(tmp_path / "a.mp4", 3).read_bytes()
    monkeypatch.chdir(tmp_path)
    Path("file:12:30.mp4").write_bytes(content)
    assert numbers_in(open_video("file:12:30.mp4").read([2])) == [2]


def test_error_passes_through_a_worker() -> None:
    error = pickle.loads(pickle.dumps(VideoError("message", "cut off")))
    assert str(error) == "message" and error.cause == "cut off" and isinstance(error, UserError)
    assert str(VideoError("the message alone")) == "the message alone"


def test_say_once(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_said", set())
    monkeypatch.setattr(faults, "_kinds", [])
    for _ in range(2):
        say_once("a", "one")
    for number in range(9):
        say_once(f"file {number}", "two", kind="some")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "note: a: one" and len(lines) == 6
    assert lines[1] == "note: file 0: two" and lines[-1] == "note: file 4: two (no more such notes follow)"


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_changed_bytes(name: str, tmp_path: Path) -> None:
    """Bytes changed at random, by PyAV: frames or one error of ours."""
    data = write_video(tmp_path / name, 20).read_bytes()
    number = random.Random(0)
    for turn in range(15):
        changed = bytearray(data)
        for _ in range(number.choice([1, 4, 16, 64])):
            changed[number.randrange(len(data))] = number.randrange(256)
        path = tmp_path / f"{turn}{Path(name).suffix}"
        path.write_bytes(changed[: number.randrange(len(data)) if turn % 4 == 0 else None])
        try:
            reader = open_video(path, backend="av", size=(16, 16), timeout=30)
            frames = reader.read([0, len(reader) - 1, len(reader) // 2])
            assert frames.shape == (3, 16, 16, 3) and reader.times[0] == 0 and (np.diff(reader.times) > 0).all()
            assert np.isfinite(reader.duration) and reader.duration > 0
        except UserError as error:
            assert str(path) in str(error)
