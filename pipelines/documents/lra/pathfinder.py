"""Pathfinder, Path-X and Path-256: do the two marked ends belong to the same snake? (arXiv:2011.04006, section 2.5)

How the snakes grow is in snakes.py. Here: the settings that Long Range Arena's builder names, the markers (a disc at
the origin tip of one snake, one at the terminal tip of the same snake, label 1, or of the other one, label 0; both are
fair coins) and the picture, which is the brightest of all parts, scaled so that its brightest pixel is 255. At 32 x 32
that makes distractors brighter than targets and targets brighter than markers, as in the published generator.

The published sets are 160,000/20,000/20,000 pictures with 14 bars a snake ("hard").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ...errors import UserError, nearest
from .bits import below, bits, stream
from .snakes import Setting, Snakes, Table, grow, stamp
from .split import Split, cached_splits, check_sizes, cut
from .stamps import disc, pixels

SETTINGS = {
    32: Setting(32, 1, 2, (1,), 0.5, 1.5, 7, 1.0, 20, 2.0, 0.75),
    64: Setting(64, 1, 5, (1,), 1.0, 2.5, 12, 1.8, 22, 0.8, 1.0),
    128: Setting(128, 1, 5, (2, 3), 1.5, 3.0, 20, 1.8, 35, 0.9, 1.0),
    256: Setting(256, 22, 5, (3,), 2.0, 5.0, 27, 1.8, 30, 1.0, 1.0),
}
CONTOURS = {"easy": 6, "intermediate": 9, "hard": 14}
MEAN, STD = 0.5, 0.5  # of pixel / 255, for models that read one real channel
VERSION = 1  # of what a seed gives: raise it when the hash in the tests changes
_CELLS = 1 << 22  # of all masks that grow side by side
_ATTEMPTS = 1 << 20  # without a picture before a setting counts as impossible


@dataclass(frozen=True)
class Scenes:
    """n pictures and what is in them. images: uint8 (n, S, S). labels: int64 (n,). layers: float32 (n, 2, S, S), the
    targets alone, brightest pixel 1. tips: int64 (n, 2 snakes, origin and terminal, y and x). marked: int64 (n, 2), the
    snakes whose origin and terminal tip carry a marker. margins: int64 (n,)."""

    images: np.ndarray
    labels: np.ndarray
    layers: np.ndarray
    tips: np.ndarray
    marked: np.ndarray
    margins: np.ndarray


def setting(size: int = 32, difficulty: str = "hard", margins: tuple[int, ...] | None = None) -> Setting:
    """The published setting of a size (32, 64, 128 or 256) and difficulty ("easy", "intermediate", "hard"); other
    margins make a variant of ours. Raises UserError for others."""
    if size not in SETTINGS:
        raise UserError(f"size={size!r} has no published setting;{nearest(str(size), map(str, SETTINGS))}")
    if difficulty not in CONTOURS:
        raise UserError(f"no difficulty {difficulty!r};{nearest(difficulty, CONTOURS)}")
    chosen = dataclasses.replace(SETTINGS[size], contour=CONTOURS[difficulty])
    if margins is None:
        return chosen
    if not margins or not all(isinstance(margin, int) and margin >= 1 for margin in margins):
        raise UserError(f"margins={margins!r} must be whole numbers of at least 1")
    return dataclasses.replace(chosen, margins=tuple(margins))


def name_of(chosen: Setting) -> str:
    """The name for tables: pathfinder-32, path-x (128), path-256, with the difficulty where it is not "hard", and with
    "ours" where the setting is none of the published ones."""
    level = next((name for name, contour in CONTOURS.items() if contour == chosen.contour), f"{chosen.contour} bars")
    name = {128: "path-x", 256: "path-256"}.get(chosen.size, f"pathfinder-{chosen.size}")
    name += "" if level == "hard" else f" {level}"
    published = dataclasses.replace(SETTINGS[chosen.size], contour=chosen.contour)
    if chosen == published and level in CONTOURS:
        return name
    changed = [f"{key}={value}" for key, value in asdict(chosen).items() if value != getattr(published, key)]
    return f"{name} (ours: {', '.join(changed) or level})"


def scenes(count: int, chosen: Setting, *, seed: int = 0) -> Iterator[Scenes]:
    """The first `count` pictures of a seed, some at a time. Raises UserError where the snakes find no room."""
    # The margin is drawn per picture, and each margin has its own stream of attempts: a margin whose snakes fail
    # more often is not drawn less often.
    coins = bits(stream(seed, f"pictures {chosen.size}"), np.arange(count, dtype=np.uint64))
    margins = np.array(chosen.margins)[below(len(chosen.margins), coins)]
    sources = {margin: _Source(Table(chosen, margin), seed) for margin in chosen.margins}
    step = max(1, _CELLS // (4 * chosen.size**2))
    for begin in range(0, count, step):
        rows = slice(begin, min(begin + step, count))
        wanted = {margin: np.flatnonzero(margins[rows] == margin) for margin in sources}
        parts = [
            _draw(sources[margin].table, sources[margin].take(len(places)), coins[rows][places])
            for margin, places in wanted.items()
        ]
        order = np.argsort(np.concatenate(list(wanted.values())))
        yield Scenes(*(np.concatenate(arrays)[order] for arrays in zip(*map(_fields, parts), strict=True)))


def sample(count: int, chosen: Setting | None = None, *, seed: int = 0) -> Split:
    """The first `count` pictures of a seed, row by row: tokens uint8 (count, S * S), brightness 0 .. 255."""
    chosen = chosen or SETTINGS[32]
    tokens = np.zeros((count, chosen.size**2), dtype=np.uint8)
    labels = np.zeros(count, dtype=np.int64)
    begin = 0
    for batch in scenes(count, chosen, seed=seed):
        end = begin + len(batch.labels)
        tokens[begin:end] = batch.images.reshape(end - begin, -1)
        labels[begin:end] = batch.labels
        begin = end
    lengths = np.full(count, chosen.size**2, dtype=np.int32)
    return Split(tokens, lengths, labels, num_classes=2, vocab_size=256)


def pathfinder_splits(
    *,
    train: int = 160_000,
    val: int = 20_000,
    test: int = 20_000,
    chosen: Setting | None = None,
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> dict[str, Split]:
    """The splits of the benchmark, from the cache or made: in minutes at 32 x 32, in hours for Path-X, whose snakes of
    margin 3 reach their length once in 800 attempts and whose pictures take 3.3 GB of memory. Test and validation come
    first in the stream of pictures, so that they do not depend on how many are trained on."""
    check_sizes(train=train, val=val, test=test)
    chosen = chosen or SETTINGS[32]
    options = {"version": VERSION, "sizes": [train, val, test], "setting": asdict(chosen), "seed": seed}

    def make() -> dict[str, Split]:
        return cut(sample(train + val + test, chosen, seed=seed), train=train, val=val, test=test)

    return cached_splits("pathfinder", options, cache_dir, make)


class _Source:
    """The snakes of one margin, in the order of their attempts."""

    def __init__(self, table: Table, seed: int) -> None:
        self.table = table
        self.key = stream(seed, f"snakes {table.setting.size} {table.margin}")
        self.attempts = 0
        self.bars: list[np.ndarray] = []
        self.distractors: list[np.ndarray] = []

    def take(self, count: int) -> Snakes:
        """The next `count` pictures' snakes."""
        at_a_time = max(1, _CELLS // self.table.width**2)
        idle = 0
        while sum(map(len, self.bars)) < count or not self.bars:
            grown = grow(self.table, self.key, self.attempts, at_a_time)
            self.attempts += at_a_time
            self.bars.append(grown.bars)
            self.distractors.append(grown.distractors)
            idle = 0 if len(grown.bars) else idle + at_a_time
            if idle > _ATTEMPTS:
                setting = self.table.setting
                raise UserError(
                    f"two snakes of {setting.contour} bars of length {setting.length} with margin {self.table.margin}"
                    f" found no room in {setting.size} x {setting.size} pixels in {idle:,} attempts; take fewer bars or"
                    " a smaller margin"
                )
        bars, distractors = np.concatenate(self.bars), np.concatenate(self.distractors)
        self.bars, self.distractors = [bars[count:]], [distractors[count:]]
        return Snakes(bars[:count], distractors[:count])


def _fields(scene: Scenes) -> list[np.ndarray]:
    return [getattr(scene, field.name) for field in dataclasses.fields(scene)]


def _draw(table: Table, snakes: Snakes, coins: np.ndarray) -> Scenes:
    """The pictures of these snakes; a coin's lowest bit is the label, the next the snake with the origin marker."""
    chosen, count = table.setting, len(coins)
    rows = np.arange(count)
    targets = np.zeros((2, count, table.width**2), dtype=np.float32)
    for which in range(2):
        for bar in range(chosen.contour):
            stamp(targets[which], rows, snakes.bars[:, which, bar], table.line)
    picture = np.maximum(targets[0], targets[1]) * np.float32(chosen.snake_contrast * chosen.paddle_contrast)
    others = np.zeros_like(picture)
    for bar in range(snakes.distractors.shape[1]):
        there = np.flatnonzero(snakes.distractors[:, bar, 0] >= 0)
        stamp(others, there, snakes.distractors[there, bar], table.line)
    picture = np.maximum(picture, others * np.float32(chosen.snake_contrast))

    labels = (coins & np.uint64(1)).astype(np.int64)
    origin = ((coins >> np.uint64(1)) & np.uint64(1)).astype(np.int64)
    marked = np.stack([origin, np.where(labels == 1, origin, 1 - origin)], axis=1)
    tips = snakes.bars[:, :, [0, -1], 1]
    marker = pixels(disc(chosen.marker_radius, table.radius)[None], table.width)
    for end in range(2):
        place = tips[rows, marked[:, end], end]
        stamp(picture, rows, np.stack([np.zeros_like(place), place], axis=1), marker)

    def inner(pictures: np.ndarray) -> np.ndarray:
        framed = pictures.reshape(*pictures.shape[:-1], table.width, table.width)
        return framed[..., table.radius : -table.radius, table.radius : -table.radius]

    image = inner(picture)
    image = np.rint(image * (255.0 / image.max(axis=(1, 2), keepdims=True, initial=1e-6))).astype(np.uint8)
    return Scenes(
        images=image,
        labels=labels,
        layers=np.moveaxis(inner(targets), 0, 1),
        tips=np.stack([tips // table.width - table.radius, tips % table.width - table.radius], axis=-1),
        marked=marked,
        margins=np.full(count, table.margin),
    )
