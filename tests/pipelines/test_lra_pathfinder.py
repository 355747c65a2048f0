"""Pathfinder: pictures looked at with flood fill, the growth replayed with other masks, no shortcut for a probe."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest
from scipy import ndimage

from seqzoo.pipelines.documents.lra import pathfinder
from seqzoo.pipelines.documents.lra.bits import stream
from seqzoo.pipelines.documents.lra.pathfinder import SETTINGS, name_of, pathfinder_splits, sample, scenes, setting
from seqzoo.pipelines.documents.lra.snakes import Table, grow
from seqzoo.pipelines.errors import UserError


@pytest.fixture(scope="module")
def small():
    """A few hundred pictures of 32 x 32 with their layers."""
    return next(scenes(300, SETTINGS[32]))


def round_structure(radius: float) -> np.ndarray:
    reach = np.arange(-int(radius), int(radius) + 1)
    return reach[:, None] ** 2 + reach**2 <= radius**2


def components(layer: np.ndarray, margin: int) -> np.ndarray:
    """Connected parts of a layer once gaps between bars, 2 * margin and what rounding adds, are bridged."""
    return ndimage.label(ndimage.binary_dilation(layer > 0.2, round_structure(margin + 2)), np.ones((3, 3)))[0]


def bars_near(layer: np.ndarray, tip: np.ndarray) -> int:
    """How many other bars of a snake (margin 2) end near the bar that has this tip."""
    bars, number = ndimage.label(layer > 0.2, np.ones((3, 3)))
    distance = ndimage.distance_transform_edt(bars != bars[tuple(tip)])
    return sum(distance[bars == bar].min() < 7.5 for bar in range(1, number + 1) if bar != bars[tuple(tip)])


@pytest.mark.parametrize(
    ("chosen", "count"), [(SETTINGS[32], 100), (SETTINGS[64], 20), (setting(128, margins=(2,)), 4)]
)
def test_flood_fill_along_the_snakes_confirms_the_label(chosen, count):
    picture = next(scenes(count, chosen))
    assert set(picture.labels) == {0, 1}
    neighbours: list[int] = []
    for n in range(count):
        first, last = picture.marked[n]
        parts = [components(picture.layers[n, which], int(picture.margins[n])) for which in range(2)]
        for which in range(2):
            origin, terminal = (parts[which][tuple(tip)] for tip in picture.tips[n, which])
            assert parts[which].max() == 1 and origin == terminal == 1  # each snake is one chain with both its tips
        if chosen.size == 128:
            neighbours += [
                bars_near(picture.layers[n, which], tip) for which in range(2) for tip in picture.tips[n, which]
            ]
        start, end = picture.tips[n, first, 0], picture.tips[n, last, 1]
        connected = parts[first][tuple(start)] == parts[first][tuple(end)] != 0 and first == last
        assert connected == picture.labels[n]
    # a tip is in the first or last bar, which has one neighbour, not two; now and then another part passes by
    assert neighbours.count(1) >= 0.8 * len(neighbours)


@pytest.mark.parametrize("size", [64, 128])
def test_markers_lie_on_the_marked_tips(size):
    chosen = setting(size, margins=(1 if size == 64 else 2,))
    pictures = next(scenes(16 if size == 64 else 4, chosen))
    two = 0
    for n, image in enumerate(pictures.images):
        # markers are the brightest parts here: 255 against 255 * contrast
        parts, number = ndimage.label(image == 255, np.ones((3, 3)))
        tips = {tuple(pictures.tips[n, pictures.marked[n, end], end]) for end in range(2)}
        if number == 2:
            two += 1
            assert {tuple(center) for center in ndimage.center_of_mass(image == 255, parts, [1, 2])} == tips
        assert all(image[tip] == 255 for tip in tips)
        others = [pictures.tips[n, 1 - pictures.marked[n, end], end] for end in range(2)]
        for other in others:
            if min(np.hypot(*(other - np.array(tip))) for tip in tips) > 2 * chosen.marker_radius:
                assert image[tuple(other)] < 255
    assert two >= 0.7 * len(pictures.images)


def test_pictures_are_bounded_balanced_and_fill_the_grey_scale(small):
    assert small.images.dtype == np.uint8 and small.images.shape == (300, 32, 32)
    assert np.all(small.images.max(axis=(1, 2)) == 255) and np.all(small.images.min(axis=(1, 2)) == 0)
    split = sample(2400)
    assert split.tokens.shape == (2400, 1024) and split.num_classes == 2 and split.vocab_size == 256
    assert np.array_equal(split.tokens[:300].reshape(-1, 32, 32), small.images)
    assert abs(split.labels.mean() - 0.5) < 0.03 and 0.5 <= split.majority < 0.53  # three standard errors
    # neither the brightness nor any pixel, nor a sum of them, tells the label
    pixels = (split.tokens / 255.0).astype(np.float64)
    pixels -= pixels[:1600].mean(axis=0)
    gram = pixels[:1600].T @ pixels[:1600] + 300 * np.eye(1024)
    probe = np.linalg.solve(gram, pixels[:1600].T @ (2.0 * split.labels[:1600] - 1))
    assert np.mean((pixels[1600:] @ probe > 0) == split.labels[1600:]) < 0.55


def test_first_hundred_pictures_of_seed_zero_are_fixed(small):
    digest = hashlib.sha256(small.images[:100].tobytes() + small.labels[:100].astype(np.uint8).tobytes())
    assert digest.hexdigest() == "01dc6a4e54a31a845c90171e95f7dbbe2c45fb3e8cfd7601343cd7c4d56ff738"


def test_pictures_depend_on_seed_and_number_alone(small, monkeypatch):
    monkeypatch.setattr(pathfinder, "_CELLS", 1 << 19)  # other numbers of pictures at a time
    parts = list(scenes(150, SETTINGS[32]))
    assert len(parts) > 1
    for key in ("images", "labels", "tips", "marked"):
        assert np.array_equal(np.concatenate([getattr(part, key) for part in parts]), getattr(small, key)[:150])
    other = next(scenes(20, SETTINGS[32], seed=1))
    assert not np.array_equal(other.images, small.images[:20])


def test_margins_are_drawn_before_the_snakes_are_tried():
    # On 64 x 64 a margin of 2 fails far more often than one of 1; it must not be rarer for that.
    pictures = next(scenes(60, setting(64, "easy", margins=(1, 2))))
    assert 18 < (pictures.margins == 2).sum() < 42
    again = next(scenes(20, setting(64, "easy", margins=(1, 2))))
    assert np.array_equal(again.images, pictures.images[:20])


def covered(size: int, tail: np.ndarray, angle: float, length: int, distance: float) -> np.ndarray:
    """Share of each pixel of a picture that is within `distance` of a segment, by points and their nearest one."""
    inside = (np.arange(8) + 0.5) / 8 - 0.5
    line = (np.arange(size)[:, None] + inside).reshape(-1)
    y, x = line[:, None] - tail[0], line[None, :] - tail[1]
    t = np.clip(y * np.sin(angle) + x * np.cos(angle), 0, length)
    near = np.hypot(y - t * np.sin(angle), x - t * np.cos(angle)) <= distance + 1e-9
    return near.reshape(size, 8, size, 8).mean(axis=(1, 3))


@pytest.mark.parametrize(("size", "count", "pictures"), [(32, 400, 5), (64, 3000, 2)])
def test_a_replay_of_the_growth_keeps_its_rules(size, count, pictures):
    chosen = SETTINGS[size]
    table = Table(chosen, 1)
    snakes = grow(table, stream(7, "test"), 0, count)
    assert len(snakes.bars) >= pictures
    frame = np.zeros((size, size))
    frame[[0, -1], :] = frame[:, [0, -1]] = 1
    near = ndimage.generate_binary_structure(2, 1)
    reach = chosen.length + 1
    around = np.arange(0, 2 * np.pi, 1 / reach)
    turns = []
    for bars, distractors in zip(snakes.bars[:pictures], snakes.distractors[:pictures], strict=True):
        mask = frame.copy()
        last: list[tuple] = [(), ()]
        for step in range(chosen.contour):
            for which in range(2):
                number, place = bars[which, step]
                at = np.array(divmod(place, table.width)) - table.radius
                if step == 0:
                    angle = number * np.pi / 180
                    own = covered(size, at, angle, chosen.length, chosen.thickness / 2 + 1)
                    head = at + np.ceil(chosen.length * np.array([np.sin(angle), np.cos(angle)]) - 1e-9)
                    pivot = head + np.ceil(-reach * np.array([np.sin(angle), np.cos(angle)]) - 1e-9)
                else:
                    pivot, before, earlier = last[which]
                    pivot = pivot + np.ceil((chosen.length + 2) * np.array([np.sin(before), np.cos(before)]) - 1e-9)
                    # one of the pixels of the circle, at most 90 degrees / continuity from the last bar
                    circle = np.floor(pivot + reach * np.stack([np.sin(around), np.cos(around)], axis=1) + 1e-9)
                    assert tuple(at) in {tuple(point) for point in circle}
                    angle = np.arctan2(*(at - pivot))
                    turn = abs((angle - before + np.pi) % (2 * np.pi) - np.pi)
                    assert turn * chosen.continuity < np.pi / 2
                    turns.append(turn)
                    assert ndimage.grey_dilation(mask, footprint=near)[tuple(at)] < 1
                    own = covered(size, at, angle + np.pi, chosen.length, chosen.thickness / 2 + 1)
                    assert (mask + own).max() < 1.8
                    mask = np.maximum(mask, earlier)  # a bar enters the mask with the next one
                last[which] = (pivot, angle, own)
        tails = [np.array(divmod(bars[which, 0, 1], table.width)) for which in range(2)]
        assert abs(np.hypot(*(tails[0] - tails[1])) - chosen.seed_distance) <= 1
        for _, _, own in last:
            mask = np.maximum(mask, own)
        length = chosen.contour // 3
        assert len(distractors) == chosen.distractors // length * length
        for begin in range(0, len(distractors), length):
            numbers = distractors[begin : begin + length, 0]
            assert np.all(numbers < 0) or (numbers[0] < 360 and np.all(numbers[1:] >= 360))  # whole snakes only
            earlier = np.zeros_like(mask)
            for number, place in distractors[begin : begin + length] if numbers[0] >= 0 else []:
                at = np.array(divmod(place, table.width)) - table.radius
                angle = number * np.pi / 180 if number < 360 else np.pi + np.arctan2(*table.circle[number - 360])
                own = covered(size, at, angle, chosen.length, chosen.thickness / 2 + 1)
                assert (mask + own).max() < (1.8 if number >= 360 else 2)
                # the first bar needs the pixels that it covers whole to be free
                assert number >= 360 or mask[own > 1 - 1e-9].max() <= 0.3
                mask, earlier = np.maximum(mask, earlier), own
            mask = np.maximum(mask, earlier)
    assert np.mean(turns) > 0.1


def test_directions_are_drawn_with_the_squared_cosine():
    # Three bars, so that hardly a snake meets the mask on its first turn.
    chosen = dataclasses.replace(SETTINGS[64], contour=3, distractors=0)
    table = Table(chosen, 1)
    bars = grow(table, stream(1, "test"), 0, 3000).bars
    assert len(bars) > 2400
    angle = bars[:, 0, 0, 0] * np.pi / 180
    circle = np.arctan2(table.circle[:, 0], table.circle[:, 1])
    turn = np.abs((circle - angle[:, None] + np.pi) % (2 * np.pi) - np.pi)
    weight = np.where(turn * 1.8 < np.pi / 2, np.cos(1.8 * turn) ** 2, 0.0)
    weight /= weight.sum(axis=1, keepdims=True)
    mean = (weight * turn).sum(axis=1)
    variance = (weight * turn**2).sum(axis=1) - mean**2
    seen = turn[np.arange(len(bars)), bars[:, 0, 1, 0] - 360]
    assert abs((seen - mean).sum()) < 4 * np.sqrt(variance.sum())
    assert abs(seen.mean() - mean.mean()) < 0.01


def test_splits_settings_and_names(tmp_path, monkeypatch):
    made = pathfinder_splits(train=30, val=6, test=4, chosen=setting(32, "easy"), cache_dir=tmp_path)
    assert {name: split.tokens.shape for name, split in made.items()} == {
        "train": (30, 1024),
        "val": (6, 1024),
        "test": (4, 1024),
    }
    assert np.array_equal(made["test"].tokens, sample(4, setting(32, "easy")).tokens)
    monkeypatch.setattr(pathfinder, "sample", None)  # not called again
    again = pathfinder_splits(train=30, val=6, test=4, chosen=setting(32, "easy"), cache_dir=tmp_path)
    assert np.array_equal(again["train"].tokens, made["train"].tokens)

    assert [setting(32, level).contour for level in ("easy", "intermediate", "hard")] == [6, 9, 14]
    assert [name_of(setting(size)) for size in (32, 64, 128, 256)] == [
        *("pathfinder-32", "pathfinder-64", "path-x", "path-256")
    ]
    assert name_of(setting(32, "intermediate")) == "pathfinder-32 intermediate"
    assert name_of(setting(128, margins=(2,))) == "path-x (ours: margins=(2,))"
    with pytest.raises(UserError, match=r"size=48 .*Did you mean|size=48 .*Known"):
        setting(48)
    with pytest.raises(UserError, match=r"no difficulty 'hrd'.*hard"):
        setting(32, "hrd")
    with pytest.raises(UserError, match=r"margins=\(0,\)"):
        setting(32, margins=(0,))


def test_snakes_without_room_end_with_a_message(monkeypatch):
    monkeypatch.setattr(pathfinder, "_ATTEMPTS", 3000)
    with pytest.raises(UserError, match=r"40 bars .* no room in 32 x 32"):
        sample(1, dataclasses.replace(SETTINGS[32], contour=40))
