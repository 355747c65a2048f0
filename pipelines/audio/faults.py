"""What can be wrong with an audio file, told from its first bytes: a cause by its name, a message with the file."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ..errors import UserError, nearest

# The causes by which skipped files are counted.
CAUSES = ("missing", "empty", "not audio", "cut off", "not finite", "channels", "sample rate", "span", "unreadable")
# Hz. Below and above are damaged headers; ultrasonic recorders reach 1.5 MHz, infrasound is kept at 100 Hz.
LEAST_RATE, MOST_RATE = 100, 6_144_000

READ = "read are WAV, FLAC, OGG, MP3, AIFF"

# Sizes that a writer leaves in the header when it does not know the end: a pipe, a recorder that was killed.
_UNKNOWN_SIZES = {0xFFFFFFFF, 0x7FFFFFFF, 0x80000000, 0x7FFFF000, 0xFFFFF000}
_OTHERS = (  # where, what, kind: files that people take for audio and that libsndfile does not read
    (4, b"ftyp", "an MP4 or M4A file"),
    (0, b"\x1aE\xdf\xa3", "a Matroska or WebM file"),
    (0, b"0&\xb2u\x8ef\xcf\x11", "a WMA file"),
    (0, b"ADIF", "an AAC file"),
    (0, b"\xff\xf1", "an AAC file"),
    (0, b"\xff\xf9", "an AAC file"),
    (0, b"#!AMR", "an AMR file"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file itself (git lfs pull)"),
)


_SHORTER = re.compile(r"^\s*(?:SSND|Data Size|riff)\s*:\s*(\d+) \(should be (\d+)\)", re.MULTILINE)


class AudioError(UserError):
    """A file that cannot be used. cause: one of CAUSES.

    The message comes first and suffices: a loader's worker raises its error again with the message alone.
    """

    def __init__(self, message: str, cause: str = "unreadable") -> None:
        super().__init__(message)
        self.cause = cause


class RiffHead(NamedTuple):
    """What the header of a WAV file says. rate: Hz. size: bytes of samples, None where the writer did not know it.
    there: bytes of samples that the file has."""

    rate: int
    size: int | None
    there: int


def check_head(file: BinaryIO, name: str) -> None:
    """Refuse what is empty, text, of a known other kind, a WAV file with less in it than its header says, or an OGG
    file that ends within a page (one that ends between two is like a shorter file).

    file: at its start, seekable. Raises AudioError.
    """
    head = file.read(512)
    if not head:
        raise AudioError(f"{name} is empty (0 bytes): copy or record it again; {READ}", "empty")
    for place, mark, kind in _OTHERS:
        if head[place : place + len(mark)] == mark:
            raise AudioError(
                f"{name} is {kind}; {READ}: `ffmpeg -i FILE FILE.flac` converts",
                "not audio",
            )
    if _is_text(head):
        start = " ".join(head[:40].decode("utf-8", "replace").split())
        raise AudioError(f"{name} is a text file, not audio: it begins with {start!r}; {READ}", "not audio")
    if head.startswith(b"OggS") and not _last_page_is_whole(file):
        raise AudioError(f"{name} is cut off: its last page is not whole", "cut off")
    riff = riff_head(file)
    if riff is None:
        return
    if not LEAST_RATE <= riff.rate <= MOST_RATE:
        raise rate_error(name, riff.rate)
    if riff.size == 0 and riff.there:
        raise AudioError(f"{name} is unfinished: its header says no samples, {riff.there:,} bytes follow", "cut off")
    if riff.size is not None and riff.size > riff.there:
        raise AudioError(
            f"{name} is cut off: its header says {riff.size:,} bytes of samples, the file has {riff.there:,}", "cut off"
        )


def check_log(log: str, name: str) -> None:
    """Refuse an AIFF, AU or W64 file of which libsndfile noted that it is shorter than its header says."""
    found = _SHORTER.search(log)
    if found is not None:
        said, there = int(found[1]), int(found[2])
        if said > there and said not in _UNKNOWN_SIZES:
            raise AudioError(f"{name} is cut off: its header says {said:,} bytes, there are {there:,}", "cut off")


def rate_error(name: str, rate: int) -> AudioError:
    return AudioError(
        f"{name}: its header says {rate:,} Hz, a sample rate is from {LEAST_RATE:,} to {MOST_RATE:,} Hz", "sample rate"
    )


def missing_error(path: Path) -> AudioError:
    """For a path that is not a file: the nearest name of its folder."""
    if path.is_dir():
        return AudioError(f"{path} is a folder, not an audio file", "missing")
    folder = path.parent
    if not folder.is_dir():
        return AudioError(f"no such file: {path}; there is no folder {folder} either", "missing")
    names = sorted(p.name for p in folder.iterdir() if p.is_file())
    known = nearest(path.name, names)
    # a folder of a thousand recordings is not listed
    shown = known if known.startswith(" Did") or len(names) <= 12 else f" The folder has {len(names):,} other files."
    return AudioError(f"no such file: {path}.{shown}", "missing")


def riff_head(file: BinaryIO) -> RiffHead | None:
    """The header of a RIFF or RF64 WAV file, None for anything else."""
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(12)
    if start[:4] not in (b"RIFF", b"RF64") or start[8:] != b"WAVE":
        return None
    rate, long_size = None, None
    while len(chunk := file.read(8)) == 8:
        kind, size = chunk[:4], int.from_bytes(chunk[4:], "little")
        begin = file.tell()
        if kind == b"ds64":
            long_size = int.from_bytes(file.read(16)[8:], "little")
        elif kind == b"fmt ":
            rate = int.from_bytes(file.read(8)[4:], "little")
        elif kind == b"data":
            known = long_size if size == 0xFFFFFFFF else None if size in _UNKNOWN_SIZES else size
            return None if rate is None else RiffHead(rate, known, end - begin)
        file.seek(begin + size + size % 2)
    return None


def _last_page_is_whole(file: BinaryIO) -> bool:
    """Of an OGG file: a page is at most 65,307 bytes long, and its header lists the sizes of its pieces."""
    end = file.seek(0, os.SEEK_END)
    begin = max(0, end - (1 << 16))
    file.seek(begin)
    tail = file.read()
    page = tail.rfind(b"OggS")
    if page < 0:
        return True  # something else behind the last page
    pieces = tail[page + 27 : page + 27 + tail[page + 26]] if len(tail) > page + 26 else b""
    return bool(pieces) and len(pieces) == tail[page + 26] and page + 27 + len(pieces) + sum(pieces) <= len(tail)


def _is_text(head: bytes) -> bool:
    if head.startswith(b"NIST_1A"):  # a header of text before the samples
        return False
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # not the last character, cut in two
            return False
        text = head[: error.start].decode("utf-8")
    return all(character.isprintable() or character in "\t\r\n\f\ufeff" for character in text)
