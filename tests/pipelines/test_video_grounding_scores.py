"""Grounding: losses by hand, windows of long videos, thresholds, scores and baselines."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("av")

from grounding_module import DIM, module

from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.video.grounding.baselines import baselines, cosine_levels
from seqzoo.pipelines.video.grounding.module import (
    FrameScores,
    grounding_loss,
    refine,
    rotation,
    with_cosine,
)
from seqzoo.pipelines.video.grounding.scores import GroundingSums, best_threshold, matches, within
from seqzoo.pipelines.video.grounding.videos import (
    GroundingVideo,
    Seen,
)
from seqzoo.pipelines.video.spans import Span
from seqzoo.zoo._video import VideoOutput

# the module -----------------------------------------------------------------------------------------------------------


def test_loss_by_hand() -> None:
    """Of a row of two frames, one inside, and one of a frame alone without a span."""
    logits = torch.tensor([[0.3, -0.2], [0.7, 0.0]])
    boundaries = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]]])
    batch = {
        "mask": torch.tensor([[True, True], [True, False]]),
        "inside": torch.tensor([[0.0, 1.0], [0.0, 0.0]]),
        "edges": torch.tensor([[[0.0, 0.0], [1.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]),
    }
    frames, edges = grounding_loss(
        VideoOutput(logits, boundaries, {}, batch["mask"]), batch, weight=3.0, edge_weight=0.5
    )

    def log_sigmoid(x: float) -> float:
        return -math.log1p(math.exp(-x))

    expected = -(log_sigmoid(-0.3) + 3 * log_sigmoid(-0.2) + log_sigmoid(-0.7)) / 3
    assert float(frames) == pytest.approx(expected, rel=1e-6)
    start = math.log(1 / (1 + math.e))  # of the second frame, softmax of 1 and 0
    end = math.log(math.exp(2) / (1 + math.exp(2)))
    assert float(edges) == pytest.approx(-0.5 * (start + end) / 2, rel=1e-6)
    empty = {**batch, "inside": torch.zeros(2, 2), "edges": torch.zeros(2, 2, 2)}
    assert (
        float(grounding_loss(VideoOutput(logits, boundaries, {}, batch["mask"]), empty, weight=1, edge_weight=1)[1])
        == 0
    )


def test_rare_frames_count_more() -> None:
    assert module(weight_power=0.5).weight == pytest.approx(2.0)  # a fifth of the frames is within a span
    assert module(weight_power=1.0).weight == pytest.approx(4.0)
    assert module(weight_power=0.0).weight == 1.0 and module(weight_power=9.0).weight == 20.0


def test_validation_loss_is_that_of_the_frames() -> None:
    """Over two videos of different lengths: sums over all frames, not means of means."""
    own, rng = module(threshold=0.5, weight_power=1.0), np.random.default_rng(0)
    own.on_validation_epoch_start()
    own.set_queries({"red": rng.standard_normal(DIM).astype(np.float32)})
    each = []
    for total in (6, 15):
        seen = Seen(np.arange(total) / 2, rng.standard_normal((total, DIM)).astype(np.float32))
        video = SimpleNamespace(name="a", duration=total / 2, queries=[("red", [(0.5, 1.5)])], seen=lambda s=seen: s)
        own.validation_step({"video": video}, 0)
        for time, p in zip(seen.times, own.scores(seen, own.queries["red"]).probabilities, strict=True):
            each.append(-4 * math.log(p) if 0.5 <= time < 1.5 else -math.log(1 - p))
    assert own._losses[1] == len(each) == 21
    assert float(own._losses[0] / own._losses[1]) == pytest.approx(sum(each) / 21, rel=1e-5)


def test_validation_chooses_the_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    own = module()
    times = np.arange(20) / 2
    inside = (times >= 3) & (times < 6)
    found = FrameScores(np.where(inside, 0.35, 0.25).astype(np.float32), np.zeros((20, 2), np.float32))
    seen = Seen(times, np.zeros((20, DIM), np.float32))
    logged: dict[str, float] = {}
    monkeypatch.setattr(own, "scores", lambda *_: found)
    monkeypatch.setattr(own, "_over_ranks", lambda flat: flat)
    monkeypatch.setattr(own, "log_dict", lambda values, **_: logged.update(values))
    own.on_validation_epoch_start()
    own.set_queries({"red": np.zeros(DIM, np.float32)})
    video = SimpleNamespace(name="a", duration=10.0, queries=[("red", [(2.75, 5.75)])], seen=lambda: seen)
    own.task["low_ratio"] = 1.0
    own.validation_step({"video": video}, 0)
    own.on_validation_epoch_end()
    assert float(own.threshold) == pytest.approx(0.3) and logged["val/threshold"] == pytest.approx(0.3)
    assert logged["val/miou"] == pytest.approx(1.0)


def test_rotations_keep_what_is_between_frames_and_queries() -> None:
    turn = rotation(DIM, torch.Generator().manual_seed(1))
    torch.testing.assert_close(turn @ turn.T, torch.eye(DIM), rtol=0, atol=1e-5)
    assert not torch.allclose(turn, rotation(DIM, torch.Generator().manual_seed(2)))
    features, query = torch.randn(2, 5, DIM), torch.randn(2, DIM)
    before, after = with_cosine(features, query), with_cosine(features @ turn, query @ turn)
    torch.testing.assert_close(before[..., DIM:], after[..., DIM:], rtol=0, atol=1e-5)


def test_cosines_beside_the_vectors_ignore_pads() -> None:
    features, query = torch.randn(1, 6, DIM), torch.randn(1, DIM)
    plain = with_cosine(features, query)
    cosine = torch.nn.functional.cosine_similarity(features[0], query, dim=-1)
    torch.testing.assert_close(plain[0, :, DIM], cosine)
    z = (cosine - cosine.mean()) / cosine.std(correction=0)
    torch.testing.assert_close(plain[0, :, DIM + 1], 0.1 * z, rtol=0.05, atol=1e-5)
    padded = torch.cat((features, torch.randn(1, 3, DIM)), 1)
    mask = torch.arange(9).unsqueeze(0) < 6
    with_pads = with_cosine(padded, query, mask)
    torch.testing.assert_close(with_pads[:, :6], plain)
    assert not with_pads[:, 6:, DIM:].any()


@pytest.mark.parametrize("options", [{}, {"time_encoding": {"num_steps": 64}}], ids=["", "time_encoding"])
def test_long_videos_are_the_middles_of_windows(options: dict[str, Any]) -> None:
    """Against each window by itself, whose times begin at 0 as in training."""
    own, rng = module(options), np.random.default_rng(0)
    if options:  # the table starts at zero, and would hide what is looked up
        torch.nn.init.normal_(own.net.encoder.time_encoding.table)
    for total in (5, 20, 21, 50, 63):
        seen = Seen(np.arange(total) / 2, rng.standard_normal((total, DIM)).astype(np.float32))
        query = rng.standard_normal(DIM).astype(np.float32)
        found = own.scores(seen, query)
        expected, starts = np.full(total, np.nan), [*range(0, max(total - 20, 0), 12), max(total - 20, 0)]
        for number, start in enumerate(starts):
            features = torch.from_numpy(seen.features[None, start : start + 20])
            times = torch.from_numpy(seen.times[None, start : start + 20] - seen.times[start])
            out = own.answer(features, torch.from_numpy(query[None]), None, times)
            skipped = 0 if number == 0 else (starts[number - 1] + 20 - start) // 2
            expected[start + skipped : start + 20] = out.y[0, skipped:].sigmoid().detach()
        np.testing.assert_allclose(found.probabilities, expected, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="window_overlap=10 must be below the window of 10 seconds"):
        module(window_overlap=10.0)


def test_edges_move_to_the_likeliest_frames() -> None:
    times, edges = np.arange(20) / 2, np.zeros((20, 2), np.float32)
    edges[3, 0], edges[9, 1], edges[18, 1] = 5, 5, 9
    spans = [Span(2.25, 4.25, 0.9)]
    # cells are from a quarter before to a quarter behind a frame
    assert refine(spans, times, edges, 10.0, 1.0) == [Span(1.25, 4.75, 0.9)]
    assert refine(spans, times, edges, 10.0, 0.0) == spans
    two = refine([Span(1.25, 3.75, 0.5), Span(4.25, 6.25, 0.9)], times, edges, 10.0, 1.1)
    assert two[0].start == 1.25 and len(two) <= 2 and all(span.start < span.end for span in two)


def test_only_vectors_of_frames() -> None:
    with pytest.raises(UserError, match=r"model.encoder.name='patches': grounding reads"):
        module({"encoder": {"name": "patches"}})
    with pytest.raises(UserError, match=r"task.rotate=-1 must be"):
        module(rotate=-1)


# scores ---------------------------------------------------------------------------------------------------------------


def test_scores_by_hand() -> None:
    sums, times = GroundingSums(), np.arange(0, 20, 0.5)
    sums.update([(2.0, 6.0), (10.0, 12.0)], [(2.0, 5.0), (14.0, 15.0)], times)
    sums.update([(4.0, 8.0)], [], times)
    found = sums.compute()
    assert found["miou"] == pytest.approx((3 / 7 + 0) / 2)
    assert found["recall_at_0.5"] == pytest.approx((0.5 + 0) / 2) and found["recall_at_0.7"] == pytest.approx(0.25)
    assert found["precision_at_0.5"] == pytest.approx((0.5 + 0) / 2)
    assert found["event_f1"] == pytest.approx(2 * 1 / (3 + 2))
    assert (found["queries"], found["events"], found["found"]) == (2, 3, 2)
    assert found["time_recall"] == pytest.approx(0.5) and found["time_precision"] == pytest.approx(0.5)
    again = GroundingSums()
    again.flat = sums.flat + sums.flat
    assert again.compute()["miou"] == pytest.approx(found["miou"])


def test_pairs_take_the_best_and_each_once() -> None:
    assert matches([(0, 4)], [(0, 4), (0, 5)]) == 1
    assert matches([(0, 4), (4, 8)], [(0, 8)]) == 1
    assert matches([(0, 4)], [(0, 2)]) == 1 and matches([(0, 4)], [(0, 1.9)]) == 0
    assert matches([], [(0, 1)]) == 0


class Line(GroundingVideo):
    """Frames each second, red from 10 to 14 and from 30 to 34."""

    name, duration = "line", 60.0

    def __init__(self) -> None:
        self.queries = [("red", [(10.0, 14.0), (30.0, 34.0)])]

    def seen(self) -> Seen:
        times = np.arange(60.0)
        inside = ((times >= 10) & (times < 14)) | ((times >= 30) & (times < 34))
        return Seen(times, np.where(inside[:, None], np.eye(DIM)[0], np.eye(DIM)[3]).astype(np.float32))


def test_of_equal_thresholds_the_one_nearest_to_a_half() -> None:
    good, bad, times = GroundingSums(), GroundingSums(), np.arange(10.0)
    good.update([(2.0, 4.0)], [(2.0, 4.0)], times)
    bad.update([(2.0, 4.0)], [(7.0, 8.0)], times)
    assert best_threshold({0.1: good.flat, 0.4: good.flat, 0.5: bad.flat, 0.8: good.flat}) == 0.4


def test_a_span_ends_before_its_end() -> None:
    times = np.array([0.0, 1.0, 2.0, 3.0])
    assert within(times, [(1.0, 2.0), (3.0, 4.0)]).tolist() == [1.0, 3.0]


def test_baselines() -> None:
    queries = {"red": np.eye(DIM, dtype=np.float32)[0]}
    levels = cosine_levels([Line()], queries, 1.0)
    found = baselines([Line()], queries, event_seconds=4.0, levels=levels, max_gap=1.0)
    assert found["whole video"]["miou"] == pytest.approx(8 / 60)
    # cells of frames are from half a second before to half a second behind
    assert found["cosine of the scorer"]["event_f1"] == 1.0
    assert found["cosine of the scorer"]["miou"] == pytest.approx(3.5 / 4.5)
    assert found["a span anywhere"]["found"] == 1


def test_the_cosine_answers_where_nothing_stands_out() -> None:
    """A baseline that may keep silent would be none: every query here is seen somewhere."""
    scores = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.55], np.float32)
    features = np.zeros((6, DIM), np.float32)
    features[:, 0] = scores
    seen = Seen(np.arange(6.0), features)
    video = SimpleNamespace(name="a", duration=6.0, queries=[("red", [(4.0, 6.0)])], seen=lambda: seen)
    queries = {"red": np.eye(DIM, dtype=np.float32)[0]}
    found = baselines([video], queries, event_seconds=2.0, levels=(0.8, 0.8), max_gap=0.0)  # type: ignore[list-item]
    assert found["cosine of the scorer"]["found"] == 1
