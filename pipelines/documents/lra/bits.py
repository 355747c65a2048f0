"""Random numbers as a pure function of a seed and a counter: the same in any order, batch size and NumPy version.

SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def bits(key: np.ndarray, counter: np.ndarray | int = 0) -> np.ndarray:
    """64 random bits, uint64, for each key (uint64 array) and counter: number `counter` of the stream of the key."""
    # Array arithmetic wraps without a warning, which is what the generator wants; a scalar's would warn.
    state = np.atleast_1d(np.asarray(counter, dtype=np.uint64)) + np.uint64(1)
    state = state * _GOLDEN + key
    state ^= state >> np.uint64(30)
    state *= _FIRST
    state ^= state >> np.uint64(27)
    state *= _SECOND
    state ^= state >> np.uint64(31)
    return state


def stream(seed: int, name: str) -> np.ndarray:
    """The key, uint64 (1,), of the stream of that name under a seed."""
    key = np.array([seed % (1 << 64)], dtype=np.uint64)
    for letter in name.encode():
        key = bits(key, letter)
    return key


def uniform(key: np.ndarray, counter: np.ndarray | int = 0) -> np.ndarray:
    """float64 in [0, 1), of 53 bits."""
    return (bits(key, counter) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def below(limit: np.ndarray | int, value: np.ndarray) -> np.ndarray:
    """int64 in 0 .. limit - 1 from the upper 32 of the bits `value`; uneven by less than limit / 2^32."""
    return (((value >> np.uint64(32)) * np.asarray(limit, dtype=np.uint64)) >> np.uint64(32)).astype(np.int64)
