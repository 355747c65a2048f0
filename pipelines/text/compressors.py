"""What general compressors make of the same documents, in bits per byte: the baselines of a language model."""

from __future__ import annotations

import lzma
import math
import zlib
from collections.abc import Iterable

import numpy as np


def chance(test: bytes, train: bytes) -> float:
    """Bits per byte of even odds over the byte values that occur."""
    return math.log2(max(len({*test, *train}), 1))


def order_zero(test: bytes, train: bytes) -> float:
    """Bits per byte of the frequencies of single bytes in the training text, one added to each."""
    counts = np.bincount(np.frombuffer(train, np.uint8), minlength=256) + 1.0
    return float(-np.log2(counts / counts.sum())[np.frombuffer(test, np.uint8)].mean())


def zlib_9(test: bytes) -> float:
    return 8 * len(zlib.compress(test, 9)) / len(test)


def lzma_alone(test: bytes) -> float:
    return 8 * len(_lzma(test, len(test))) / len(test)


def lzma_primed(test: bytes, train: bytes) -> float:
    """What the test text adds to the compressed training text when it is appended to it."""
    size = len(train) + len(test)
    return 8 * (len(_lzma(train + test, size)) - len(_lzma(train, size))) / len(test)


def _lzma(content: bytes, window: int) -> bytes:
    """The strongest preset, with a dictionary that holds everything (up to its limit of 1.5 GiB)."""
    size = min(max(window, 1 << 12), 3 << 29)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": size}]
    return lzma.compress(content, format=lzma.FORMAT_RAW, filters=filters)


def baselines(test: Iterable[bytes], train: Iterable[bytes], *, most: int = 1 << 26) -> dict[str, float]:
    """Bits per byte by method; documents are joined. most: bytes of training text that prime LZMA, from its end."""
    joined = b"".join(test)
    training = b"".join(train)[-most:]
    if not joined:
        return {}
    return {
        "chance": chance(joined, training),
        "byte frequencies": order_zero(joined, training),
        "zlib-9": zlib_9(joined),
        "LZMA": lzma_alone(joined),
        "LZMA primed with the training text": lzma_primed(joined, training),
    }
