"""Augmentation of recordings and of their spectrograms: pure functions that draw from an explicit generator.

Samples are floating (B, T), features (B, L, D). lengths: int64 (B,), real samples or frames of each row, which come
first; None when all are. What lies beyond is given back as it was. Draws are made on the generator's device, a CPU one
as a rule, so that they are the same wherever the recordings are; every function draws anew for each row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError, nearest

LABEL_RULES = ("weighted", "union")


def spec_augment(
    features: Tensor,
    *,
    generator: torch.Generator,
    lengths: Tensor | None = None,
    num_time_masks: int = 2,
    max_time: int = 40,
    max_time_share: float = 1.0,
    num_freq_masks: int = 2,
    max_freq: int = 27,
    fill: float = 0.0,
) -> Tensor:
    """Features with some runs of frames and of bands replaced by `fill`: SpecAugment without warping, arXiv:1904.08779.

    A time mask covers frames t0 .. t0 + t - 1 of the row's tau real ones, t uniform in {0 .. min(max_time, floor(
    max_time_share tau))} and t0 in {0 .. tau - t}; a frequency mask covers bands likewise, f from {0 .. max_freq}.
    features: (B, L, D). fill: 0 is the mean of normalised features. Raises UserError for counts and widths below 0, a
    share outside [0, 1], and max_freq above D.
    """
    for name, value in (
        ("num_time_masks", num_time_masks),
        ("max_time", max_time),
        ("num_freq_masks", num_freq_masks),
        ("max_freq", max_freq),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise UserError(f"{name}={value!r} must be an integer of at least 0")
    if not 0 <= max_time_share <= 1:
        raise UserError(f"max_time_share={max_time_share} must be between 0 and 1")
    if features.dim() != 3:
        raise UserError(f"features have the shape {tuple(features.shape)}, expected (B, L, D)")
    length, dim = features.shape[1:]
    if num_freq_masks and max_freq > dim:
        raise UserError(f"max_freq={max_freq} is above the {dim} bands; the largest is {dim}")
    own = _lengths(lengths, features)
    widest = (own.double() * max_time_share).floor().long().clamp_max(max_time)
    frames = _runs(num_time_masks, length, own, widest, generator)
    bands = _runs(num_freq_masks, dim, torch.full_like(own, dim), torch.full_like(own, max_freq), generator)
    real = torch.arange(length) < own.unsqueeze(1)
    hidden = (frames.unsqueeze(2) | bands.unsqueeze(1)) & real.unsqueeze(2)
    return features.masked_fill(hidden.to(features.device), fill)


def random_gain(
    samples: Tensor, *, generator: torch.Generator, low_db: float, high_db: float, lengths: Tensor | None = None
) -> Tensor:
    """Each row times 10^(g / 20), g uniform in [low_db, high_db]. Raises UserError where low_db is above high_db."""
    _check_samples(samples)
    if not low_db <= high_db:
        raise UserError(f"low_db={low_db} must not be above high_db={high_db}")
    gain = low_db + (high_db - low_db) * _uniform(len(samples), generator)
    return _real_or(samples * _column(10 ** (gain / 20), samples), samples, lengths)


def add_noise(
    samples: Tensor,
    *,
    generator: torch.Generator,
    snr_db: float | Tensor,
    noise: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """x + a n, with a such that 10 log10(sum x^2 / sum (a n)^2) = snr_db over the real samples of the row.

    snr_db: in dB, a number or (B,); infinite adds nothing. noise: (B, T), or None for white Gaussian noise; see
    `fit_length`. A row that is silent, or whose noise is, has no such a and stays as it is. Raises UserError for other
    shapes and an SNR that is not a number.
    """
    _check_samples(samples)
    if noise is None:
        noise = torch.randn(samples.shape, generator=generator, device=generator.device)
    elif noise.shape != samples.shape:
        raise UserError(f"noise has the shape {tuple(noise.shape)}, expected {tuple(samples.shape)}; see fit_length")
    snr = torch.as_tensor(snr_db, dtype=torch.float64).cpu()
    if snr.shape not in ((), samples.shape[:1]) or not bool((snr > -float("inf")).all()):
        raise UserError(f"snr_db={snr_db} must be a number or one for each of the {len(samples)} rows")
    real = _real(lengths, samples)
    signal, other = (_energy(x.to(samples.device), real) for x in (samples, noise))
    ratio = 10 ** (-snr / 20).to(samples.device) * (signal / other).sqrt()
    ratio = torch.where((signal > 0) & (other > 0), ratio, 0)
    added = samples.double() + ratio.unsqueeze(1) * noise.to(samples.device).double()
    return torch.where(real & (ratio > 0).unsqueeze(1), added.to(samples.dtype), samples)


def fit_length(noise: Tensor, length: int, *, generator: torch.Generator) -> Tensor:
    """`length` samples of each row of noise (B, S), from a random start on, going round at its end: (B, length).
    Raises UserError for noise without samples."""
    _check_samples(noise)
    if not noise.shape[1]:
        raise UserError("noise has no samples")
    start = (_uniform(len(noise), generator) * noise.shape[1]).long()
    place = (start.unsqueeze(1) + torch.arange(length)) % noise.shape[1]
    return noise.gather(1, place.to(noise.device))


def mix_clips(
    samples: Tensor,
    labels: Tensor,
    *,
    generator: torch.Generator,
    alpha: float,
    lengths: Tensor | None = None,
    rule: str = "weighted",
) -> tuple[Tensor, Tensor]:
    """x = w x_a + (1 - w) x_b, w ~ Beta(alpha, alpha) folded to [1/2, 1], for each row a and another b of the batch.

    mixup, arXiv:1710.09412, eq. 1-2; the folding keeps the row's own clip the louder one, which with a random partner
    changes nothing. labels: floating (B, C), one-hot or many. rule: "weighted" mixes them with w, as published; "union"
    gives both in full, max(y_a, y_b), for events that are heard however loud, ours. alpha: 0 mixes nothing.
    A row keeps its length: what its partner has beyond is cut. Returns samples and labels. Raises UserError for alpha
    below 0, labels of other shapes or integers, an unknown rule.
    """
    _check_samples(samples)
    if not alpha >= 0:
        raise UserError(f"alpha={alpha} must be at least 0")
    if rule not in LABEL_RULES:
        raise UserError(f"rule={rule!r} is unknown.{nearest(rule, LABEL_RULES)}")
    if labels.dim() != 2 or len(labels) != len(samples) or not labels.is_floating_point():
        raise UserError(
            f"labels are {labels.dtype} {tuple(labels.shape)}, expected floating-point ({len(samples)}, C), one-hot"
        )
    if alpha == 0 or len(samples) < 2:
        return samples, labels
    weight = _beta(alpha, len(samples), generator)
    weight = torch.maximum(weight, 1 - weight)
    partner = _others(len(samples), generator).to(samples.device)
    real = _real(lengths, samples)
    heard = samples.masked_fill(~real, 0)
    own = _column(weight, samples)
    mixed = _real_or(own * samples + (1 - own) * heard[partner], samples, lengths)
    if rule == "union":
        return mixed, torch.maximum(labels, labels[partner.to(labels.device)])
    share = _column(weight, labels)
    return mixed, share * labels + (1 - share) * labels[partner.to(labels.device)]


def random_shift(
    samples: Tensor,
    *,
    generator: torch.Generator,
    max_shift: int,
    lengths: Tensor | None = None,
    wrap: bool = False,
) -> tuple[Tensor, Tensor]:
    """Each row later by s samples, uniform in {-max_shift .. max_shift}, within its real ones: y_t = x_{t - s}.

    What moves past an end is lost and zeros come in, or with `wrap` it comes in at the other end. Returns the samples
    and s, int64 (B,) on the CPU, with which labels in time move too. Raises UserError for max_shift below 0.
    """
    _check_samples(samples)
    if isinstance(max_shift, bool) or not isinstance(max_shift, int) or max_shift < 0:
        raise UserError(f"max_shift={max_shift!r} must be an integer of at least 0, in samples")
    shift = (_uniform(len(samples), generator) * (2 * max_shift + 1)).long() - max_shift
    if not samples.shape[1]:
        return samples, shift
    own = _lengths(lengths, samples).unsqueeze(1)
    place = torch.arange(samples.shape[1]) - shift.unsqueeze(1)
    inside = (place >= 0) & (place < own)
    if wrap:
        place, inside = place % own.clamp_min(1), torch.ones_like(inside)
    moved = samples.gather(1, place.clamp(0, samples.shape[1] - 1).to(samples.device))
    return _real_or(moved.masked_fill(~inside.to(samples.device), 0), samples, lengths), shift


def random_speed(
    samples: Tensor, *, generator: torch.Generator, low: float, high: float, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Each row played faster by v: y_t = x(v t), v log-uniform in [low, high]; pitch and formants move with it.

    Between samples x is the cubic through four of them (Catmull and Rom). Speed perturbation, Ko et al. 2015,
    doi:10.21437/Interspeech.2015-711, with speeds anywhere in the range. Returns (B, T'), zero behind each end, and the
    lengths floor((n - 1) / v) + 1. Raises UserError unless 0 < low <= high.
    """
    _check_samples(samples)
    if not 0 < low <= high:
        raise UserError(f"low={low} and high={high} must satisfy 0 < low <= high")
    own = _lengths(lengths, samples)
    speed = low * (high / low) ** _uniform(len(samples), generator)
    new = torch.where(own > 0, ((own - 1).double() / speed).floor().long() + 1, 0)
    if not len(samples) or not int(new.max()):
        return samples[:, :0], new
    place = torch.arange(int(new.max()), dtype=torch.float64) * speed.unsqueeze(1)
    left = place.floor().long()
    part = _like(place - left, samples)
    last = (own - 1).clamp_min(0).unsqueeze(1)
    before, here, there, after = (
        samples.gather(1, torch.minimum((left + shift).clamp_min(0), last).to(samples.device))
        for shift in (-1, 0, 1, 2)
    )
    slope, end = (there - before) / 2, (after - here) / 2
    rise = there - here
    y = here + part * (slope + part * ((3 * rise - 2 * slope - end) + part * (slope + end - 2 * rise)))
    real = torch.arange(y.shape[1]) < new.unsqueeze(1)
    return y.masked_fill(~real.to(samples.device), 0), new


def _like(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.device, like.dtype)


def _runs(number: int, size: int, own: Tensor, widest: Tensor, generator: torch.Generator) -> Tensor:
    """bool (B, size): the union of `number` runs for each row, each of 0 .. widest within the first `own` places."""
    draw = _uniform(2 * number * len(own), generator).view(2, number, len(own), 1)
    width = (draw[0] * (widest + 1).view(1, -1, 1)).long()
    start = (draw[1] * (own.view(1, -1, 1) - width + 1)).long()
    place = torch.arange(size)
    return ((place >= start) & (place < start + width)).any(0)


def _uniform(number: int, generator: torch.Generator) -> Tensor:
    """In [0, 1): float64, on the CPU."""
    return torch.rand(number, generator=generator, device=generator.device, dtype=torch.float64).cpu()


def _beta(alpha: float, number: int, generator: torch.Generator) -> Tensor:
    """Beta(alpha, alpha), float64 (number,): torch's own sampler takes no generator, so it seeds NumPy's."""
    import numpy

    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    return torch.from_numpy(numpy.random.default_rng(seed).beta(alpha, alpha, number))


def _others(number: int, generator: torch.Generator) -> Tensor:
    """A partner for each of at least two rows, each row being one once and none its own: neighbours on a random
    circle."""
    order = torch.randperm(number, generator=generator, device=generator.device).cpu()
    return torch.empty_like(order).scatter_(0, order, order.roll(1))


def _lengths(lengths: Tensor | None, x: Tensor) -> Tensor:
    """int64 (B,), on the CPU, where the draws are."""
    if lengths is None:
        return torch.full((x.shape[0],), x.shape[1], dtype=torch.int64)
    if lengths.shape != x.shape[:1]:
        raise UserError(f"lengths have the shape {tuple(lengths.shape)}, expected ({x.shape[0]},)")
    if len(lengths) and not 0 <= int(lengths.min()) <= int(lengths.max()) <= x.shape[1]:
        raise UserError(f"lengths are {int(lengths.min())} to {int(lengths.max())}, but rows have {x.shape[1]}")
    return lengths.long().cpu()


def _real(lengths: Tensor | None, x: Tensor) -> Tensor:
    """bool (B, T) on the device of x."""
    return (torch.arange(x.shape[1]) < _lengths(lengths, x).unsqueeze(1)).to(x.device)


def _real_or(new: Tensor, old: Tensor, lengths: Tensor | None) -> Tensor:
    return new if lengths is None else torch.where(_real(lengths, old), new, old)


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.device, like.dtype).unsqueeze(1)


def _energy(x: Tensor, real: Tensor) -> Tensor:
    """Sum of squares over the real samples, float64 (B,)."""
    return x.masked_fill(~real, 0).double().square().sum(1)


def _check_samples(samples: Tensor) -> None:
    if samples.dim() != 2 or not samples.is_floating_point():
        raise UserError(
            f"samples are {samples.dtype} {tuple(samples.shape)}, expected floating-point (B, T), one channel"
        )
