"""Audio files: the samples are those of the file at any place and block size, and bad files say what is wrong."""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest

soundfile = pytest.importorskip("soundfile", reason="needs seqzoo[audio]")
soxr = pytest.importorskip("soxr", reason="needs seqzoo[audio]")

from seqzoo.pipelines.audio.faults import AudioError  # noqa: E402
from seqzoo.pipelines.audio.mp3 import mp3_length  # noqa: E402
from seqzoo.pipelines.audio.reader import AudioReader  # noqa: E402
from seqzoo.pipelines.errors import UserError  # noqa: E402

# Of full scale: rounding of float32 in the resampler's filters, at any ratio of rates.
RESAMPLED = 1e-5


def noise(seconds: float, rate: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Coloured noise (T, channels) whose loudness changes, so that no place is like another."""
    length = round(seconds * rate)
    samples = np.random.default_rng(seed).standard_normal((length, channels))
    return (0.1 * samples * (1.2 + np.sin(np.arange(length) / 777))[:, None]).astype(np.float32)


def write(path: Path, samples: np.ndarray, rate: int, **options: object) -> Path:
    """In small pieces: libsndfile's Vorbis encoder overruns its stack with large ones."""
    with soundfile.SoundFile(path, "w", samplerate=rate, channels=samples.shape[1], **options) as file:
        for begin in range(0, len(samples), 4096):
            file.write(samples[begin : begin + 4096])
    return path


def riff(rate: int, channels: int, data: bytes, *, size: int | None = None, kind: int = 1, bits: int = 16) -> bytes:
    """A WAV file, byte by byte. size: what its header says."""
    align = channels * bits // 8
    form = struct.pack("<HHIIHH", kind, channels, rate, rate * align & 0xFFFFFFFF, align, bits)
    said = len(data) if size is None else size
    return (
        b"RIFF"
        + struct.pack("<I", 36 + len(data))
        + b"WAVEfmt "
        + struct.pack("<I", 16)
        + form
        + b"data"
        + struct.pack("<I", said)
        + data
    )


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    """Whole, in blocks and at random places: the samples that libsndfile decodes from the start, bit by bit (MP3, whose
    decoder is not the same twice, to 1e-6)."""
    rate = 16000
    same = partial(np.testing.assert_allclose, rtol=0, atol=1e-6 if suffix == "mp3" else 0)
    path = write(tmp_path / f"a.{suffix}", noise(3.01, rate, 2), rate)
    whole, _ = soundfile.read(path, dtype="float32", always_2d=True)
    reader = AudioReader(path, channels="all")
    assert reader.info[:4] == (rate, len(whole), 2, len(whole) / rate)
    assert reader.info.format.startswith(suffix.upper())
    assert reader.frames == len(whole) and reader.rate == rate
    same(reader.read(), whole.T)
    for seconds in (0.0101, 1.0, 60.0):
        blocks = list(reader.blocks(seconds))
        assert {block.shape[1] for block in blocks[:-1]} <= {round(seconds * rate)}
        same(np.concatenate(blocks, axis=1), whole.T)
    for first, last in ((40000, 40100), (0, 1), (12345, 20000), (len(whole) - 3, len(whole)), (30000, 30001)):
        same(reader.read(first, last, unit="frames"), whole[first:last].T)
    same(reader.read(1.5, 1.75), whole[24000:28000].T)
    # two streams of one reader take turns
    pairs = list(zip(reader.blocks(0.5), reader.blocks(0.5, 1.0), strict=False))
    for number, (one, other) in enumerate(pairs):
        same(one, whole[number * 8000 : number * 8000 + 8000].T)
        same(other, whole[16000 + number * 8000 : 24000 + number * 8000].T)


def test_seek_in_vorbis(tmp_path: Path) -> None:
    """libsndfile's own seek lands beside the place in some of these; a read is exact at all of them."""
    path = write(tmp_path / "a.ogg", noise(20, 16000, seed=1), 16000)
    whole, _ = soundfile.read(path, dtype="float32")
    reader = AudioReader(path)
    for first in np.random.default_rng(0).integers(0, len(whole) - 50, 60):
        np.testing.assert_array_equal(
            reader.read(int(first), int(first) + 50, unit="frames"), whole[first : first + 50]
        )


@pytest.mark.parametrize(
    ("source", "target"),
    [(44100, 16000), (8000, 16000), (48000, 16000), (384000, 8000), (16000, 16001), (11025, 48000)],
)
def test_resampling(tmp_path: Path, source: int, target: int) -> None:
    """Blocks are bit by bit one run over the whole file by soxr; a read at any place is the same span."""
    samples = noise(2.3, source)
    path = write(tmp_path / "a.wav", samples, source, subtype="FLOAT")
    whole = soxr.resample(samples[:, 0], source, target, quality="HQ")
    reader = AudioReader(path, sample_rate=target)
    assert reader.frames == len(whole) == math.floor(len(samples) * target / source + 0.5)
    np.testing.assert_allclose(reader.read(), whole, rtol=0, atol=1e-6)
    for seconds in (0.013, 1.0):
        np.testing.assert_array_equal(np.concatenate(list(reader.blocks(seconds))), reader.read())
    for first, size in ((target, 100), (7, target), (2 * target - 3, 1), (len(whole) - 5, 5), (target + 1, target)):
        span = reader.read(first, first + size, unit="frames")
        np.testing.assert_allclose(span, whole[first : first + size], rtol=0, atol=RESAMPLED)
    late = np.concatenate(list(reader.blocks(0.1, 1.25, 2.0)))
    np.testing.assert_allclose(late, whole[round(1.25 * target) : 2 * target], rtol=0, atol=RESAMPLED)


def test_sine_survives_resampling(tmp_path: Path) -> None:
    """Frequency, phase and level of a tone, away from the ends; a tone above the new band is gone."""
    time = np.arange(44100 * 2)[:, None] / 44100
    path = write(tmp_path / "low.wav", 0.5 * np.sin(2 * np.pi * 440 * time), 44100, subtype="FLOAT")
    wanted = 0.5 * np.sin(2 * np.pi * 440 * np.arange(32000) / 16000)
    got = AudioReader(path, sample_rate=16000).read()
    np.testing.assert_allclose(got[1000:-1000], wanted[1000:-1000], rtol=0, atol=1e-5)
    path = write(tmp_path / "high.wav", 0.5 * np.sin(2 * np.pi * 10000 * time), 44100, subtype="FLOAT")
    assert np.abs(AudioReader(path, sample_rate=16000).read()[1000:-1000]).max() < 1e-5


def test_channels(tmp_path: Path) -> None:
    samples = noise(0.5, 8000, 4)
    path = write(tmp_path / "four.wav", samples, 8000, subtype="FLOAT")
    np.testing.assert_allclose(AudioReader(path).read(), samples.mean(axis=1), rtol=0, atol=1e-7)
    np.testing.assert_array_equal(AudioReader(path, channels=4).read(), samples.T)
    both = AudioReader(path, channels="all", sample_rate=16000).read()
    apart = [soxr.resample(samples[:, channel], 8000, 16000, quality="HQ") for channel in range(4)]
    np.testing.assert_allclose(both, np.stack(apart), rtol=0, atol=1e-6)
    with pytest.raises(AudioError, match=r"four\.wav has 4 channel\(s\), channels=2 asked for.*'mono' mixes") as error:
        AudioReader(path, channels=2).read()
    assert error.value.cause == "channels"


def test_opened_lazily_and_sent_to_workers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", noise(1, 8000), 8000)
    AudioReader(tmp_path / "later.wav")  # not there yet, and not asked for
    reader = AudioReader(path, sample_rate=16000)
    first = reader.read(0.25, 0.5)
    copy = pickle.loads(pickle.dumps(reader))
    assert copy._file is None and copy.info == reader.info
    np.testing.assert_array_equal(copy.read(0.25, 0.5), first)
    with reader:
        reader.read(0.0, 0.1)
    assert reader._file is None
    np.testing.assert_array_equal(reader.read(0.25, 0.5), first)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_opens_its_own(tmp_path: Path) -> None:
    """A handle that two processes share would share its place: the child's reading would move the parent's."""
    samples = noise(30, 8000)
    reader = AudioReader(write(tmp_path / "a.wav", samples, 8000, subtype="FLOAT"))
    blocks = reader.blocks(1.0)
    got = [next(blocks)]
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(reader.read(20.0, 29.0), samples[160000:232000, 0]) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    got += list(blocks)
    np.testing.assert_array_equal(np.concatenate(got), samples[:, 0])


def test_bytes_in_place_of_a_file(tmp_path: Path) -> None:
    class Cell:
        name = "set, record 3"

        def __init__(self, content: bytes) -> None:
            self._content = content

        def content(self) -> bytes:
            return self._content

    samples = noise(0.5, 8000)
    file = io.BytesIO()
    soundfile.write(file, samples, 8000, format="FLAC")
    got = AudioReader(Cell(file.getvalue())).read()
    np.testing.assert_allclose(got, samples[:, 0], rtol=0, atol=2**-15)
    with pytest.raises(AudioError, match="set, record 3 is empty"):
        AudioReader(Cell(b"")).read()


@pytest.mark.parametrize(
    ("name", "content", "cause", "message"),
    [
        ("a.wav", b"", "empty", r"a\.wav is empty \(0 bytes\)"),
        ("a.wav", riff(8000, 1, b""), "empty", r"a\.wav is empty: a header and no samples"),
        ("a.wav", b"These are my notes.\n" * 99, "not audio", r"a\.wav is a text file.*'These are my notes"),
        ("a.mp3", "größer als Ton\n".encode() * 99, "not audio", r"a\.mp3 is a text file.*'größer"),
        ("a.wav", bytes(range(128, 256)) * 9, "not audio", r"a\.wav is not audio that can be read"),
        ("a.raw", bytes(range(128, 256)) * 9, "not audio", r"a\.raw is not audio that can be read"),
        ("a.wav", b"\0\0\0\x20ftypM4A \0\0" * 9, "not audio", r"a\.wav is an MP4 or M4A file.*ffmpeg"),
        ("a.wav", riff(8000, 1, bytes(1000), size=4000), "cut off", r"cut off: its header says 4,000 bytes.*1,000"),
        ("a.wav", riff(8000, 1, bytes(1000), size=0), "cut off", r"a\.wav is unfinished.*1,000 bytes follow"),
        ("a.wav", riff(0, 1, bytes(1000)), "sample rate", r"a\.wav: its header says 0 Hz"),
        ("a.wav", riff(4_000_000_000, 1, bytes(1000)), "sample rate", r"says 4,000,000,000 Hz"),
        ("a.wav", riff(8000, 0, bytes(1000)), "not audio", r"a\.wav is not audio that can be read \(.*hannel"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, cause: str, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AudioError, match=message) as error:
        AudioReader(tmp_path / name).read()
    assert error.value.cause == cause and "\n" not in str(error.value)


def test_sizes_that_pipes_and_ultrasound_leave(tmp_path: Path) -> None:
    """A WAV that was written to a pipe has no length in its header; 384 kHz is a sample rate."""
    data = np.arange(-500, 500, dtype="<i2").tobytes()
    for size in (0xFFFFFFFF, 0x7FFFFFFF):
        (tmp_path / "pipe.wav").write_bytes(riff(8000, 1, data, size=size))
        np.testing.assert_array_equal(AudioReader(tmp_path / "pipe.wav").read() * 2**15, np.arange(-500, 500))
    (tmp_path / "fast.wav").write_bytes(riff(384000, 1, data * 384))
    assert len(AudioReader(tmp_path / "fast.wav", sample_rate=16000).read()) == 16000


@pytest.mark.parametrize(("suffix", "part"), [("flac", 0.5), ("mp3", 0.5), ("flac", 0.98)])
def test_cut_off_while_reading(tmp_path: Path, suffix: str, part: float) -> None:
    """These headers tell how long the samples are, not how many bytes: what is there is read, then it is said."""
    path = write(tmp_path / f"a.{suffix}", noise(20, 8000), 8000)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    reader = AudioReader(path)
    assert len(reader.read(0, 1.0)) == 8000
    with pytest.raises(
        AudioError, match=rf"a\.{suffix} is cut off .*of 20 seconds|a\.{suffix} is cut off.*says 20"
    ) as error:
        list(reader.blocks(1.0))
    assert error.value.cause == "cut off"
    assert len(reader.read(0, 1.0)) == 8000  # and the reader goes on


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")])
def test_samples_that_are_no_numbers(tmp_path: Path, value: float, word: str) -> None:
    samples = noise(20, 8000, 2)
    samples[100_000, 1] = value
    reader = AudioReader(write(tmp_path / "a.wav", samples, 8000, subtype="FLOAT"), sample_rate=16000)
    assert len(reader.read(0, 3.0)) == 48000  # elsewhere
    with pytest.raises(AudioError, match=rf"a\.wav holds {word}, first at 12\.5 seconds") as error:
        reader.read()
    assert error.value.cause == "not finite"


@pytest.mark.parametrize("suffix", ["wav", "aiff", "au", "w64", "rf64", "ogg"])
def test_cut_off_when_opened(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a.{suffix}", noise(4, 8000), 8000)
    content = path.read_bytes()
    assert AudioReader(path).frames == 32000
    path.write_bytes(content[: len(content) * 3 // 5])
    with pytest.raises(AudioError, match=rf"a\.{suffix} is cut off") as error:
        assert AudioReader(path).info
    assert error.value.cause == "cut off"


def mp3_without_its_length(path: Path, rate: int, mode: str) -> bytes:
    """An MP3 file less its first frame, which holds the number of the others: as old encoders write it. Loud at its
    start or end alone, so that the bit rate of the first frame says nothing of the others."""
    loud = noise(4, rate) * np.linspace(2, 0, 4 * rate)[:, None].astype(np.float32) ** 3
    write(path, loud, rate, bitrate_mode=mode, compression_level=0.5)
    content = path.read_bytes()
    assert mp3_length(content) is None and content[0] == 0xFF
    return content[content.index(content[:2], 4) :]


def test_mp3_without_its_length(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """All of its samples are read; tags behind them are none."""
    path = tmp_path / "a.mp3"
    content = mp3_without_its_length(path, 22050, "CONSTANT")
    for tail in (b"", b"TAG" + b" " * 125, b"APETAGEX" + bytes(range(200)) * 60):
        path.write_bytes(content + tail)
        reader = AudioReader(path)
        assert 4 * 22050 <= reader.frames <= 4 * 22050 + 3 * 576 and reader.frames % 576 == 0
        assert len(reader.read()) == reader.frames


def test_mp3_of_variable_rate_without_its_length(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.mp3"
    path.write_bytes(mp3_without_its_length(path, 22050, "VARIABLE"))
    said = soundfile.info(path).frames
    assert said < 3 * 22050, "the first frame does not mislead"
    with pytest.raises(AudioError, match=r"a\.mp3 is an MP3 file of variable bit rate.* of 4\.\d+ seconds [12]\."):
        AudioReader(path).read()


def test_missing(tmp_path: Path) -> None:
    write(tmp_path / "talk_one.wav", noise(0.1, 8000), 8000)
    with pytest.raises(AudioError, match=r"no such file: .*talk_on\.wav\. Did you mean talk_one\.wav\?") as error:
        AudioReader(tmp_path / "talk_on.wav").read()
    assert error.value.cause == "missing"
    with pytest.raises(AudioError, match="is a folder"):
        AudioReader(tmp_path).read()
    with pytest.raises(AudioError, match="no folder"):
        AudioReader(tmp_path / "other" / "talk.wav").read()


@pytest.mark.parametrize(
    ("start", "stop", "unit", "message"),
    [
        (0.5, 1.01, "seconds", r"a\.wav: the span from 0\.5 to 1\.01 ends beyond its 1 seconds"),
        (0, 8001, "frames", r"to 8001 ends beyond its 8000 frames"),
        (1.5, None, "seconds", "from 1.5 to the end is not within"),
        (-0.1, 0.5, "seconds", "is not within"),
        (0.5, 0.5, "seconds", "is not within"),
        (0.0, math.nan, "seconds", "is not a span"),
        (0.0, 0.5, "second", "unit='second' is not a choice. Did you mean seconds"),
    ],
)
def test_spans(tmp_path: Path, start: float, stop: float | None, unit: str, message: str) -> None:
    reader = AudioReader(write(tmp_path / "a.wav", noise(1, 8000), 8000))
    for asked in (lambda: reader.read(start, stop, unit=unit), lambda: reader.blocks(1.0, start, stop, unit=unit)):
        with pytest.raises(UserError, match=message):
            asked()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_rate": 0}, "sample_rate=0"),
        ({"sample_rate": 16000.0}, "sample_rate=16000.0"),
        ({"sample_rate": 10**9}, "sample_rate=1000000000"),
        ({"channels": "mona"}, "Did you mean mono"),
        ({"channels": 0}, "channels=0"),
        ({"channels": True}, "channels=True"),
    ],
)
def test_wrong_arguments(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        AudioReader("a.wav", **options)
    with pytest.raises(UserError, match="at least one sample"):
        AudioReader(__file__, sample_rate=8000).blocks(0.0)


def test_errors_come_back_from_workers() -> None:
    """A loader's worker raises the class anew with its message alone; a pool pickles it."""
    error = AudioError("a.wav is empty", "empty")
    assert pickle.loads(pickle.dumps(error)).cause == "empty"
    assert str(AudioError("a.wav is empty")) == "a.wav is empty"


def test_blocks_take_the_memory_of_a_block(tmp_path: Path) -> None:
    """What is allocated while five minutes stream, resampled, is what half a minute takes."""
    peaks = []
    for name, repeats in (("warm", 1), ("short", 1), ("long", 10)):
        samples = np.tile(noise(30, 8000), (repeats, 1))
        reader = AudioReader(write(tmp_path / f"{name}.wav", samples, 8000), sample_rate=4000)
        del samples
        tracemalloc.start()
        assert sum(len(block) for block in reader.blocks(5.0)) == repeats * 30 * 4000
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.05 * peaks[1], peaks


MEMORY = """
import resource, sys
from seqzoo.pipelines.audio.reader import AudioReader
total = sum(len(block) for block in AudioReader(sys.argv[1], sample_rate=8000).blocks(10.0))
print(total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_an_hour_is_never_in_memory(tmp_path: Path) -> None:
    """Resampled in blocks, an hour takes the memory of ten minutes, within 5 %."""
    peaks = []
    for minutes in (10, 60):
        path = tmp_path / f"{minutes}.wav"
        with soundfile.SoundFile(path, "w", samplerate=16000, channels=1) as file:
            minute = noise(60, 16000)
            for _ in range(minutes):
                file.write(minute)
        out = subprocess.run(
            [sys.executable, "-c", MEMORY, str(path)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
        )
        total, peak = map(int, out.stdout.split())
        assert total == minutes * 60 * 8000
        path.unlink()
        peaks.append(peak)
    assert peaks[1] < 1.05 * peaks[0], peaks
