"""Composed recordings: what is planted where and how loud, any window as the whole, files and tables, bad input."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

soundfile = pytest.importorskip("soundfile", reason="needs seqzoo[audio]")

from seqzoo.pipelines.audio.backgrounds import BLOCK, GUARD, Background, cut_backgrounds  # noqa: E402
from seqzoo.pipelines.audio.clips import Clip  # noqa: E402
from seqzoo.pipelines.audio.composer import PEAK, Composer, Composition, compose_recording  # noqa: E402
from seqzoo.pipelines.audio.reader import AudioReader  # noqa: E402
from seqzoo.pipelines.audio.sounds import EDGE, SoundBank, at_speed, equalize, trim_silence  # noqa: E402
from seqzoo.pipelines.audio.sources import table_clips  # noqa: E402
from seqzoo.pipelines.errors import UserError  # noqa: E402

RATE = 8000
OPTIONS: dict[str, Any] = {"sample_rate": RATE, "events_per_minute": 40.0, "piece_seconds": (1.5, 4.0)}


def write(path: Path, samples: np.ndarray, rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples.astype(np.float32), rate, subtype="FLOAT")
    return path


def tone(seconds: float, hertz: float, rate: int = RATE) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two backgrounds, one at another rate, and clips of two labels with silence around them."""
    folder, rng = tmp_path_factory.mktemp("composer"), np.random.default_rng(0)
    write(folder / "backgrounds" / "noise.wav", 0.1 * rng.standard_normal(20 * RATE))
    write(folder / "backgrounds" / "wide.wav", 0.05 * rng.standard_normal(12 * 2 * RATE), 2 * RATE)
    for number in range(3):
        for label, hertz in (("low", 300), ("high", 900)):
            sound = tone(0.2 + 0.1 * number, hertz + 20 * number)
            silent = np.zeros(RATE // 10)
            write(folder / "clips" / f"{label}_{number}.wav", np.concatenate((silent, sound, silent)))
    return folder


@pytest.fixture(scope="module")
def clips(root: Path) -> list[Clip]:
    return [Clip(p, 0.0, None, p.stem.split("_")[0]) for p in sorted((root / "clips").iterdir())]


@pytest.fixture(scope="module")
def backgrounds(root: Path) -> list[Background]:
    return cut_backgrounds(root / "backgrounds", RATE)["train"]


@pytest.fixture
def composer(clips: list[Clip], backgrounds: list[Background]) -> Composer:
    return Composer(clips, backgrounds, snr_db=(-5, 25), **OPTIONS)


def db(ratio: float) -> float:
    return 10 * float(np.log10(ratio))


def energy(samples: np.ndarray) -> float:
    return float((samples.astype(np.float64) ** 2).sum())


# clips ----------------------------------------------------------------------------------------------------------------


def test_silence_is_trimmed_by_the_frame() -> None:
    loud, quiet = np.full(240, 0.5), np.full(240, 0.5 * 10 ** (-29 / 20))
    samples = np.concatenate((np.zeros(100), quiet, loud, np.zeros(300), quiet, np.full(160, 0.005)))
    # frames of 80: the first holds zeros alone, the second 60 samples of -29 dB, that is -30.2 dB
    found = trim_silence(samples, RATE)
    np.testing.assert_array_equal(found, samples[160:1120])
    np.testing.assert_array_equal(trim_silence(samples, RATE, down_db=31), samples[80:1120])
    np.testing.assert_array_equal(trim_silence(samples, RATE, down_db=50), samples[80:])
    np.testing.assert_array_equal(trim_silence(np.zeros(100), RATE), np.zeros(100))
    np.testing.assert_array_equal(trim_silence(np.ones(7), RATE), np.ones(7))


def test_a_clip_is_what_is_in_its_file_but_for_the_edges(root: Path, clips: list[Clip]) -> None:
    bank, edge = SoundBank(clips, RATE), round(EDGE * RATE)
    for number, clip in enumerate(clips):
        sound = bank.get(number)
        raw = AudioReader(clip.path).read()[800 : 800 + len(sound)]
        np.testing.assert_array_equal(sound[edge:-edge], raw[edge:-edge])
        np.testing.assert_allclose(sound[:3], raw[:3] * np.array([1, 2, 3]) / (edge + 1), rtol=1e-6)
        np.testing.assert_allclose(sound[-1], raw[-1] / (edge + 1), rtol=1e-6)
    assert [len(bank.get(number)) for number in range(3)] == [1600, 2400, 3200]


def test_speed_moves_pitch_and_length(clips: list[Clip]) -> None:
    sound = tone(1.0, 400)
    fast = at_speed(sound.astype(np.float32), 1.25)
    assert len(fast) == 6400
    assert np.abs(np.fft.rfft(fast)).argmax() == round(500 * 6400 / RATE)
    assert at_speed(sound, 1.0) is sound


def test_an_equalizer_has_its_gains_and_moves_nothing() -> None:
    gains = (0.0, 6.0, -6.0, 3.0)
    for hertz, expected in zip(np.geomspace(100, 4000, 4), gains, strict=True):
        sound = tone(1.0, float(hertz) - 40 * (hertz > 3999)) * np.hanning(RATE)
        found = equalize(sound.astype(np.float32), RATE, gains)
        assert len(found) == RATE
        # the last point is half the rate, where no tone is: a little below it lies on the line between
        near = expected if hertz < 3999 else float(np.interp(np.log(3960), np.log(np.geomspace(100, 4000, 4)), gains))
        assert db(energy(found) / energy(sound)) == pytest.approx(near, abs=0.2)
        lag = np.correlate(found[3000:5000], sound[3000:5000], "full").argmax() - 1999
        assert lag == 0
    click = np.zeros(RATE, np.float32)
    click[0] = 1.0
    assert np.abs(equalize(click, RATE, gains)[-100:]).max() < 1e-3  # what rings before the start is not at the end
    flat = equalize(sound.astype(np.float32), RATE, (0.0, 0.0))
    np.testing.assert_allclose(flat, sound, atol=1e-6)


def test_events_have_speeds_and_microphones_of_their_own(clips: list[Clip], backgrounds: list[Background]) -> None:
    plan = Composer(clips, backgrounds, speed=(0.8, 1.25), equalizer_db=6, **OPTIONS).plan(30, [0])
    assert len({event.planted.speed for event in plan.events}) > 4
    assert all(0.8 <= event.planted.speed <= 1.2501 for event in plan.events)
    gains = np.array([event.planted.gains_db for event in plan.events])
    assert gains.shape[1] == 6 and 5 < np.abs(gains).max() <= 6 and len(np.unique(gains)) == gains.size
    event = plan.events[0]
    bare = plan.bank.get(event.planted.clip, event.planted.speed)
    assert len(bare) == event.stop - event.start
    assert not np.allclose(event.planted.sound(plan.bank), bare, atol=1e-3)


# the plan -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_snr_and_spans_are_what_is_in_the_samples(
    clips: list[Clip], backgrounds: list[Background], overlap: bool
) -> None:
    options = {**OPTIONS, "events_per_minute": 90, "speed": (0.8, 1.25) if overlap else 1.0}
    composer = Composer(clips, backgrounds, snr_db=(-5, 25), overlap=overlap, equalizer_db=6.0 * overlap, **options)
    plan = composer.plan(30, [3])
    whole, bare = plan.samples(), plan.background(0, plan.frames)
    planted = whole.astype(np.float64) - bare.astype(np.float64) * np.float32(plan.gain)
    counts = np.zeros(plan.frames, dtype=int)
    for event in plan.events:
        counts[event.start : event.stop] += 1
    assert (counts.max() > 1) == overlap and len(plan.events) > 20
    alone = 0
    for event in plan.events:
        sound = event.planted.sound(composer.bank)
        assert event.stop - event.start == len(sound) and event.label == clips[event.planted.clip].label
        if counts[event.start : event.stop].max() == 1:
            alone += 1
            behind = energy(bare[event.start : event.stop])
            assert db(energy(np.float32(event.gain) * sound) / behind) == pytest.approx(event.snr_db, abs=1e-3)
            # float32 sums: of the loudest sample
            rest = planted[event.start : event.stop] - np.float64(plan.gain) * event.gain * sound
            assert np.abs(rest).max() < 1e-6
            measured = db(energy(planted[event.start : event.stop]) / (behind * plan.gain**2))
            assert measured == pytest.approx(event.snr_db, abs=1e-3)
    assert alone > 5
    np.testing.assert_array_equal(whole[counts == 0], (bare * np.float32(plan.gain))[counts == 0])
    assert np.abs(whole).max() <= 1
    snrs = [event.snr_db for event in plan.events]
    assert -5 <= min(snrs) < 3 and 17 < max(snrs) <= 25


@pytest.mark.parametrize("overlap", [False, True])
def test_windows_are_the_whole_to_the_last_bit(clips: list[Clip], backgrounds: list[Background], overlap: bool) -> None:
    options = {**OPTIONS, "events_per_minute": 90, "speed": (0.8, 1.25), "equalizer_db": 6.0}
    plan = Composer(clips, backgrounds, overlap=overlap, **options).plan(11.3, [1])
    assert len(plan.pieces) > 3 and BLOCK < 20 * RATE  # windows begin within blocks, pieces and fades
    whole = plan.samples()
    for size in (1, 777, 40001):
        starts = range(0, plan.frames, size) if size > 1 else range(3000, 3050)
        parts = [plan.samples(start, min(start + size, plan.frames)) for start in starts]
        expected = whole if size > 1 else whole[3000:3050]
        np.testing.assert_array_equal(np.concatenate(parts), expected)


def test_the_seed_is_the_recording(clips: list[Clip], root: Path, composer: Composer) -> None:
    plan = composer.plan(8, [5, 6])
    fresh = Composer(clips, cut_backgrounds(root / "backgrounds", RATE)["train"], snr_db=(-5, 25), **OPTIONS)
    fresh.plan(3, [1])  # what was planned before has no influence
    again = fresh.plan(8, [5, 6])
    assert again.events == plan.events and again.pieces == plan.pieces and again.gain == plan.gain
    np.testing.assert_array_equal(again.samples(), plan.samples())
    assert composer.plan(8, [5, 7]).events != plan.events


def test_another_snr_moves_nothing(composer: Composer) -> None:
    loud, soft = composer.plan(20, [2], snr_db=20), composer.plan(20, [2], snr_db=0)
    assert [event[:4] for event in loud.events] == [event[:4] for event in soft.events]
    assert loud.pieces == soft.pieces and len(loud.events) > 5
    for one, other in zip(loud.events, soft.events, strict=True):
        assert (one.snr_db, other.snr_db) == (20, 0)
        assert one.gain / other.gain == pytest.approx(10, rel=1e-6)


def test_events_keep_their_distance_and_fill_the_time(clips: list[Clip], backgrounds: list[Background]) -> None:
    composer = Composer(clips, backgrounds, min_gap=0.3, **OPTIONS)
    starts = []
    for seed in range(40):
        plan = composer.plan(6, [seed])
        for before, after in itertools.pairwise(plan.events):
            assert after.start - before.stop >= 0.3 * RATE
        assert all(event.start >= 0 and event.stop <= plan.frames for event in plan.events)
        starts += [event.start / plan.frames for event in plan.events]
    # 40 a minute in 40 recordings of 6 seconds: 160, Poisson
    assert 110 < len(starts) < 210
    assert 0.35 < np.mean(starts) < 0.6 and min(starts) < 0.05 and max(starts) > 0.85


def test_overlapping_events_are_of_different_labels(clips: list[Clip], backgrounds: list[Background]) -> None:
    composer = Composer(clips, backgrounds, overlap=True, min_gap=0.1, **{**OPTIONS, "events_per_minute": 200})
    plan = composer.plan(20, [0])
    by_label: dict[str, list[tuple[int, int]]] = {}
    for event in plan.events:
        by_label.setdefault(event.label, []).append((event.start, event.stop))
    assert len(by_label) == 2
    for spans in by_label.values():
        for (_, stop), (start, _) in itertools.pairwise(sorted(spans)):
            assert start - stop >= 0.1 * RATE
    assert plan.events == sorted(plan.events)


def test_pieces_are_joined_without_clicks(backgrounds: list[Background], clips: list[Clip], tmp_path: Path) -> None:
    constant = Background(write(tmp_path / "one.wav", np.full(5 * RATE, 0.25)), RATE)
    composer = Composer(clips, [constant], **{**OPTIONS, "events_per_minute": 0, "level_db": -20, "crossfade": 0.25})
    plan = composer.plan(9, [0])
    found, fade = plan.samples(), round(0.25 * RATE)
    assert plan.events == [] and len(plan.pieces) > 2
    for before, after in itertools.pairwise(plan.pieces):
        assert after.start == before.stop - fade
    # equal power: where two meet, the squares of their weights add up to 1, and a constant to at most the root of 2
    inside = np.ones(plan.frames, dtype=bool)
    for piece in plan.pieces[1:]:
        inside[piece.start : piece.start + fade] = False
        middle = found[min(piece.start + fade // 2, plan.frames - 1)]
        if piece.start + fade // 2 < plan.frames:
            assert middle == pytest.approx(0.1 * 2**0.5, rel=1e-3)
    np.testing.assert_allclose(found[inside], 0.1, rtol=1e-6)
    assert np.abs(np.diff(found)).max() < 0.1 * 2 / fade * np.pi / 2


def test_level_of_a_piece(clips: list[Clip], backgrounds: list[Background]) -> None:
    composer = Composer(clips, backgrounds, **{**OPTIONS, "events_per_minute": 0, "level_db": (-40, -30)})
    plan = composer.plan(12, [0])
    for piece in plan.pieces:
        power, peak = backgrounds[piece.source].statistics
        assert -40 <= db(piece.gain**2 * power) <= -30
        part = backgrounds[piece.source].read(0, len(backgrounds[piece.source]))
        assert power == pytest.approx(energy(part) / len(part)) and peak == np.abs(part).max()


def test_loud_recordings_are_lowered_as_a_whole(clips: list[Clip], backgrounds: list[Background]) -> None:
    composer = Composer(clips, backgrounds, snr_db=40, **{**OPTIONS, "level_db": -20})
    plan = composer.plan(10, [0])
    assert plan.gain < 0.5
    assert 0.5 < np.abs(plan.samples()).max() <= PEAK


def test_what_is_silent_counts_as_a_quiet_background(clips: list[Clip], tmp_path: Path) -> None:
    silent = Background(write(tmp_path / "silent.wav", np.zeros(3 * RATE)), RATE)
    plan = Composer(clips, [silent], snr_db=10, **OPTIONS).plan(5, [1])
    assert plan.events
    for event in plan.events:
        heard = plan.samples(event.start, event.stop)
        assert db(energy(heard) / len(heard)) == pytest.approx(-80 + 10, abs=1e-3)


# splits ---------------------------------------------------------------------------------------------------------------


def test_backgrounds_of_the_splits_share_no_sample(root: Path) -> None:
    parts = cut_backgrounds(root / "backgrounds", RATE, (0.5, 0.25, 0.25))
    for number in range(2):
        spans = [(parts[split][number].start, parts[split][number].stop) for split in ("train", "val", "test")]
        guard = round(GUARD * RATE)
        assert all(after[0] - before[1] == guard for before, after in itertools.pairwise(spans))
        assert spans[0][0] == 0 and spans[-1][1] == (20, 12)[number] * RATE
        assert spans[0][1] == (20, 12)[number] * RATE // 2
        assert len({parts[split][number].name for split in parts}) == 1


def test_a_background_reads_its_part(root: Path) -> None:
    part = cut_backgrounds(root / "backgrounds", RATE)["test"][0]
    whole = AudioReader(root / "backgrounds" / "noise.wav").read()
    np.testing.assert_array_equal(part.read(0, len(part)), whole[part.start : part.stop])
    np.testing.assert_array_equal(part.read(17, 1234), whole[part.start + 17 : part.start + 1234])


def test_a_file_that_was_written_anew_is_another(tmp_path: Path) -> None:
    path = write(tmp_path / "b.wav", np.full(2 * RATE, 0.1))
    assert Background(path, RATE).read(0, 1)[0] == np.float32(0.1)
    write(path, np.full(2 * RATE + 1, 0.3))
    assert Background(path, RATE).read(0, 1)[0] == np.float32(0.3)


# files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_a_written_recording_and_its_table(
    clips: list[Clip], backgrounds: list[Background], tmp_path: Path, kind: str
) -> None:
    path = tmp_path / f"long.{kind}"
    plan = compose_recording(path, clips, backgrounds, minutes=0.4, seed=9, snr_db=10, **OPTIONS)
    assert isinstance(plan, Composition) and plan.seconds == 24
    info = soundfile.info(path)
    assert (info.samplerate, info.frames, info.channels) == (RATE, 24 * RATE, 1)
    stored = AudioReader(path).read()
    np.testing.assert_allclose(stored, plan.samples(), atol=1.01 / 2**15)
    with (tmp_path / "long.csv").open() as table:
        assert next(csv.reader(table)) == ["path", "start", "end", "label"]
    rows = table_clips(tmp_path / "long.csv")
    assert [row.path for row in rows] == [path] * len(plan.events)
    found = [(round(row.start * RATE), round((row.end or 0) * RATE), row.label) for row in rows]
    assert found == [(event.start, event.stop, event.label) for event in plan.events]
    elsewhere = plan.write(path, tmp_path / "tables" / "truth.csv") if (tmp_path / "tables").mkdir() is None else None
    assert elsewhere is not None and table_clips(elsewhere)[0].path == path


def test_a_written_recording_is_never_whole_in_memory(
    clips: list[Clip], backgrounds: list[Background], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    render = Composition.samples

    def samples(self: Composition, start: int = 0, stop: int | None = None) -> np.ndarray:
        asked.append((start, stop))
        return render(self, start, stop)

    monkeypatch.setattr(Composition, "samples", samples)
    compose_recording(tmp_path / "a.wav", clips, backgrounds, minutes=0.6, **OPTIONS)
    assert asked == [(start, min(start + 10 * RATE, 36 * RATE)) for start in range(0, 36 * RATE, 10 * RATE)]


# bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"snr_db": float("nan")}, r"snr_db=nan must be a number, or two in order"),
        ({"snr_db": "loud"}, r"snr_db='loud' must be a number"),
        ({"snr_db": (20, 0)}, r"snr_db=\(20, 0\) must be a number, or two in order"),
        ({"snr_db": [0, None]}, r"snr_db=\[0, None\] must be"),
        ({"events_per_minute": -1}, r"events_per_minute=-1 must be a number of at least 0"),
        ({"min_gap": float("inf")}, r"min_gap=inf must be"),
        ({"speed": 0}, r"speed=0 must be above 0"),
        ({"equalizer_db": -1}, r"equalizer_db=-1 must be a number of at least 0"),
        ({"crossfade": 8.0}, r"noise.wav.* must be at 8000 Hz and have at least two crossfades, 128000 frames"),
        ({"sample_rate": 16000}, r"must be at 16000 Hz"),
    ],
)
def test_options_that_cannot_be(
    clips: list[Clip], backgrounds: list[Background], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Composer(clips, backgrounds, **{**OPTIONS, **options})


def test_nothing_to_plant_or_to_plant_into(clips: list[Clip], backgrounds: list[Background]) -> None:
    with pytest.raises(UserError, match="no clips to plant"):
        Composer([], backgrounds, **OPTIONS)
    with pytest.raises(UserError, match="no backgrounds"):
        Composer(clips, [], **OPTIONS)


def test_a_clip_longer_than_the_recording(clips: list[Clip], backgrounds: list[Background]) -> None:
    composer = Composer(clips[2:3], backgrounds, **{**OPTIONS, "events_per_minute": 6000})
    with pytest.raises(UserError, match=r"high_2.wav has 0.4 seconds of sound, more than the recording of 0.3"):
        composer.plan(0.3, [0])
    with pytest.raises(UserError, match="seconds=0 must be at least one sample"):
        composer.plan(0, [0])
    with pytest.raises(UserError, match=r"events_per_minute=6000 of 0.4 seconds .* do not fit one after the other"):
        composer.plan(2, [0])


def test_a_silent_clip(backgrounds: list[Background], tmp_path: Path) -> None:
    clip = Clip(write(tmp_path / "s.wav", np.zeros(800)), 0.0, None, "a", where="table.csv, line 7")
    with pytest.raises(UserError, match=r"table\.csv, line 7 is silent"):
        Composer([clip], backgrounds, **{**OPTIONS, "events_per_minute": 6000}).plan(1, [0])


def test_backgrounds_that_are_not_there(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such folder of backgrounds: .*background\. Did you mean backgrounds\?"):
        cut_backgrounds(root / "background", RATE)
    with pytest.raises(UserError, match="has no audio file; long recordings are expected"):
        cut_backgrounds(tmp_path, RATE)
    with pytest.raises(
        UserError, match=r"no recording is long enough for val, which needs 6 seconds of a part of 0.15"
    ):
        cut_backgrounds(root / "backgrounds", RATE, least=6)
    with pytest.raises(UserError, match="must be three parts"):
        cut_backgrounds(root / "backgrounds", RATE, (1.0, 0.0))


def test_only_wav_and_flac_are_written(composer: Composer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"give the name of a \.wav or \.flac file"):
        composer.plan(1, [0]).write(tmp_path / "a.mp3")
    with pytest.raises(UserError, match="frames 5 to 5 are not within its 8000"):
        composer.plan(1, [0]).samples(5, 5)
