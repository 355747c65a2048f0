"""Scores of the probes: by hand, against torch's cross-entropy, and their tables and pictures."""

import builtins
import logging
import math

import numpy as np
import pytest
import torch

from seqzoo.pipelines.text.probes.generate import make_probe, probe_grid
from seqzoo.pipelines.text.probes.heatmap import _ticks, plot_accuracy_grid
from seqzoo.pipelines.text.probes.scores import (
    accuracy_grid,
    answer_log_prob,
    answers_correct,
    asked_accuracy,
    containment,
    effective_length,
    exact_match,
    teacher_forced,
)
from seqzoo.pipelines.text.probes.text_tasks import Probe


def encode(text):
    return list(text.encode())


@pytest.mark.parametrize(
    "text, answers, score",
    [
        ("they are 12 and 34.", ["12", "34"], 1.0),
        ("they are 12 and 3 4.", ["12", "34"], 0.5),
        ("ab-CD", ["AB-cd"], 1.0),
        ("x12345y", ["12345"], 1.0),
        ("", ["12345"], 0.0),
        ("a b c", ["a", "b", "d", "e"], 0.5),
    ],
)
def test_containment(text, answers, score):
    assert containment(text, answers) == score


@pytest.mark.parametrize(
    "text, answers, match",
    [
        (" 12345.", ["12345"], True),
        ("12345", ["12345"], True),
        ("\n 12345 and so on", ["12345"], True),
        (" 123456", ["12345"], False),
        (" 12345a", ["12345"], False),
        (" 1234", ["12345"], False),
        ("it is 12345", ["12345"], False),
        (" AB, CD.", ["AB", "CD"], True),
        (" CD, AB.", ["AB", "CD"], False),
        (" ab", ["AB"], False),
    ],
)
def test_exact_match(text, answers, match):
    assert exact_match(text, answers) is match


def test_teacher_forced_rows_by_hand():
    probes = [Probe("abc", ("12",), {}), Probe("z", ("7", "8"), {})]
    tokens, targets = teacher_forced(probes, encode)
    assert tokens.dtype == targets.dtype == np.int64
    assert tokens.tolist() == [[0, *b"abc 1"], [0, *b"z 7, ", 0][:6]]
    assert targets.tolist() == [[-100, -100, -100, *b" 12"], [-100, *b" 7, 8"]]
    tokens, targets = teacher_forced([probes[0], Probe("", ("1",), {})], encode, start=9)
    assert tokens.tolist()[1] == [9, *b" ", 9, 9, 9, 9] and targets.tolist()[1] == [*b" 1", -100, -100, -100, -100]


def test_log_prob_by_hand_and_against_cross_entropy():
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.9, 0.05, 0.05]]])) + 3
    targets = torch.tensor([[1, -100, 0]])
    torch.testing.assert_close(answer_log_prob(logits, targets), torch.tensor([math.log(0.25 * 0.9)]))
    logits = 4 * torch.randn(5, 7, 11, dtype=torch.float64)
    targets = torch.randint(0, 11, (5, 7))
    targets[torch.rand(5, 7) < 0.5] = -100
    targets[3] = -100  # a row that asks nothing
    losses = torch.nn.functional.cross_entropy(logits.mT, targets, ignore_index=-100, reduction="none")
    torch.testing.assert_close(answer_log_prob(logits, targets), -losses.sum(1), rtol=1e-12, atol=1e-12)
    assert answer_log_prob(logits, targets)[3] == 0
    half = answer_log_prob(logits.bfloat16(), targets)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, answer_log_prob(logits.bfloat16().double(), targets).float())


def test_one_wrong_token_makes_an_answer_wrong():
    targets = torch.tensor([[-100, 2, 3, -100], [1, -100, -100, 0], [-100] * 4, [-100, 2, 2, 2]])
    logits = torch.nn.functional.one_hot(targets.clamp(min=0), 5).float()
    assert answers_correct(logits, targets).tolist() == [True] * 4
    assert asked_accuracy(logits, targets) == (7, 7)
    logits[1, 3, 4] = 2.0
    logits[3, 1] = logits[3, 1].roll(1)
    logits[0, 0, 4] = 9.0  # is not asked
    assert answers_correct(logits, targets).tolist() == [True, False, True, False]
    assert asked_accuracy(logits, targets) == (5, 7)


def test_a_model_that_knows_the_answers_scores_one_and_a_random_one_nothing():
    probes = list(probe_grid("passkey", [300, 400], [0.0, 0.5, 1.0], samples=4))
    tokens, targets = map(torch.from_numpy, teacher_forced(probes, encode))
    perfect = 50.0 * torch.nn.functional.one_hot(targets.clamp(min=0), 256)
    right = answers_correct(perfect, targets)
    assert right.all() and answer_log_prob(perfect, targets).abs().max() < 1e-4
    # the answer follows the prompt, token by token
    for row, wanted, probe in zip(tokens, targets, probes, strict=True):
        asked = wanted >= 0
        assert bytes(wanted[asked].tolist()).decode() == f" {probe.answers[0]}"
        assert (row[1:][asked[:-1]] == wanted[:-1][asked[:-1]])[:-1].all()
    noise = torch.randn(*targets.shape, 256)
    assert not answers_correct(noise, targets).any()
    rows = accuracy_grid((probe.meta, float(score)) for probe, score in zip(probes, right, strict=True))
    assert [(r["length"], r["depth"], r["mean"], r["count"]) for r in rows] == [
        (length, depth, 1.0, 4) for length in (300, 400) for depth in (0.0, 0.5, 1.0)
    ]


def test_accuracy_grid_means_and_counts():
    results = [
        ({"task": "b", "length": 20, "depth": None, "model": "m"}, 1.0),
        ({"task": "a", "length": 20, "depth": 0.5, "model": "m"}, 1.0),
        ({"task": "a", "length": 10, "depth": 0.5, "model": "m"}, 0.0),
        ({"task": "a", "length": 20, "depth": 0.5, "model": "n"}, 0.0),
        ({"task": "a", "length": 20, "depth": 0.5, "model": "m"}, 0.5),
        ({"task": "a", "length": 20, "depth": None, "model": "m"}, True),
    ]
    assert accuracy_grid(results) == [
        {"task": "a", "length": 10, "depth": 0.5, "mean": 0.0, "count": 1},
        {"task": "a", "length": 20, "depth": None, "mean": 1.0, "count": 1},
        {"task": "a", "length": 20, "depth": 0.5, "mean": 0.5, "count": 3},
        {"task": "b", "length": 20, "depth": None, "mean": 1.0, "count": 1},
    ]
    assert accuracy_grid(results, by=("model", "task")) == [
        {"model": "m", "task": "a", "mean": 0.625, "count": 4},
        {"model": "m", "task": "b", "mean": 1.0, "count": 1},
        {"model": "n", "task": "a", "mean": 0.0, "count": 1},
    ]
    assert accuracy_grid([]) == []


def test_effective_length():
    def row(length, mean, count=1, depth=0.0):
        return {"task": "t", "length": length, "depth": depth, "mean": mean, "count": count}

    rows = [row(400, 0.9), row(100, 1.0), row(100, 0.8, depth=1.0), row(200, 0.86), row(300, 0.5)]
    assert effective_length(rows, 0.856) == 200  # 400 is good again, but 300 was not
    assert effective_length(rows, 0.9) == 100
    assert effective_length(rows, 0.95) is None
    assert effective_length(rows, 0.4) == 400
    assert effective_length([row(100, 1.0, count=9), row(100, 0.0, depth=1.0)], 0.9) == 100
    assert effective_length([], 0.5) is None


def dark(path):
    """Where the darkest blue of the map is in the picture without its colour bar: bool (height, width)."""
    from matplotlib.image import imread

    pixels = imread(path)[:, :, :3]
    pixels = pixels[:, : int(0.82 * pixels.shape[1])]
    return (pixels[:, :, 0] < 0.1) & (pixels[:, :, 2] > 0.3)


def test_the_heat_map_has_depth_downwards_and_length_to_the_right(tmp_path):
    pytest.importorskip("matplotlib")

    def share_and_centre(right):
        rows = accuracy_grid(
            ({"task": "needle", "length": length, "depth": depth}, float((length, depth) == right))
            for length in (512, 1024)
            for depth in (0.0, 0.5, 1.0)
        )
        path = tmp_path / "grid.png"
        assert plot_accuracy_grid(rows, path, title="a title") == path
        found = dark(path)
        lines, columns = np.nonzero(found)
        return found.mean(), np.mean(lines) / found.shape[0], np.mean(columns) / found.shape[1]

    share, down, across = share_and_centre((512, 0.0))
    assert 0.04 < share < 0.2 and down < 0.4 and across < 0.5
    share, down, across = share_and_centre((1024, 1.0))
    assert 0.04 < share < 0.2 and down > 0.55 and across > 0.6


def test_heat_maps_of_tasks_of_many_cells_and_of_gaps(tmp_path):
    pytest.importorskip("matplotlib")
    rows = accuracy_grid(
        [({"task": task, "length": length}, 0.5) for task in ("multivalue", "variables") for length in (100, 2000)],
        by=("task", "length"),
    )
    assert plot_accuracy_grid(rows, tmp_path / "tasks.png", y="task", panel=None).stat().st_size > 5000
    many = [
        {"task": f"task {t}", "length": 1000 * n, "depth": d / 24, "mean": d / 24}
        for t in range(3)
        for n in range(1, 16)
        for d in range(25)
    ]
    assert plot_accuracy_grid(many[:-7], tmp_path / "many.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="no row has a depth"):
        plot_accuracy_grid([{"task": "variables", "length": 100, "depth": None, "mean": 1.0}], tmp_path / "no.png")
    assert not (tmp_path / "no.png").exists()


def test_lengths_are_written_short_where_that_is_exact():
    assert _ticks([256, 1024, 4096, 2**20]) == ["256", "1k", "4k", "1M"]
    assert _ticks([500, 1000, 32_000, 10**6]) == ["500", "1k", "32k", "1M"]
    assert _ticks([500, 1000]) == ["500", "1000"]
    assert _ticks([1000, 1024]) == ["1000", "1k"]
    assert _ticks([1024, 3000]) == ["1,024", "3,000"]
    assert _ticks(["passkey", "needle"]) == ["passkey", "needle"]


def test_without_matplotlib_there_is_a_hint_and_no_picture(tmp_path, monkeypatch, caplog):
    original = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with caplog.at_level(logging.WARNING, logger="seqzoo"):
        row = {"task": "passkey", "length": 100, "depth": 0.5, "mean": 1.0}
        assert plot_accuracy_grid([row], tmp_path / "x.png") is None
    assert "pip install seqzoo[plot]" in caplog.text and not (tmp_path / "x.png").exists()


def test_a_probe_scores_its_own_answer():
    for task in ("passkey", "multivalue", "variables"):
        probe = make_probe(task, 1500)
        assert exact_match(probe.continuation + ".", probe.answers) and containment(probe.document, probe.answers) == 1
        assert not exact_match(probe.document, probe.answers)
