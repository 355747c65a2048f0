"""Pathfinder's snakes (arXiv:1805.08315, Linsley et al.): chains of bars that turn a little and avoid each other.

Two target snakes grow in turn, a bar each; a picture in which one cannot go on is begun anew. From its pivot, the last
one moved by length + 2 * margin along the last bar, a snake looks at the pixels of a circle of radius length + margin;
one at an angle d from the last bar is taken with weight max(cos(min(continuity * |d|, pi / 2)), 0)^2, times 1 minus the
mask's maximum within `margin`; the bar is drawn from there back. A bar whose surroundings overlap the mask (a sum of
1.8 or more) is drawn again, three times in all. The surroundings of a bar enter the mask with the next bar.

Many pictures grow side by side, as arrays; picture t of a stream is a function of the stream's key and t alone.
Deviations from the public generator, which draws with PIL and OpenCV: bars are anti-aliased by the covered share of a
pixel, not by Lanczos filtering of a picture of twice the size; the first pixel of a distractor is found by 64 uniform
draws instead of a list of all free pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from .bits import below, bits, uniform
from .stamps import pixels, segment, surroundings

_DEGREES = 360
_TRIES = 3  # for a bar
_SNAKE_TRIES = 5  # for a distractor
_TAILS = 64
_CLASH = 1.8
_FREE = 0.3  # a pixel whose mask is at most this is free
_LEAST_FREE = 0.01
_DISTRACTORS = 1 << 16  # counter of the first draw for distractors


@dataclass(frozen=True)
class Setting:
    """What a generator draws; lengths in pixels. contour: bars of a target snake. distractors: bars of all distractors,
    in snakes of contour // 3 bars. Brightness of the targets is snake_contrast * paddle_contrast, of the distractors
    snake_contrast, of the markers 1."""

    size: int
    padding: int
    length: int
    margins: tuple[int, ...]
    thickness: float
    marker_radius: float
    seed_distance: int
    continuity: float
    distractors: int
    snake_contrast: float
    paddle_contrast: float
    contour: int = 14


@dataclass(frozen=True)
class Snakes:
    """n pictures' snakes as bars. bars: int64 (n, 2, contour, 2), each the number of a stamp and a place; the first
    bar's place is the origin tip, every other's its far end. distractors: (n, bars, 2), the same, -1 for none."""

    bars: np.ndarray
    distractors: np.ndarray


@dataclass
class Table:
    """What depends on the setting and the margin alone. A direction is a number: 0..359 degrees for the first bar of a
    snake, 360 + k for pixel k of the circle. Places are indices into flat pictures with a border of `radius` pixels."""

    setting: Setting
    margin: int
    radius: int = field(init=False)
    width: int = field(init=False)

    def __post_init__(self) -> None:
        s, margin = self.setting, self.margin
        self.radius = s.length + math.ceil(s.thickness) + 2 * margin
        self.width = s.size + 2 * self.radius
        step = s.length + margin
        around = np.arange(0, 2 * np.pi, 1 / step)
        self.circle = np.unique(np.floor(step * np.stack([np.sin(around), np.cos(around)], axis=1) + 1e-9), axis=0)
        self.circle = self.circle.astype(np.int64)
        degrees = np.arange(_DEGREES) * np.pi / 180
        angles = np.concatenate([degrees, np.arctan2(self.circle[:, 0], self.circle[:, 1])])
        drawn = np.concatenate(
            [degrees, angles[_DEGREES:] + np.pi]
        )  # all but first bars are drawn from their head back
        lines = np.stack([segment(angle, s.length, s.thickness, self.radius) for angle in drawn])
        masks = np.stack([surroundings(a, s.length, s.thickness / 2 + margin, self.radius) for a in drawn])
        self.line = pixels(lines, self.width)
        self.mask = pixels(masks, self.width)
        self.wide = pixels(dilated(masks, margin), self.width)
        cores = masks[:_DEGREES] > 1 - 1e-9
        self.core = pixels(cores.astype(np.float64), self.width)[0]
        self.core[self.core == self.corner] = 0  # fill with the tail itself: the core is only read
        self.extent = np.array([[[ax.min(), ax.max()] for ax in np.nonzero(core)] for core in cores]) - self.radius
        self.hop = self.moved(angles, s.length + 2 * margin)
        self.head = self.moved(degrees, s.length)
        self.pivot = self.head + self.moved(degrees + np.pi, step)
        turn = np.abs(angles[:, None] - angles[None, _DEGREES:]) % (2 * np.pi)
        turn = np.minimum(turn, 2 * np.pi - turn)
        self.weight = np.maximum(np.cos(np.minimum(s.continuity * turn, np.pi / 2)), 0) ** 2
        frame = np.ones((1, s.size, s.size), dtype=np.float32)
        frame[:, s.padding : -s.padding, s.padding : -s.padding] = 0
        frame = np.pad(frame, ((0, 0), *[(self.radius, self.radius)] * 2))
        self.frame, self.wide_frame = frame.reshape(-1), dilated(frame, margin).reshape(-1)

    @property
    def corner(self) -> int:
        return -self.radius * (self.width + 1)

    @staticmethod
    def moved(angle: np.ndarray, distance: int) -> np.ndarray:
        """int64 (A, 2): (y, x) of a move, rounded up as the public generator does."""
        move = distance * np.stack([np.sin(angle), np.cos(angle)], axis=1)
        return np.ceil(move - 1e-9).astype(np.int64)

    def place(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Index into a flat picture with border."""
        return (y + self.radius) * self.width + x + self.radius

    def inside(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        return (y >= 0) & (y < self.setting.size) & (x >= 0) & (x < self.setting.size)


@dataclass
class _Growing:
    """Snakes that grow, one a row. pivot: (n, 2). direction: (n,). bar: (n, 2), the last one, not in the mask yet."""

    pivot: np.ndarray
    direction: np.ndarray
    bar: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> _Growing:
        return _Growing(self.pivot[rows], self.direction[rows], self.bar[rows])


@dataclass
class _Boards:
    """The masks of n pictures with their borders, flat: float32 (n, W * W). wide is the maximum of mask within the
    margin, kept up to date bar by bar, as the maximum of maxima is the maximum."""

    table: Table
    mask: np.ndarray
    wide: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> _Boards:
        return _Boards(self.table, self.mask[rows], self.wide[rows])

    def add(self, rows: np.ndarray, bar: np.ndarray) -> None:
        stamp(self.mask, rows, bar, self.table.mask)
        stamp(self.wide, rows, bar, self.table.wide)


def stamp(pictures: np.ndarray, rows: np.ndarray, bar: np.ndarray, stamps: tuple[np.ndarray, np.ndarray]) -> None:
    """Draw bar[i] (number, place) of the list of stamps into picture rows[i], by the maximum, in place."""
    flat = pictures.reshape(-1)
    where = (rows * pictures.shape[1] + bar[:, 1])[:, None] + stamps[0][bar[:, 0]]
    flat[where] = np.maximum(flat.take(where), stamps[1][bar[:, 0]])


def dilated(pictures: np.ndarray, margin: int) -> np.ndarray:
    """The maximum within a disc of radius `margin`, of pictures (n, H, W)."""
    _, height, width = pictures.shape
    padded = np.pad(pictures, ((0, 0), (margin, margin), (margin, margin)))
    near = np.arange(-margin, margin + 1)
    moves = [(dy, dx) for dy in near for dx in near if dy**2 + dx**2 <= margin**2]
    views = [padded[:, margin + y : margin + y + height, margin + x : margin + x + width] for y, x in moves]
    return np.maximum.reduce(views)


def _extend(
    table: Table, boards: _Boards, rows: np.ndarray, snake: _Growing, keys: np.ndarray, counter: int
) -> tuple[np.ndarray, _Growing]:
    """One more bar for the snakes in the pictures `rows`: bool (n,), which found one, and those snakes."""
    pivot = snake.pivot + table.hop[snake.direction]
    y, x = pivot[:, :1] + table.circle[:, 0], pivot[:, 1:] + table.circle[:, 1]
    inside = table.inside(y, x)
    place = np.where(inside, table.place(y, x), table.radius * (table.width + 1))
    base = rows * table.width**2
    occupied = boards.wide.reshape(-1).take(base[:, None] + place)
    weight = table.weight[snake.direction] * (1.0 - occupied) * inside
    total = np.cumsum(weight, axis=1)
    found = np.zeros(len(rows), dtype=bool)
    bar = np.zeros((len(rows), 2), dtype=np.int64)
    pending = np.flatnonzero(total[:, -1] >= 1e-4)
    for trial in range(_TRIES):
        draw = uniform(keys[pending], counter + trial) * total[pending, -1]
        choice = np.argmax(total[pending] > draw[:, None], axis=1)
        bar[pending] = np.stack([choice + _DEGREES, place[pending, choice]], axis=1)
        where = (base[pending] + bar[pending, 1])[:, None] + table.mask[0][bar[pending, 0]]
        overlap = boards.mask.reshape(-1).take(where) + table.mask[1][bar[pending, 0]]
        clash = overlap.max(axis=1, initial=0) >= _CLASH
        found[pending[~clash]] = True
        pending = pending[clash]
    boards.add(rows[found], snake.bar[found])
    return found, _Growing(pivot[found], bar[found, 0], bar[found])


def grow(table: Table, key: np.ndarray, first: int, count: int) -> Snakes:
    """The pictures first .. first + count - 1 of a stream, those alone in which both targets reach their length."""
    setting = table.setting
    keys = bits(key, np.arange(first, first + count, dtype=np.uint64))
    boards = _Boards(table, *(np.repeat(frame[None], count, axis=0) for frame in (table.frame, table.wide_frame)))
    rows = np.arange(count)
    snakes, started = _first_bars(table, keys)
    rows, snakes = rows[started], [snake[started] for snake in snakes]
    bars = np.stack([snake.bar for snake in snakes], axis=1)[:, :, None]
    for step in range(1, setting.contour):
        for which in range(2):
            found, longer = _extend(table, boards, rows, snakes[which], keys[rows], (2 * step + which) * _TRIES)
            rows, bars = rows[found], bars[found]
            snakes[which], snakes[1 - which] = longer, snakes[1 - which][found]
        bars = np.concatenate([bars, np.stack([snake.bar for snake in snakes], axis=1)[:, :, None]], axis=2)
    boards = boards[rows]
    for snake in snakes:
        boards.add(np.arange(len(rows)), snake.bar)
    return Snakes(bars, _distractors(table, boards, keys[rows]))


def _first_bars(table: Table, keys: np.ndarray) -> tuple[list[_Growing], np.ndarray]:
    """The first bar of both targets and bool (n,), where both are in the picture: the first anywhere at least twice the
    seed distance from the border, the second at that distance from it, in any direction."""
    setting = table.setting
    low, high = 2 * setting.seed_distance, setting.size - 2 * setting.seed_distance
    direction = below(_DEGREES, bits(keys, 0))
    begin, end = low - table.extent[direction, :, 0], high - table.extent[direction, :, 1]
    started = np.all(end > begin, axis=1)
    room = np.maximum(end - begin, 1)
    tail = begin + np.stack([below(room[:, 0], bits(keys, 1)), below(room[:, 1], bits(keys, 2))], axis=1)
    snakes = [_started(table, tail, direction)]
    angle = below(360, bits(keys, 3)) * np.pi / 180
    tail = tail + np.rint(setting.seed_distance * np.stack([np.sin(angle), np.cos(angle)], axis=1)).astype(np.int64)
    snakes.append(_started(table, tail, below(_DEGREES, bits(keys, 4))))
    for snake in snakes:
        head = snake.pivot - table.pivot[snake.direction] + table.head[snake.direction]
        started &= table.inside(*snake.pivot.T) & table.inside(*head.T)
    return snakes, started


def _started(table: Table, tail: np.ndarray, direction: np.ndarray) -> _Growing:
    bar = np.stack([direction, table.place(tail[:, 0], tail[:, 1])], axis=1)
    return _Growing(tail + table.pivot[direction], direction, bar)


def _distractors(table: Table, boards: _Boards, keys: np.ndarray) -> np.ndarray:
    """Bars of the distractors that find room: int64 (n, bars, 2), number -1 for none. `boards` are changed."""
    setting = table.setting
    length = setting.contour // 3
    number = setting.distractors // length
    bars = np.full((len(keys), number, length, 2), -1, dtype=np.int64)
    # counters: the draws of the first bar, then three for each bar, per try of each snake
    draws = 1 + _TAILS + _TRIES * length
    for which in range(number):
        free = (boards.mask <= _FREE).sum(axis=1) - (table.width**2 - setting.size**2)  # the border is free too
        rows = np.flatnonzero(free >= _LEAST_FREE * setting.size**2)
        for attempt in range(_SNAKE_TRIES):
            counter = _DISTRACTORS + (which * _SNAKE_TRIES + attempt) * draws
            trial = boards[rows]  # what a snake that fails leaves in the mask is forgotten
            fits, snake = _free_bar(table, trial.mask, keys[rows], counter)
            local = np.flatnonzero(fits)
            parts = [snake.bar]
            for step in range(1, length):
                found, snake = _extend(
                    table, trial, local, snake, keys[rows[local]], counter + 1 + _TAILS + _TRIES * step
                )
                local, parts = local[found], [*(part[found] for part in parts), snake.bar]
            trial.add(local, snake.bar)
            boards.mask[rows[local]], boards.wide[rows[local]] = trial.mask[local], trial.wide[local]
            bars[rows[local], which] = np.stack(parts, axis=1)
            rows = np.delete(rows, local)
    return bars.reshape(len(keys), number * length, 2)


def _free_bar(table: Table, mask: np.ndarray, keys: np.ndarray, counter: int) -> tuple[np.ndarray, _Growing]:
    """A first bar where the mask is free, at the first of 64 pixels that has room; bool (n,) and the snakes."""
    size = table.setting.size
    direction = below(_DEGREES, bits(keys, counter))
    draws = below(size * size, bits(keys[:, None], counter + 1 + np.arange(_TAILS)))
    y, x = draws // size, draws % size
    place = table.place(y, x)
    free = np.ones(place.shape, dtype=bool)
    place = place + (np.arange(len(mask)) * mask.shape[1])[:, None]
    for offset in table.core[direction].T:
        free &= mask.reshape(-1).take(place + offset[:, None]) <= _FREE
    for move in (table.head[direction], table.pivot[direction]):
        free &= table.inside(y + move[:, :1], x + move[:, 1:])
    fits = np.any(free, axis=1)
    chosen = np.argmax(free, axis=1)
    tail = np.stack([y, x], axis=2)[np.arange(len(mask)), chosen]
    return fits, _started(table, tail[fits], direction[fits])
