"""Augmentation: exact decibels, masks within their bounds, labels, and nothing where there is nothing to do."""

import math

import pytest
import torch

from seqzoo.pipelines.audio.augment import (
    add_noise,
    fit_length,
    mix_clips,
    random_gain,
    random_shift,
    random_speed,
    spec_augment,
)
from seqzoo.pipelines.errors import UserError

LENGTHS = torch.tensor([40, 25, 1, 0])
PADS = torch.arange(40) >= LENGTHS.unsqueeze(1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def samples(dtype=torch.float64):
    """Four rows of different lengths, NaN beyond them."""
    return torch.randn(4, 40, generator=seeded(7), dtype=dtype).masked_fill(PADS, math.nan)


def labels():
    return torch.eye(4, dtype=torch.float64)


CALLS = {
    "gain": lambda x, g, n: random_gain(x, generator=g, low_db=-6, high_db=6, lengths=n),
    "noise": lambda x, g, n: add_noise(x, generator=g, snr_db=3.0, lengths=n),
    "mix": lambda x, g, n: mix_clips(x, labels(), generator=g, alpha=0.5, lengths=n)[0],
    "shift": lambda x, g, n: random_shift(x, generator=g, max_shift=9, lengths=n)[0],
    "roll": lambda x, g, n: random_shift(x, generator=g, max_shift=9, lengths=n, wrap=True)[0],
    "spectrum": lambda x, g, n: spec_augment(
        x.unsqueeze(2).expand(-1, -1, 3), generator=g, lengths=n, max_time=9, max_freq=2
    )[..., 0],
}
NOTHING = {
    "gain": lambda x, g: random_gain(x, generator=g, low_db=0, high_db=0, lengths=LENGTHS),
    "noise": lambda x, g: add_noise(x, generator=g, snr_db=math.inf, lengths=LENGTHS),
    "mix": lambda x, g: mix_clips(x, labels(), generator=g, alpha=0, lengths=LENGTHS)[0],
    "shift": lambda x, g: random_shift(x, generator=g, max_shift=0, lengths=LENGTHS)[0],
    "roll": lambda x, g: random_shift(x, generator=g, max_shift=0, lengths=LENGTHS, wrap=True)[0],
    "no masks": lambda x, g: spec_augment(
        x.unsqueeze(2), generator=g, lengths=LENGTHS, num_time_masks=0, num_freq_masks=0
    )[..., 0],
    "no width": lambda x, g: spec_augment(x.unsqueeze(2), generator=g, lengths=LENGTHS, max_time=0, max_freq=0)[..., 0],
    "no share": lambda x, g: spec_augment(x.unsqueeze(2), generator=g, lengths=LENGTHS, max_time_share=0.0, max_freq=0)[
        ..., 0
    ],
}


def same(a, b):
    return torch.equal(a.nan_to_num(12345.0), b.nan_to_num(12345.0))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pads_stay_and_do_no_harm(name, dtype):
    """Real samples never become NaN from the NaN beyond, which stays; and something happens to most rows."""
    x = samples(dtype)
    kept, y = x.clone(), CALLS[name](x, seeded(), LENGTHS)
    assert y.dtype == dtype and y.shape == x.shape
    assert same(x, kept)
    assert y[PADS].isnan().all() and not y[~PADS].isnan().any()
    assert (y[:2] != x[:2])[~PADS[:2]].any()
    finite = CALLS[name](x.masked_fill(PADS, 9.0), seeded(), LENGTHS)
    assert (finite[PADS] == 9).all() and torch.equal(finite[~PADS], y[~PADS])


@pytest.mark.parametrize("name", CALLS)
def test_the_generator_alone_decides(name):
    x = samples()
    torch.manual_seed(1)
    first = CALLS[name](x, seeded(3), LENGTHS)
    torch.manual_seed(2)
    assert same(CALLS[name](x, seeded(3), LENGTHS), first)
    assert not all(same(CALLS[name](x, seeded(s), LENGTHS), first) for s in range(4, 9))
    before = torch.get_rng_state()
    CALLS[name](x, seeded(3), LENGTHS)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", NOTHING)
def test_strength_zero_is_the_identity(name):
    assert same(NOTHING[name](samples(), seeded()), samples())


@pytest.mark.parametrize("snr", [-10.0, 0.0, 12.5, 60.0])
@pytest.mark.parametrize("own_noise", [True, False])
def test_the_signal_to_noise_ratio_is_exact(snr, own_noise):
    """Over the real samples of each row; the noise added is a multiple of the noise given."""
    x = samples()
    noise = torch.randn(4, 40, generator=seeded(5)).double() if own_noise else None
    y = add_noise(x, generator=seeded(), snr_db=snr, noise=noise, lengths=LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()[:3]):
        added = (y - x)[row, :length]
        got = 10 * math.log10(float(x[row, :length].square().sum() / added.square().sum()))
        assert abs(got - snr) < 1e-9
        if own_noise:
            factor = added / noise[row, :length]
            torch.testing.assert_close(factor, factor[:1].expand(length), atol=1e-12, rtol=1e-9)


def test_a_ratio_for_each_row_and_silence():
    x = samples().nan_to_num(0.0)
    x[2] = 0
    y = add_noise(x, generator=seeded(), snr_db=torch.tensor([0.0, 20.0, 0.0, math.inf]))
    energy = x.square().sum(1) / (y - x).square().sum(1)
    torch.testing.assert_close(energy[:2], torch.tensor([1.0, 100.0]).double(), atol=1e-9, rtol=0)
    assert torch.equal(y[2:], x[2:])  # a silent row has no ratio
    silent = torch.zeros(4, 40)
    assert torch.equal(add_noise(x, generator=seeded(), snr_db=0.0, noise=silent), x)


def test_gain_is_uniform_in_decibels():
    x = torch.ones(4000, 2, dtype=torch.float64)
    db = 20 * random_gain(x, generator=seeded(), low_db=-20, high_db=10).log10()
    assert torch.equal(db[:, 0], db[:, 1])
    assert -20 <= db.min() < -19.9 and 9.9 < db.max() <= 10
    assert abs(float(db.mean()) + 5) < 0.5
    assert torch.allclose(random_gain(x, generator=seeded(), low_db=-20, high_db=-20), torch.tensor(0.1).double())


def test_masks_are_runs_within_their_bounds():
    """Over many draws: one run each, of 0 to the largest width, at every place, in frames and bands that are real."""
    x, lengths = torch.ones(3000, 12, 8), torch.full((3000,), 9)
    y = spec_augment(x, generator=seeded(), lengths=lengths, num_time_masks=1, max_time=4, num_freq_masks=0)
    hidden = (y == 0).all(2)
    assert torch.equal(hidden, (y == 0).any(2)) and not hidden[:, 9:].any()
    edges = torch.nn.functional.pad(hidden.int(), (1, 1)).diff(dim=1)
    assert ((edges == 1).sum(1) <= 1).all()
    widths = hidden.sum(1).bincount(minlength=5)
    assert len(widths) == 5 and (widths - 600).abs().max() < 100
    starts = {(int(w), int(s)) for w, s in zip(hidden.sum(1), hidden.int().argmax(1), strict=True) if w}
    assert starts == {(w, s) for w in range(1, 5) for s in range(9 - w + 1)}
    y = spec_augment(x, generator=seeded(), num_time_masks=0, num_freq_masks=1, max_freq=8, fill=-1.0)
    bands = (y == -1).all(1)
    assert torch.equal(bands, (y == -1).any(1))
    assert set(bands.sum(1).tolist()) == set(range(9))


def test_a_time_mask_is_at_most_a_share_of_the_row():
    x, lengths = torch.ones(500, 40, 4), torch.randint(0, 41, (500,), generator=seeded(2))
    y = spec_augment(
        x, generator=seeded(), lengths=lengths, num_time_masks=1, max_time=100, max_time_share=0.25, num_freq_masks=0
    )
    widths = (y == 0).all(2).sum(1)
    assert (widths <= lengths // 4).all() and widths.max() >= 9


@pytest.mark.parametrize("rule", ["weighted", "union"])
def test_mixing_keeps_samples_and_labels_together(rule):
    """From one-hot clips: the weights are in the samples, and the labels have the same ones or both in full."""
    x = torch.eye(7, dtype=torch.float64)
    y, mixed = mix_clips(x, x, generator=seeded(), alpha=1.0, rule=rule)
    torch.testing.assert_close(y.sum(1), torch.ones(7).double(), atol=1e-12, rtol=0)
    assert (y.diag() >= 0.5).all() and ((y > 0).sum(1) == 2).all()
    partners = (y - torch.diag(y.diag())).argmax(1)
    assert sorted(partners.tolist()) == list(range(7))
    assert torch.equal(mixed, y if rule == "weighted" else (y > 0).double())


def test_weights_are_those_of_the_folded_beta():
    """E max(w, 1 - w) is 3/4 for the uniform Beta(1, 1); a small alpha leaves clips almost as they are."""
    x = torch.eye(2000)
    for alpha, want, close in ((1.0, 0.75, 0.02), (0.05, 0.97, 0.02), (50.0, 0.54, 0.02)):
        y, _ = mix_clips(x, x, generator=seeded(), alpha=alpha)
        assert abs(float(y.diag().mean()) - want) < close


def test_a_mixed_row_keeps_its_length():
    x = samples()
    y, _ = mix_clips(x, labels(), generator=seeded(), alpha=1.0, lengths=LENGTHS)
    whole, _ = mix_clips(x.nan_to_num(0.0), labels(), generator=seeded(), alpha=1.0)
    assert torch.equal(y[~PADS], whole[~PADS])


@pytest.mark.parametrize("wrap", [True, False])
def test_a_shift_moves_by_what_it_says(wrap):
    x = torch.arange(1.0, 41.0).repeat(64, 1)
    lengths = torch.arange(64) % 41
    y, shift = random_shift(x, generator=seeded(), max_shift=6, lengths=lengths, wrap=wrap)
    assert set(shift.tolist()) == set(range(-6, 7))
    for row, (length, s) in enumerate(zip(lengths.tolist(), shift.tolist(), strict=True)):
        real = x[row, :length].tolist()
        for t in range(length):
            source = (t - s) % length if wrap else t - s
            assert y[row, t] == (real[source] if 0 <= source < length else 0)
        assert torch.equal(y[row, length:], x[row, length:])


def test_noise_of_any_length_fits():
    noise = torch.arange(5.0).repeat(200, 1)
    y = fit_length(noise, 12, generator=seeded())
    assert y.shape == (200, 12) and set(y[:, 0].tolist()) == set(range(5))
    assert torch.equal(y, (y[:, :1] + torch.arange(12)) % 5)
    assert torch.equal(fit_length(noise[:, :1], 3, generator=seeded()), torch.zeros(200, 3))


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda x: spec_augment(x.unsqueeze(2), generator=seeded()),
            "max_freq=27 is above the 1 bands; the largest is 1",
        ),
        (lambda x: spec_augment(x, generator=seeded()), r"expected \(B, L, D\)"),
        (lambda x: spec_augment(x.unsqueeze(2), generator=seeded(), max_time=-1), "max_time=-1"),
        (lambda x: spec_augment(x.unsqueeze(2), generator=seeded(), max_time_share=1.5), "max_time_share=1.5"),
        (lambda x: random_gain(x, generator=seeded(), low_db=1, high_db=0), "low_db=1 must not be above high_db=0"),
        (lambda x: random_gain(x.long(), generator=seeded(), low_db=0, high_db=0), "torch.int64"),
        (lambda x: random_gain(x, generator=seeded(), low_db=0, high_db=0, lengths=LENGTHS[:2]), r"expected \(4,\)"),
        (
            lambda x: random_gain(x, generator=seeded(), low_db=0, high_db=0, lengths=LENGTHS + 1),
            "41, but rows have 40",
        ),
        (lambda x: add_noise(x, generator=seeded(), snr_db=math.nan), "snr_db=nan"),
        (lambda x: add_noise(x, generator=seeded(), snr_db=-math.inf), "snr_db=-inf"),
        (lambda x: add_noise(x, generator=seeded(), snr_db=torch.zeros(3)), "one for each of the 4 rows"),
        (lambda x: add_noise(x, generator=seeded(), snr_db=0.0, noise=x[:, :3]), "see fit_length"),
        (lambda x: fit_length(x[:, :0], 5, generator=seeded()), "no samples"),
        (lambda x: mix_clips(x, labels(), generator=seeded(), alpha=-1), "alpha=-1"),
        (lambda x: mix_clips(x, labels().long(), generator=seeded(), alpha=1), "torch.int64"),
        (lambda x: mix_clips(x, labels(), generator=seeded(), alpha=1, rule="unoin"), "Did you mean union"),
        (lambda x: random_shift(x, generator=seeded(), max_shift=-1), "max_shift=-1"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(UserError, match=message):
        call(torch.zeros(4, 40))


def test_speed_plays_a_tone_faster_with_its_pitch():
    """x(v t) of a sine is a sine of v times its frequency; v follows from the new length to one part in thousands."""
    time = torch.arange(8000, dtype=torch.float64) / 8000
    samples = torch.sin(2 * torch.pi * 300 * time).repeat(4, 1)
    lengths = torch.tensor([8000, 5000, 1, 0])
    heard, own = random_speed(samples, generator=seeded(), low=0.8, high=1.25, lengths=lengths)
    assert heard.shape == (4, int(own.max())) and own[2:].tolist() == [1, 0]
    for row in range(2):
        number, length = int(own[row]), int(lengths[row])
        slow, fast = (length - 1) / number, (length - 1) / (number - 1)  # floor((n - 1) / v) + 1 = number
        place = torch.arange(50, dtype=torch.float64) / 8000
        error = min(
            float((heard[row, :50] - torch.sin(2 * torch.pi * 300 * v * place)).abs().max())
            for v in torch.linspace(slow, fast, 200).tolist()
        )
        assert slow >= 0.8 and fast <= 1.2501 and error < 5e-3 and not heard[row, number:].any()
    assert own[0] / 8000 != pytest.approx(float(own[1] / 5000), abs=1e-3)  # each row its own


def test_speed_one_changes_nothing_and_others_are_refused():
    samples = torch.randn(2, 100, dtype=torch.float64)
    heard, own = random_speed(samples, generator=seeded(), low=1.0, high=1.0)
    assert own.tolist() == [100, 100]
    torch.testing.assert_close(heard, samples, atol=1e-12, rtol=0)
    with pytest.raises(UserError, match=r"low=1.2 and high=1.1"):
        random_speed(samples, generator=seeded(), low=1.2, high=1.1)
