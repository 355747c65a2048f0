"""What general compressors make of the same documents, in bits per byte: the baselines of a language model."""

from __future__ import annotations

import lzma
import math
import zlib

import numpy as np

# LZMA takes eleven times its dictionary, which holds both, and about a second for each of these MiB.
TEST_MOST, TRAIN_MOST = 1 << 24, 1 << 25


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


def baselines(test: bytes, train: bytes, *, test_size: int, train_size: int) -> dict[str, float]:
    """Bits per byte by method. test: of the test documents, joined, TEST_MOST bytes at most; train: of the training
    documents, the last TRAIN_MOST at most; the sizes are those of all: the names say what a part stands for."""
    if not test:
        return {}
    part = "" if len(test) >= test_size else f", first {_amount(len(test))}"
    primer = "the training text" if len(train) >= train_size else f"the last {_amount(len(train))} of the training text"
    return {
        f"chance{part}": chance(test, train),
        f"byte frequencies{part}": order_zero(test, train),
        f"zlib-9{part}": zlib_9(test),
        f"LZMA{part}": lzma_alone(test),
        f"LZMA primed with {primer}{part}": lzma_primed(test, train),
    }


def _amount(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size} bytes"
