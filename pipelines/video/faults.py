"""What can be wrong with a video file: a cause by its name, a message with the file; what is only said, once a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import BinaryIO

from ..errors import UserError, nearest

# The causes by which skipped files are counted.
CAUSES = ("missing", "empty", "not video", "no video", "cut off", "hangs", "span", "package", "unreadable")

_OTHERS = (  # where, what, kind: files that are no video, or none yet
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"%PDF-", "a PDF document"),
    (0, b"#EXTM3U", "a text file that names other files"),
    (0, b"ffconcat version", "a text file that names other files"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file itself (git lfs pull)"),
)
_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".ogv", ".flv", ".wmv", ".gif")

_READ = "read is what FFmpeg decodes, such as MP4, MKV, WebM, MOV, AVI"
_MOST_OF_A_KIND = 4
_said: set[tuple[str, str]] = set()
_kinds: list[str] = []


class VideoError(UserError):
    """A file that cannot be used. cause: one of CAUSES.

    The message comes first and suffices: a loader's worker raises its error again with the message alone.
    """

    def __init__(self, message: str, cause: str = "unreadable") -> None:
        super().__init__(message)
        self.cause = cause


def say_once(name: str, what: str, *, kind: str = "") -> None:
    """A line on stderr about a file that is used nevertheless; the same line is not said again by this process.

    kind: of such lines, of which the first few are said.
    """
    if (name, what) in _said:
        return
    _said.add((name, what))
    number = sum(1 for other in _kinds if other == kind) if kind else 0
    if number > _MOST_OF_A_KIND:
        return
    _kinds.append(kind)
    more = " (no more such notes follow)" if kind and number == _MOST_OF_A_KIND else ""
    print(f"note: {name}: {what}{more}", file=sys.stderr, flush=True)


def check_file(path: Path) -> None:
    """Refuse what is not there, empty, text, of a known other kind, or an MP4 file without its index.

    Raises VideoError.
    """
    if not path.is_file():
        raise missing_error(path)
    try:
        with path.open("rb") as file:
            _check_head(file, str(path))
    except OSError as error:
        raise VideoError(f"cannot read {path}: {error.strerror or error}") from None


def missing_error(path: Path) -> VideoError:
    """For a path that is not a file: the nearest name of its folder."""
    if path.is_dir():
        return VideoError(f"{path} is a folder, not a video file", "missing")
    if path.exists():
        return VideoError(f"{path} is not a regular file", "missing")
    folder = path.parent
    if not folder.is_dir():
        return VideoError(f"no such file: {path}; there is no folder {folder} either", "missing")
    try:
        names = sorted(p.name for p in folder.iterdir() if p.is_file())
    except OSError:
        names = []
    videos = [name for name in names if name.lower().endswith(_SUFFIXES)] or names
    known = nearest(path.name, videos)
    # a folder of a thousand files is not listed
    shown = known if known.startswith(" Did") or len(videos) <= 12 else f" The folder has {len(videos):,} other files."
    return VideoError(f"no such file: {path}.{shown}", "missing")


def _check_head(file: BinaryIO, name: str) -> None:
    head = file.read(512)
    if not head:
        raise VideoError(f"{name} is empty (0 bytes): copy or record it again; {_READ}", "empty")
    for place, mark, kind in _OTHERS:
        if head[place : place + len(mark)] == mark:
            raise VideoError(f"{name} is {kind}; {_READ}", "not video")
    if not head.strip(b"\0"):
        file.seek(0)
        if not any(block.strip(b"\0") for block in iter(lambda: file.read(1 << 20), b"")):
            raise VideoError(f"{name} holds zero bytes and nothing else: a copy that never finished?", "not video")
    if _is_text(head):
        start = " ".join(head[:40].decode("utf-8", "replace").split())
        raise VideoError(f"{name} is a text file, not a video: it begins with {start!r}; {_READ}", "not video")
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip"):
        _check_boxes(file, name)


def _check_boxes(file: BinaryIO, name: str) -> None:
    """Of an MP4 or MOV file: without the box moov or moof nothing in it can be found."""
    length = file.seek(0, 2)
    place = 0
    kinds: list[bytes] = []
    while place + 8 <= length and len(kinds) < 1000:
        file.seek(place)
        head = file.read(16)
        size, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if size == 1:
            size = int.from_bytes(head[8:], "big")
        kinds.append(kind)
        if kind == b"moof" or (kind == b"moov" and size >= 8 and place + size <= length):
            return
        if kind == b"moov" and size >= 8:
            there = length - place
            raise VideoError(f"{name} is cut off: its index (moov) is {size:,} bytes, {there:,} are there", "cut off")
        if size == 0:
            break
        if size < 8:
            return  # damaged: the decoder may know more
        place += size
    if place > length or b"mdat" in kinds:
        why = f"its boxes say {place:,} bytes, the file has {length:,}" if place > length else "it was never written"
        raise VideoError(f"{name} is cut off: an MP4 file whose index (moov) is not there ({why})", "cut off")


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # not the last character, cut in two
            return False
        text = head[: error.start].decode("utf-8")
    return all(character.isprintable() or character in "\t\r\n\f\ufeff" for character in text)
