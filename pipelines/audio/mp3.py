"""How long an MP3 file really is, where its header does not say so: by walking over its frames.

libsndfile takes the bit rate of the first frame for that of all, and of a file of variable bit rate would read a part.
"""

from __future__ import annotations

from mmap import mmap
from typing import NamedTuple

# By the two bits of the version: MPEG 1, 2 and 2.5, layer III.
_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
_KBITS_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_KBITS_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_TAGS = (b"Xing", b"Info", b"VBRI")  # a first frame with one of these holds the number of frames


class Mp3Length(NamedTuple):
    """samples: of a channel. per_frame: samples in a frame."""

    samples: int
    per_frame: int


def mp3_length(data: bytes | mmap) -> Mp3Length | None:
    """The samples in the frames of an MP3 file; None where its first frame tells their number, or there is no frame."""
    at = 0
    if data[:3] == b"ID3":
        at = 10 + sum((byte & 127) << 7 * (3 - place) for place, byte in enumerate(data[6:10]))
    frames, per_frame = 0, 0
    while at + 4 <= len(data):
        size, samples = _frame(data[at : at + 4])
        if not size or (not frames and not _frame(data[at + size : at + size + 4])[0]):
            at = data.find(b"\xff", at + 1)  # tags between frames, or behind the last
            if at < 0:
                break
            continue
        if not frames:
            if any(tag in data[at : at + min(size, 200)] for tag in _TAGS):
                return None
            per_frame = samples
        frames += 1
        at += size
    return Mp3Length(frames * per_frame, per_frame) if frames else None


def _frame(head: bytes) -> tuple[int, int]:
    """(bytes, samples) of the frame that these four bytes begin; (0, 0) where they begin none."""
    if len(head) < 4 or head[0] != 255 or head[1] & 0xE6 != 0xE2:  # eleven bits of one, and layer III
        return 0, 0
    version, kbits, rate = head[1] >> 3 & 3, head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or kbits in (0, 15) or rate == 3:
        return 0, 0
    samples, table = (1152, _KBITS_1) if version == 3 else (576, _KBITS_2)
    return samples // 8 * table[kbits] * 1000 // _RATES[version][rate] + (head[2] >> 1 & 1), samples
