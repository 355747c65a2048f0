"""Properties of composed videos and recordings, and of the windows that are trained on."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from examples import examples
from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.video import composer as video_composer
from seqzoo.pipelines.video.clips import VideoClip
from seqzoo.pipelines.video.grounding.videos import ComposedWindows

RANDOM = st.randoms(use_true_random=False)


# composed videos ------------------------------------------------------------------------------------------------------


class Reader:
    """A video that nobody decodes."""

    def __init__(self, name: str, steps: list[float]) -> None:
        self.name, self.path, self.size, self.key = name, Path(name), (2, 2), name
        edges = np.concatenate(([0.0], np.cumsum(steps)))
        self.times, self.duration = edges[:-1], float(edges[-1])

    def __len__(self) -> int:
        return len(self.times)

    def identities(self, indices: list[int]) -> list[tuple[str, int]]:
        return [(self.key, int(i)) for i in indices]

    def close(self) -> None:
        pass


@examples(30)
@given(
    steps=st.tuples(*[st.sampled_from([0.04, 0.1, 1 / 3, 0.5])] * 3), slack=st.sampled_from([1e-6, 0.1, 1.0, 20.0]),
    number=st.integers(1, 6), min_gap=st.sampled_from([0.0, 0.37, 2.0]),
    event_seconds=st.none() | st.sampled_from([0.7, (0.5, 3.0)]), speed=st.sampled_from([1.0, (0.5, 2.0)]),
    flip=st.booleans(), seed=st.integers(0, 10**6),
)  # fmt: skip
@example(
    steps=(1 / 3,) * 3, slack=1e-6, number=6, min_gap=0.37, event_seconds=None, speed=1.0, flip=False, seed=0
)  # it was five frames longer than asked
def test_composed_videos_are_as_long_as_asked_and_show_their_events(
    steps: tuple[float, ...], slack: float, number: int, min_gap: float, event_seconds: Any, speed: Any, flip: bool,
    seed: int,
) -> None:  # fmt: skip
    readers = {name: Reader(name, [step] * count) for name, step, count in zip("abc", steps, (40, 25, 31), strict=True)}
    half, whole = readers["a"].times[20], 20
    clips = [
        VideoClip(Path("a"), 0.0, half, "bird"),
        VideoClip(Path("a"), half, None, "sky", shows=("cat",)),
        VideoClip(Path("b"), 0.0, readers["b"].times[10], "cat"),
        VideoClip(Path("c"), 0.0, None, "grass"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video_composer, "open_video", lambda path, **options: readers[str(path)])
        composer = video_composer.Composer(
            clips[:3:2], clips, size=(2, 2), min_gap=min_gap, event_seconds=event_seconds, speed=speed, flip=flip
        )
    roomy = composer.plan(200.0, seed, number=number)
    needed = sum(event.end - event.start for event in roomy.events) + number * min_gap
    frame = max(steps) / (speed[0] if isinstance(speed, tuple) else speed)
    for video, seconds in ((roomy, 200.0), (composer.plan(needed + slack, seed, number=number), needed + slack)):
        assert seconds - 1e-3 <= video.duration < seconds + frame + 1e-3
        assert len(video.events) == number
        least = min_gap if seconds - needed > (number + 1) * frame else max(min_gap - frame, 0.0)
        edges = [0.0, *itertools.chain.from_iterable((e.start, e.end) for e in video.events)]
        assert all(b - a >= least - 1e-6 for a, b in zip(edges[::2], edges[1::2], strict=False))
        identities = [(key.split()[0], own) for key, own in video.identities(np.arange(len(video)))]
        planted = set()
        for event in video.events:
            name, own = {"bird": ("a", range(whole)), "cat": ("b", range(10))}[event.label]
            places = range(event.first, event.stop)
            assert all(identities[place][0] == name and identities[place][1] in own for place in places)
            assert (video.times[event.first], event.label) == (pytest.approx(event.start), event.label)
            planted |= set(places)
            if event_seconds is not None:
                low, high = event_seconds if isinstance(event_seconds, tuple) else (event_seconds,) * 2
                assert low - frame - 1e-3 <= event.end - event.start <= high + 2 * frame + 1e-3
        beside = {identities[place] for place in range(len(video)) if place not in planted}
        labels = {event.label for event in video.events}
        assert not beside & {("a", i) for i in range(whole) if "bird" in labels}
        assert not beside & {("b", i) for i in range(10) if "cat" in labels}
        assert not beside & {("a", i) for i in range(whole, 40) if "cat" in labels}  # which the sky shows
        assert (np.diff(video.times) > 0).all() and video.times[0] == 0 and video.times[-1] < video.duration
        assert video.index_at(video.times).tolist() == list(range(len(video)))
        with pytest.raises(UserError, match="do not fit"):
            composer.plan(needed * 0.9 - 0.01, seed, number=number) if needed > 1 else composer.plan(0.1, 0, number=50)


@examples(15)
@given(
    kinds=st.integers(1, 3), negatives=st.sampled_from([0.0, 0.5, 0.99]), seed=st.integers(0, 10**6),
    fps=st.sampled_from([1.0, 2.0, 10.0]), seconds=st.sampled_from([8.0, 20.0]),
)  # fmt: skip
@example(kinds=1, negatives=0.99, seed=0, fps=2.0, seconds=8.0)  # of one label, no window could be without it
def test_windows_to_train_on_show_their_query_where_they_say(
    kinds: int, negatives: float, seed: int, fps: float, seconds: float
) -> None:
    readers = {name: Reader(name, [0.1] * 40) for name in "abcg"}
    clips = [VideoClip(Path(name), 0.0, None, f"label {name}") for name in "abc"[:kinds]]
    footage = [VideoClip(Path("g"), 0.0, None, "grass")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video_composer, "open_video", lambda path, **options: readers[str(path)])
        composer = video_composer.Composer(
            clips, footage, min_gap=0.5, events_per_video=(0, 1), event_seconds=(1.0, 3.0)
        )
    # a frame's vector says which clip it is of
    bank = SimpleNamespace(
        at=lambda video, indices: np.array(
            [[float(key.split()[0] == name) for name in "abcg"] for key, _ in video.identities(indices)], np.float32
        )
    )
    queries = {clip.label: np.full(1, place, np.float32) for place, clip in enumerate(clips)}
    windows = ComposedWindows(composer, bank, queries, seconds=seconds, fps=fps, negatives=negatives, seed=seed)
    batch, later = windows[np.arange(6)], windows[np.arange(3, 6)]
    for key in ("query", "inside"):
        width = later[key].shape[1]
        assert torch.equal(batch[key][3:, :width], later[key])  # whatever else is in the batch
    for row in range(6):
        real = batch["mask"][row]
        shown = batch["features"][row, real, int(batch["query"][row, 0])]
        assert torch.equal(shown, batch["inside"][row, real])
        assert not batch["inside"][row, ~real].any() and (batch["times"][row, real].diff() > 0).all()
        first, last = batch["edges"][row, real].unbind(-1)
        assert not batch["edges"][row, ~real].any()
        change = torch.nn.functional.pad(shown, (1, 1)).diff()
        assert torch.equal(first > 0, change[:-1] > 0) and torch.equal(last > 0, change[1:] < 0)
        assert first.sum() == last.sum() == pytest.approx(float(shown.any()))


# composed recordings --------------------------------------------------------------------------------------------------

RATE = 1000


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], list[Any]]:
    """Clips of two labels and backgrounds, one of them with silence in it."""
    soundfile = pytest.importorskip("soundfile", reason="needs seqzoo[audio]")
    from seqzoo.pipelines.audio.backgrounds import Background
    from seqzoo.pipelines.audio.clips import Clip

    folder, rng = tmp_path_factory.mktemp("sounds"), np.random.default_rng(0)
    clips, backgrounds = [], []
    for number, (label, length) in enumerate([("x", 150), ("x", 400), ("y", 60), ("y", 900)]):
        soundfile.write(folder / f"{number}.wav", 0.5 * rng.standard_normal(length).clip(-1, 1), RATE, subtype="FLOAT")
        clips.append(Clip(folder / f"{number}.wav", 0.0, None, label))
    for name, length, quiet in (("a", 9000, 0), ("b", 4000, 2500)):
        noise = 0.2 * rng.standard_normal(length)
        noise[:quiet] = 0
        soundfile.write(folder / f"{name}.wav", noise, RATE, subtype="FLOAT")
        backgrounds.append(Background(folder / f"{name}.wav", RATE))
    return clips, backgrounds


@examples(25)
@given(
    seconds=st.floats(1.0, 12.0), per_minute=st.sampled_from([0.0, 10.0, 60.0, 300.0]), overlap=st.booleans(),
    min_gap=st.sampled_from([0.0, 0.1]), snr_db=st.sampled_from([0.0, 45.0, (-10.0, 30.0)]),
    speed=st.sampled_from([1.0, (0.7, 1.4)]), crossfade=st.sampled_from([0.001, 0.3]),
    seed=st.integers(0, 10**6), draw=RANDOM,
)  # fmt: skip
def test_composed_recordings_are_what_was_mixed(
    seconds: float, per_minute: float, overlap: bool, min_gap: float, snr_db: Any, speed: Any, crossfade: float,
    seed: int, draw: random.Random, sounds: tuple[list[Any], list[Any]],
) -> None:  # fmt: skip
    from seqzoo.pipelines.audio.composer import PEAK, SILENCE, Composer

    composer = Composer(
        *sounds, sample_rate=RATE, snr_db=snr_db, events_per_minute=per_minute, overlap=overlap, min_gap=min_gap,
        speed=speed, crossfade=crossfade, piece_seconds=(0.5, 3.0),
    )  # fmt: skip
    try:
        plan = composer.plan(seconds, [seed])
    except UserError as error:
        assert "do not fit" in str(error) or "more than the recording" in str(error)
        return
    frames, gap = plan.frames, round(min_gap * RATE)
    assert frames == round(seconds * RATE)
    # pieces follow each other over all of it
    assert plan.pieces[0].start == 0 and plan.pieces[-1].stop - composer.fade >= frames
    for before, after in itertools.pairwise(plan.pieces):
        assert after.start == before.stop - composer.fade
    for piece in plan.pieces:
        assert piece.offset >= 0 and piece.offset + piece.stop - piece.start <= len(plan.backgrounds[piece.source])
    # events are in it, in order, and apart
    assert all(0 <= event.start < event.stop <= frames for event in plan.events)
    assert [event.start for event in plan.events] == sorted(event.start for event in plan.events)
    for label in "xy" if overlap else ("",):
        own = [event for event in plan.events if label in ("", event.label)]
        assert all(b.start - a.stop >= gap for a, b in itertools.pairwise(own))
    assert plan.truth() == [(event.start / RATE, event.stop / RATE, event.label) for event in plan.events]
    # the samples are the mixture, each event as loud as is said
    behind = plan.background(0, frames)
    mixed = behind.astype(np.float64)
    low, high = snr_db if isinstance(snr_db, tuple) else (snr_db, snr_db)
    for event in plan.events:
        sound = event.planted.sound(plan.bank).astype(np.float64) * event.gain
        assert len(sound) == event.stop - event.start and plan.bank.clips[event.planted.clip].label == event.label
        mixed[event.start : event.stop] += sound
        noise = max((behind[event.start : event.stop].astype(np.float64) ** 2).sum(), SILENCE * len(sound))
        assert low <= event.snr_db <= high
        assert 10 * np.log10((sound**2).sum() / noise) == pytest.approx(event.snr_db, abs=1e-3)
    samples = plan.samples()
    np.testing.assert_allclose(samples, mixed * plan.gain, rtol=0, atol=1e-5)
    assert np.abs(samples).max() <= PEAK + 1e-5 and 0 < plan.gain <= 1
    for _ in range(3):
        start = draw.randint(0, frames - 1)
        stop = draw.randint(start + 1, frames)
        np.testing.assert_array_equal(plan.samples(start, stop), samples[start:stop])
