"""What a training step does to its recordings: the augmentation of a config, drawn from the seed and the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ...blocks.layers.front_ends import StackedFrames
from ..errors import UserError, nearest
from .augment import add_noise, mix_clips, random_gain, random_shift, random_speed, spec_augment


@dataclass(frozen=True)
class Augmentation:
    """speed: faster or slower by up to so much, 0.1 is from 1 / 1.1 to 1.1. gain_db: louder or softer by up to so much.
    shift_seconds: earlier or later by up to so much. noise_snr_db: [lowest, highest] signal-to-noise ratio of white
    noise, None for none; noise_share: of the recordings that get it. mixup: alpha of `mix_clips`, 0 for none.
    time_masks, max_time_seconds, freq_masks, max_freq_share: of `spec_augment`; a mask covers at most half of a
    recording.

    Raises UserError for values outside these.
    """

    speed: float = 0.0
    gain_db: float = 0.0
    shift_seconds: float = 0.0
    noise_snr_db: tuple[float, float] | None = None
    noise_share: float = 0.5
    mixup: float = 0.0
    time_masks: int = 0
    max_time_seconds: float = 0.1
    freq_masks: int = 0
    max_freq_share: float = 0.2

    @classmethod
    def create(cls, options: Mapping[str, Any] | None) -> Augmentation:
        """From the section `task.augment` of a config."""
        known = [field.name for field in fields(cls)]
        given = dict(options or {})
        for key, value in given.items():
            if key not in known:
                raise UserError(f"unknown key task.augment.{key}.{nearest(key, known)}")
            if key == "noise_snr_db":
                if value is not None and (not isinstance(value, Sequence) or len(value) != 2 or value[0] > value[1]):
                    raise UserError(f"task.augment.noise_snr_db={value} must be [lowest, highest] in dB, or null")
                given[key] = None if value is None else (float(value[0]), float(value[1]))
            elif not value >= 0:
                raise UserError(f"task.augment.{key}={value} must be at least 0")
        for key in ("noise_share", "max_freq_share"):
            if given.get(key, 0) > 1:
                raise UserError(f"task.augment.{key}={given[key]} must be from 0 to 1")
        return cls(**given)

    def faster(self, samples: Tensor, lengths: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Recordings (B, T) and their lengths at other speeds; what is labelled in time is not then."""
        if not self.speed:
            return samples, lengths
        most = 1 + self.speed
        return random_speed(samples, generator=generator, low=1 / most, high=most, lengths=lengths)

    def samples(
        self, samples: Tensor, lengths: Tensor, sample_rate: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Recordings (B, T) shifted, louder or softer, with noise; and the shifts in samples, int64 (B,)."""
        shift = torch.zeros(len(samples), dtype=torch.int64)
        if self.shift_seconds:
            most = round(self.shift_seconds * sample_rate)
            samples, shift = random_shift(samples, generator=generator, max_shift=most, lengths=lengths)
        if self.gain_db:
            samples = random_gain(
                samples, generator=generator, low_db=-self.gain_db, high_db=self.gain_db, lengths=lengths
            )
        if self.noise_snr_db is not None:
            low, high = self.noise_snr_db
            draw = torch.rand(2, len(samples), generator=generator, dtype=torch.float64)
            snr = torch.where(draw[1] < self.noise_share, low + (high - low) * draw[0], torch.inf)
            samples = add_noise(samples, generator=generator, snr_db=snr, lengths=lengths)
        return samples, shift

    def mixed(
        self, samples: Tensor, targets: Tensor, lengths: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Recordings and their targets (B, C), each with another of the batch mixed in."""
        if not self.mixup:
            return samples, targets
        return mix_clips(samples, targets, generator=generator, alpha=self.mixup, lengths=lengths)

    def features(
        self, features: Tensor, lengths: Tensor, front_end: StackedFrames, generator: torch.Generator
    ) -> Tensor:
        """Features (B, L, stack * D) with frames and bands hidden; the frames of a stack are taken apart for it."""
        if not (self.time_masks or self.freq_masks) or not features.numel():
            return features
        stack, hop = front_end.stack, front_end.inner.hop_length / front_end.sample_rate
        bands = front_end.inner.dim
        frames = features.unflatten(2, (stack, bands)).flatten(1, 2)
        frames = spec_augment(
            frames,
            generator=generator,
            lengths=lengths * stack,
            num_time_masks=self.time_masks,
            max_time=round(self.max_time_seconds / hop),
            max_time_share=0.5,
            num_freq_masks=self.freq_masks,
            max_freq=int(self.max_freq_share * bands),
        )
        return frames.unflatten(1, (-1, stack)).flatten(2)


def step_generator(seed: int, step: int, rank: int = 0) -> torch.Generator:
    """The generator of a training step, a function of these numbers alone: a resumed run draws the same."""
    state = torch.Generator()
    state.manual_seed(((seed * 1_000_003 + step) * 1_009 + rank) % 2**63)
    return state
