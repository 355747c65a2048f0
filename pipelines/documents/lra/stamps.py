"""Small pictures of one segment or one disc, as lists of the pixels that they cover and how much of each."""

from __future__ import annotations

import numpy as np

_SUBPIXELS = 8  # per side: the share of a pixel that is covered comes in steps of 1/64
_TIE = 1e-9


def subpixels(radius: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates y and x, (P, P, 8, 8), of the points within the pixels of a square of P = 2 * radius + 1 pixels; the
    middle of the central pixel is 0, 0."""
    inside = (np.arange(_SUBPIXELS) + 0.5) / _SUBPIXELS - 0.5
    line = np.arange(-radius, radius + 1)[:, None] + inside
    y, x = np.broadcast_arrays(line[:, None, :, None], line[None, :, None, :])
    return y, x


def segment(angle: float, length: float, thickness: float, radius: int) -> np.ndarray:
    """float64 (P, P): a bar from the middle in direction `angle` (y down, radians), its brightest pixel 1."""
    y, x = subpixels(radius)
    along, across = y * np.sin(angle) + x * np.cos(angle), y * np.cos(angle) - x * np.sin(angle)
    covered = (along >= -_TIE) & (along <= length + _TIE) & (np.abs(across) <= thickness / 2 + _TIE)
    share = covered.mean(axis=(2, 3))
    return share / share.max()


def surroundings(angle: float, length: float, distance: float, radius: int) -> np.ndarray:
    """float64 (P, P): the share of each pixel that is at most `distance` from that segment's middle line."""
    y, x = subpixels(radius)
    along, across = y * np.sin(angle) + x * np.cos(angle), y * np.cos(angle) - x * np.sin(angle)
    beyond = along - np.clip(along, 0, length)
    return (beyond**2 + across**2 <= distance**2 + _TIE).mean(axis=(2, 3))


def disc(size: float, radius: int) -> np.ndarray:
    """float64 (P, P): the share of each pixel that is in a circle of radius `size`."""
    y, x = subpixels(radius)
    return (y**2 + x**2 <= size**2 + _TIE).mean(axis=(2, 3))


def pixels(stamps: np.ndarray, width: int, least: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Offsets int64 (A, J) in a flat picture of that width, and values float32 (A, J), of the pixels above `least` of
    the stamps (A, P, P). Shorter lists are filled with the stamp's corner, which no stamp covers, at value 0.
    """
    radius = stamps.shape[1] // 2
    place = np.arange(-radius, radius + 1)
    offsets = (place[:, None] * width + place).reshape(-1)
    flat = stamps.reshape(len(stamps), -1)
    if flat[:, 0].any():
        raise ValueError(f"a stamp of {stamps.shape[1]} pixels covers its corner; its radius is too small")
    kept = flat > least
    # kept pixels first, in order; then corners
    order = np.argsort(~kept, axis=1, kind="stable")[:, : kept.sum(axis=1).max()]
    chosen = np.take_along_axis(kept, order, axis=1)
    values = np.where(chosen, np.take_along_axis(flat, order, axis=1), 0.0).astype(np.float32)
    return np.where(chosen, offsets[order], offsets[0]), values
