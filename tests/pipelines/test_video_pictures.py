"""What a timeline and a contact sheet show, read back from the figure; how a time is written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seqzoo.pipelines.video import pictures
from seqzoo.pipelines.video.pictures import clock, plot_search, plot_sheet

pytest.importorskip("matplotlib", reason="matplotlib (seqzoo[plot]) is not installed")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved, as they are then."""
    kept: list[Any] = []
    original = pictures.new_figure

    @contextlib.contextmanager
    def keeping(path: str | Path) -> Iterator[Any]:
        with original(path) as figure:
            kept.append(figure)
            yield figure

    monkeypatch.setattr(pictures, "new_figure", keeping)
    return kept


@pytest.mark.parametrize(
    ("seconds", "text", "whole"),
    [
        (0, "0.0 s", "0:00"),
        (9.94, "9.9 s", "0:09"),
        (9.96, "10.0 s", "0:10"),
        (59.97, "1:00.0", "1:00"),
        (63.2, "1:03.2", "1:03"),
        (3599.96, "1:00:00.0", "1:00:00"),
        (3723.4, "1:02:03.4", "1:02:03"),
        (36_000, "10:00:00.0", "10:00:00"),
    ],
)
def test_times_as_people_write_them(seconds: float, text: str, whole: str):
    assert clock(seconds) == text and clock(seconds, whole=True) == whole


def test_two_hours_are_their_range_and_mean(tmp_path: Path, drawn: list[Any]):
    rng = np.random.default_rng(0)
    times = np.arange(14_400) / 2
    scores = rng.normal(0.3, 0.05, (2, 14_400))
    scores[0, 7000] = 0.9
    chosen = [np.array([7000, 7010]), np.array([3])]
    spans = [[(3495.0, 3505.0, 0.8), (100.0, 100.5, 0.4)], []]
    path = plot_search(times, scores, ["a cab", "a bus"], spans, chosen, tmp_path / "x.png", seconds=7200.0, title="t")
    assert path is not None and path.stat().st_size > 10_000
    first, second = drawn[0].axes
    line = next(part for part in first.lines if len(part.get_xdata()) == 900)
    columns = scores[0].reshape(900, 16)  # eight seconds each
    np.testing.assert_allclose(line.get_ydata(), columns.mean(1))
    np.testing.assert_allclose(line.get_xdata(), np.arange(900) * 8.0 + 4)
    band = next(part for part in first.collections if type(part).__name__.startswith("FillBetween"))
    edges = band.get_paths()[0].vertices
    for column in (0, 437, 899):
        own = edges[np.isclose(edges[:, 0], column * 8.0 + 4), 1]
        assert {round(own.min(), 9), round(own.max(), 9)} == {
            round(columns[column].min(), 9),
            round(columns[column].max(), 9),
        }
    points = first.collections[-1].get_offsets()
    np.testing.assert_allclose(points, np.column_stack([times[chosen[0]], scores[0, chosen[0]]]))
    # both spans, the short one wide enough to be seen
    widths = sorted(patch.get_width() for patch in first.patches)
    assert widths == pytest.approx([18.0, 18.0]) and not second.patches
    labels = [tick.get_text() for tick in second.get_xticklabels()]
    assert labels[0] == "0:00" and labels[-1] == "2:00:00" and 8 <= len(labels) <= 15
    assert second.get_xlim() == (0, 7200)


def test_frames_that_were_not_looked_at_leave_no_gap(tmp_path: Path, drawn: list[Any]):
    times = np.arange(20.0)
    scores = np.full((1, 20), np.nan)
    scores[0, [0, 5, 6, 19]] = [0.1, 0.5, 0.6, 0.2]
    plot_search(times, scores, ["a cab"], [[]], [np.array([5, 6])], tmp_path / "x.png", seconds=20.0)
    line = drawn[0].axes[0].lines[0]
    assert list(line.get_xdata()) == [0, 5, 6, 19] and list(line.get_ydata()) == [0.1, 0.5, 0.6, 0.2]


def test_many_queries_and_a_video_of_one_frame(tmp_path: Path, drawn: list[Any]):
    one = np.array([0.0])
    scores = np.full((9, 1), 0.5)
    queries = [f"query {k}" for k in range(9)]
    empty = [np.array([0])] * 9
    plot_search(one, scores, queries, [[]] * 9, empty, tmp_path / "x.png", seconds=0.04, title="one.mp4")
    assert len(drawn[0].axes) == pictures.MOST_PANELS
    assert drawn[0].get_suptitle() == "one.mp4 (the first 8 of 9 queries)"


def test_a_sheet_is_in_order_and_marks_the_best_span(tmp_path: Path, drawn: list[Any]):
    times = np.array([9.0, 1.0, 4.0, 70.0])
    frames = np.stack([np.full((18, 32, 3), 10 * k, dtype=np.uint8) for k in range(4)])
    spans = [(0.5, 1.5, 0.4), (3.0, 9.5, 0.8)]
    path = plot_sheet(frames, times, np.array([0.9, 0.4, 0.7, 0.1]), tmp_path / "s.png", spans=spans, title="a cab")
    assert path is not None and path.is_file()
    axes = drawn[0].axes
    assert [int(axis.images[0].get_array()[0, 0, 0]) for axis in axes] == [10, 20, 0, 30]
    captions = [axis.get_xlabel().split() for axis in axes]
    assert captions == [["1.0", "s", "0.400"], ["4.0", "s", "0.700"], ["9.0", "s", "0.900"], ["1:10.0", "0.100"]]
    widths = [axis.spines["left"].get_linewidth() for axis in axes]
    assert widths[1] == widths[2] > widths[0] > widths[3]


def test_of_many_frames_the_best_are_shown(tmp_path: Path, drawn: list[Any]):
    scores = np.random.default_rng(0).permutation(100) / 100
    frames = np.zeros((100, 4, 6, 3), dtype=np.uint8)
    plot_sheet(frames, np.arange(100.0), scores, tmp_path / "s.png", title="a cab")
    shown = [float(axis.get_xlabel().split()[-1]) for axis in drawn[0].axes]
    assert len(shown) == 64 and min(shown) == pytest.approx(0.36)
    assert drawn[0].get_suptitle() == "a cab (the 64 best of 100 frames)"


@pytest.mark.parametrize(("number", "aspect", "columns"), [(1, 1.78, 1), (16, 1.78, 4), (16, 0.56, 7), (64, 1.78, 8)])
def test_a_sheet_is_not_higher_than_wide(number: int, aspect: float, columns: int):
    assert pictures._sheet_columns(number, aspect) == columns


def test_without_matplotlib_there_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pictures, "can_draw", lambda what: False)
    one = np.array([0.0])
    assert plot_search(one, np.ones((1, 1)), ["a"], [[]], [np.array([0])], tmp_path / "x.png", seconds=1) is None
    assert plot_sheet(np.zeros((1, 2, 2, 3), np.uint8), one, one, tmp_path / "y.png") is None
    assert not list(tmp_path.iterdir())
