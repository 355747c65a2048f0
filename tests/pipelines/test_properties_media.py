"""Properties of what is chosen and cut in sound and video: samplers, splits, markers, windows."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from examples import examples
from seqzoo.pipelines.audio.events.recordings import FileWindows
from seqzoo.pipelines.audio.markers import decode_text, decode_time, encode_ranges, encode_time, find_ranges
from seqzoo.pipelines.audio.streaming import FileSource, stream
from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.labelled_clips import assign_splits, shared_between
from seqzoo.pipelines.video.classify.protocol import Sampling, leave_out
from seqzoo.pipelines.video.clips import VideoClip, cut_clips
from seqzoo.pipelines.video.samplers import create_sampler, list_samplers
from seqzoo.pipelines.video.samplers.dpp import greedy_map, relevance_of
from seqzoo.pipelines.video.samplers.tass import select_tass

RANDOM = st.randoms(use_true_random=False)


# samplers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_samplers())
@examples(15)
@given(
    number=st.integers(1, 12),
    budget=st.integers(1, 30),
    level=st.sampled_from([0.0, 0.1, -3.0]),
    wrong=st.integers(0, 11),
)
def test_scores_that_are_equal_or_none(name: str, number: int, budget: int, level: float, wrong: int) -> None:
    choose, times = create_sampler(name), np.arange(number) / 2
    scores, features = np.full(number, level), np.random.default_rng(number).standard_normal((number, 20))
    found = choose(times, scores, features, budget)
    few = number // 2 + number % 2 if name == "fps" else number  # one a second of two
    assert len(found.indices) == min(budget, few)
    lazy = choose(times, lambda places: scores[places], lambda places: features[places], budget)
    assert np.array_equal(lazy.order, found.order) and lazy.scored == found.scored
    if name not in ("uniform", "fps"):
        scores[wrong % number] = np.nan
        if not (name == "dpp" and budget >= number):  # all are taken without a look
            with pytest.raises(UserError, match="not finite"):
                choose(times, scores, features, budget)
    for empty in (np.zeros(0), np.zeros((2, 2))):
        with pytest.raises(UserError, match="at least one frame"):
            choose(empty, scores, features, budget)


@examples(40)
@given(number=st.integers(1, 12), dim=st.integers(1, 6), copies=st.integers(0, 6), seed=st.integers(0, 99))
def test_a_larger_budget_of_dpp_goes_on_where_the_smaller_ended(number: int, dim: int, copies: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((number, dim))
    features = np.concatenate((features, features[rng.integers(0, number, copies)]))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    relevance = relevance_of(rng.random(len(features)), floor=0.1)
    orders = [greedy_map(relevance, features, budget).tolist() for budget in range(len(features) + 2)]
    for small, large in itertools.pairwise(orders):
        assert large[: len(small)] == small and len(large) <= len(small) + 1
    last = orders[-1]
    assert len(set(last)) == len(last) <= min(dim, number)  # repeats and what the others span are not chosen
    kernel = relevance[:, None] * (features @ features.T) * relevance
    for step, best in enumerate(last[:3]):  # each step by its definition
        gains = [np.linalg.det(kernel[np.ix_([*last[:step], i], [*last[:step], i])]) for i in range(len(features))]
        assert gains[best] >= max(gains) * (1 - 1e-6)


@examples(40)
@given(
    scores=st.lists(st.integers(0, 50), min_size=1, max_size=30), budget=st.integers(1, 12),
    scale=st.sampled_from([0.25, 2.0, 1024.0]), shift=st.integers(-64, 64),
)  # fmt: skip
def test_date_looks_at_the_order_of_scores_and_seconds_alone(
    scores: list[int], budget: int, scale: float, shift: int
) -> None:
    times, values = np.arange(len(scores)) / 2, np.array(scores, dtype=float)
    found = select_tass(times, values, budget)
    moved = select_tass(times + shift, (values + shift) * scale, budget)
    assert moved.order.tolist() == found.order.tolist() and moved.gap == found.gap
    everything = select_tass(times, values, len(scores), threshold="none", cap=1.0)
    assert sorted(everything.order.tolist()) == list(range(len(scores)))


@examples(60)
@given(
    number=st.none() | st.integers(1, 40), fps=st.sampled_from([0.5, 2.0, 25.0]), most=st.integers(1, 50),
    start=st.floats(0, 1e4), length=st.floats(0.01, 600), seed=st.none() | st.integers(0, 9),
)  # fmt: skip
def test_a_clip_is_looked_at_in_equal_parts(
    number: int | None, fps: float, most: int, start: float, length: float, seed: int | None
) -> None:
    drawn = None if seed is None else np.random.default_rng(seed)
    times = Sampling(number, None if number else fps, most).times(start, start + length, drawn)
    count = len(times)
    assert count == (number or min(max(round((start + length - start) * fps), 1), most))
    step, hair = length / count, 1e-9 * (start + length)
    places = start + np.arange(count) * step
    assert (places - hair <= times).all() and (times <= places + step + hair).all()
    if seed is None:
        np.testing.assert_allclose(times, places + step / 2, rtol=0, atol=hair)


# cuts and splits ------------------------------------------------------------------------------------------------------


@examples(60)
@given(
    start=st.floats(0, 100), length=st.floats(0.5, 500),
    parts=st.sampled_from([(0.7, 0.15, 0.15), (0.5, 0.5, 0.0), (0, 0, 1)]),
    gap=st.sampled_from([0.0, 0.1, 2.0]),
)  # fmt: skip
def test_a_clip_that_is_cut_in_time_is_in_one_split_at_a_time(
    start: float, length: float, parts: tuple[float, ...], gap: float
) -> None:
    clip = VideoClip(Path("a.mp4"), start, start + length, "x")
    cut = cut_clips([clip], parts, gap=gap)
    wanted = [split for split, part in zip(("train", "val", "test"), parts, strict=True) if part > 0]
    assert cut[0].start == clip.start and cut[-1].end == clip.end
    if len(cut) == 1 and len(wanted) > 1:
        assert length <= gap * (len(wanted) - 1) * (1 + 1e-9) and cut[0].split == "train"
        return
    assert [part.split for part in cut] == wanted
    assert all(part.start < part.end for part in cut)
    assert all(b.start == a.end + gap for a, b in itertools.pairwise(cut))


@examples(60)
@given(
    held_out=st.integers(1, 3), times=st.integers(3, 6), length=st.floats(10, 500), gap=st.sampled_from([0.0, 0.2]),
)  # fmt: skip
def test_every_piece_is_tested_in_one_fold(held_out: int, times: int, length: float, gap: float) -> None:
    clip, parts = VideoClip(Path("a.mp4"), 3.0, 3.0 + length, "x"), held_out * times
    tested = []
    for fold in range(times):
        cut = leave_out([clip], parts=parts, held_out=held_out, fold=fold, gap=gap)
        splits = [piece.split for piece in cut]
        assert len(cut) == parts and splits.count("test") == held_out and splits.count("val") == 1
        assert all(a.end <= b.start + 1e-9 for a, b in itertools.pairwise(cut))
        for a, b in itertools.pairwise(cut):
            assert a.split == b.split or b.start - a.end >= gap - 1e-9
        tested += [place for place, split in enumerate(splits) if split == "test"]
    assert sorted(tested) == list(range(parts))


@examples(40)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 2), st.none() | st.sampled_from("pqrs")), min_size=1, max_size=25
    ),
    ratio=st.sampled_from([(0.8, 0.1, 0.1), (0.4, 0.3, 0.3), (0.7, 0.3, 0.0)]), seed=st.integers(0, 5),
    every=st.booleans(),
)  # fmt: skip
def test_splits_share_no_file_and_no_group(
    rows: list[tuple[int, int, str | None]], ratio: tuple[float, ...], seed: int, every: bool
) -> None:
    clips = [
        VideoClip(Path(f"/d/{file}.mp4"), float(place), place + 1.0, f"l{label}", group)
        for place, (file, label, group) in enumerate(rows)
    ]
    try:
        found = assign_splits(clips, ratio, seed=seed, every_label=every)
    except UserError as error:
        assert "needs" in str(error) or "no training clip has the label" in str(error)
        return
    assert [clip._replace(split="") for clip in found] == clips and shared_between(found) == []
    for keys in ([clip.name for clip in found], [clip.group for clip in found]):
        for key in {key for key in keys if key is not None}:
            assert len({clip.split for own, clip in zip(keys, found, strict=True) if own == key}) == 1
    assert {clip.split for clip in found} == {
        s for s, part in zip(("train", "val", "test"), ratio, strict=True) if part
    }
    elsewhere = [clip._replace(path=Path("/other/place") / clip.path.name) for clip in clips]
    assert [clip.split for clip in assign_splits(elsewhere, ratio, seed=seed, every_label=every)] == [
        clip.split for clip in found
    ]
    order = random.Random(seed).sample(range(len(clips)), len(clips))
    again = assign_splits([clips[i] for i in order], ratio, seed=seed, every_label=every)
    assert [clip.split for clip in again] == [found[i].split for i in order]


# markers of time ------------------------------------------------------------------------------------------------------


@examples(60)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 9999), st.integers(0, 9999)), max_size=4),
    words=st.text("ab -.,:\n", max_size=6),
)
def test_times_in_markers_there_and_back(pairs: list[tuple[int, int]], words: str) -> None:
    ordered = [(min(pair) / 10, max(pair) / 10) for pair in pairs]
    assert all(decode_time(encode_time(start)) == start for start, _ in ordered)
    text = "; ".join(f"{start} - {end} s" for start, end in ordered)
    coded = encode_ranges(text)
    assert find_ranges(coded) == ordered and decode_text(coded) == text
    assert encode_ranges(coded) == coded and decode_text(encode_ranges(words)) == words


# audio in pieces ------------------------------------------------------------------------------------------------------


class Frames:
    """A front end whose frames are sums of whole numbers: exact, however they are cut."""

    def __init__(self, hop: int, length: int) -> None:
        self.hop_length, self.frame_length, self.sample_rate = hop, length, 1

    def num_frames(self, samples: int) -> int:
        return max((samples - self.frame_length + self.hop_length - 1) // self.hop_length + 1, 1) if samples > 0 else 0


class Encoder:
    """Tokens that are a frame's sum with those of `reach` frames to either side, and the place of the frame."""

    streaming, sample_rate = False, 1
    proj = SimpleNamespace(weight=torch.zeros(1))

    def __init__(self, front: Frames, reach: int) -> None:
        self.front_end, self.reach = front, reach

    def features(self, batch: torch.Tensor, lengths: torch.Tensor | None = None) -> Any:
        front = self.front_end
        ends = [batch.shape[1]] * len(batch) if lengths is None else lengths.tolist()
        numbers = [front.num_frames(end) for end in ends]
        found = torch.zeros(len(batch), max(numbers), dtype=torch.float64)
        for row, number in enumerate(numbers):
            for frame in range(number):
                first = frame * front.hop_length
                found[row, frame] = batch[row, first : min(first + front.frame_length, ends[row])].double().sum()
        return SimpleNamespace(features=found, lengths=torch.tensor(numbers))

    def encode(self, features: torch.Tensor, lengths: torch.Tensor, *, start: torch.Tensor) -> Any:
        near = torch.nn.functional.pad(features, (self.reach, self.reach)).unfold(1, 2 * self.reach + 1, 1).sum(-1)
        place = start.view(-1, 1) + torch.arange(features.shape[1])
        return SimpleNamespace(y=torch.stack((near, place.double()), -1))


@examples(40)
@given(
    frames=st.integers(1, 90), hop=st.integers(1, 7), length=st.integers(1, 9), piece=st.integers(1, 60),
    reach=st.integers(0, 3), more=st.integers(0, 2), batch=st.integers(1, 4),
)  # fmt: skip
def test_windows_of_a_recording_are_put_together_without_a_seam(
    frames: int, hop: int, length: int, piece: int, reach: int, more: int, batch: int
) -> None:
    assume(length >= hop)  # as in a front end: no sample is left out
    samples = np.arange(1, frames + 1, dtype=np.float32)
    front = Frames(hop, length)
    encoder = Encoder(front, reach)
    asked = []

    def read(start: int, stop: int) -> np.ndarray:
        asked.append((start, stop))
        assert 0 <= start < stop <= frames
        return samples[start:stop]

    source = SimpleNamespace(name="a", frames=frames, sample_rate=1, samples=read)
    pieces = list(
        stream(
            encoder, lambda y: y, source, piece_seconds=piece, context_seconds=(reach + more) * hop, batch_size=batch
        )
    )
    whole = encoder.features(torch.from_numpy(samples)[None])
    expected = encoder.encode(whole.features, whole.lengths, start=torch.zeros(1)).y[0]
    assert [found.first for found in pieces] == list(np.cumsum([0, *[len(found.values) for found in pieces[:-1]]]))
    assert torch.equal(torch.cat([found.values for found in pieces]), expected)
    tokens = max(round(piece / hop), 1)
    assert all(stop - start <= (tokens + 2 * (reach + more)) * hop + length for start, stop in asked)


@examples(60)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12), draw=RANDOM)
def test_a_file_is_read_forwards_in_any_steps(sizes: list[int], draw: random.Random) -> None:
    samples = np.arange(sum(sizes), dtype=np.float32)
    ends = np.cumsum([0, *sizes])
    blocks = [samples[a:b] for a, b in itertools.pairwise(ends)]
    source = FileSource(SimpleNamespace(name="a", frames=len(samples), rate=1, blocks=lambda seconds: iter(blocks)))
    start = 0
    for _ in range(12):
        start = draw.randint(start, len(samples) - 1)
        stop = draw.randint(start + 1, len(samples))
        np.testing.assert_array_equal(source.samples(start, stop), samples[start:stop])


@examples(40)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4), window=st.integers(1, 30),
    numbers=st.integers(0, 2**40), draw=RANDOM,
)  # fmt: skip
def test_training_windows_lie_in_their_recording_and_have_its_events(
    lengths: list[int], window: int, numbers: int, draw: random.Random
) -> None:
    recordings = []
    for place, frames in enumerate(lengths):
        truth = []
        for _ in range(draw.randint(0, 3)):
            begin = draw.randint(0, frames - 1)
            truth.append((float(begin), float(draw.randint(begin + 1, frames)), place))
        data = np.arange(frames, dtype=np.float32) + 100 * place
        recordings.append(
            SimpleNamespace(
                name=str(place),
                frames=frames,
                sample_rate=1,
                seconds=float(frames),
                truth=sorted(truth),
                samples=lambda start, stop, data=data: data[start:stop],
            )
        )
    windows = FileWindows(recordings, seconds=float(window), seed=1)
    batch = windows[np.arange(numbers, numbers + 4)]
    again = windows[np.arange(numbers + 1, numbers + 3)]
    assert torch.equal(batch["samples"][1:3], again["samples"])
    for row in range(4):
        recording, start = recordings[int(batch["recording"][row])], int(batch["start"][row])
        length = int(batch["lengths"][row])
        assert length == min(window, recording.frames) and 0 <= start <= recording.frames - length
        expected = np.zeros(window, np.float32)
        expected[:length] = recording.samples(start, start + length)
        np.testing.assert_array_equal(batch["samples"][row], expected)
        inside = [
            (max(a - start, 0.0), min(b - start, float(length)))
            for a, b, _ in recording.truth
            if a < start + length and b > start
        ]
        real = batch["classes"][row] >= 0
        assert list(map(tuple, batch["spans"][row][real].tolist())) == inside
