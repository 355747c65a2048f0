"""From samples to features in frames, whole or in pieces: what the audio front ends have in common."""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple, overload

import torch
from torch import Tensor, nn

from ..registry import did_you_mean
from .feature_norm import FeatureNorm
from .rows import take

TAILS = ("drop", "pad")


class FrontEndState(NamedTuple):
    """What the next frames still read.

    waiting: (B, frame_length - 1), samples from the start of the next frame on, then zeros. held: int64 (B,), how many
    of them are real. given: int64 (B,), frames given so far.
    """

    waiting: Tensor
    held: Tensor
    given: Tensor


class FrontEndOutput(NamedTuple):
    """features: (B, L, D), zero beyond the frames of a row. state: None unless one was passed in. lengths: int64 (B,),
    frames of each row."""

    features: Tensor
    state: FrontEndState | None
    lengths: Tensor


class FrontEnd(nn.Module):
    """Maps samples (B, T) to features (B, L, D): frame i reads samples i * hop_length to i * hop_length + frame_length.

    dim: D. frame_length, hop_length: in samples, 1 <= hop_length <= frame_length. sample_rate: in Hz, for times only.
    tail: what becomes of samples at the end that no whole frame reads, "drop", or "pad" with zeros to one more frame.
    norm: a `FeatureNorm` of D features, or None.

    There is no padding at the start and nothing is read ahead: a frame is given with its last sample, `latency` seconds
    after its first. A call without a state takes recordings as whole. With a state it takes pieces of them, of any
    size, and `flush` ends them; together they give the frames of the whole.
    A subclass defines `frames`. Raises ValueError for values outside these.
    """

    def __init__(
        self,
        dim: int,
        *,
        frame_length: int,
        hop_length: int,
        sample_rate: int,
        tail: str = "drop",
        norm: FeatureNorm | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("dim", dim),
            ("frame_length", frame_length),
            ("hop_length", hop_length),
            ("sample_rate", sample_rate),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive integer")
        if hop_length > frame_length:
            raise ValueError(
                f"hop_length={hop_length} is above frame_length={frame_length}: samples between two frames would never "
                f"be read; the largest is {frame_length}"
            )
        if tail not in TAILS:
            raise ValueError(f"tail={tail!r} is unknown.{did_you_mean(tail, TAILS)}")
        if norm is not None and norm.dim != dim:
            raise ValueError(f"norm is of {norm.dim} features, but the front end gives {dim}")
        self.dim, self.tail, self.norm = dim, tail, norm
        self.frame_length, self.hop_length, self.sample_rate = frame_length, hop_length, sample_rate

    def frames(self, samples: Tensor) -> Tensor:
        """samples (B, T), T = (L - 1) * hop_length + frame_length, to the features (B, L, D), each from its frame
        alone."""
        raise NotImplementedError(f"{type(self).__name__} must define frames")

    def forward(
        self, samples: Tensor, *, lengths: Tensor | None = None, state: FrontEndState | None = None
    ) -> FrontEndOutput:
        """samples: floating (B, T). lengths: int64 (B,), real samples of each row, which come first; None when all are.
        state: from `init_state` or an earlier call. What lies beyond a row's samples is never read. Raises ValueError
        for other shapes, integers, and a state where the norm is one of whole recordings."""
        self._check(samples, lengths, state)
        batch, number = samples.shape
        if lengths is None:
            own = torch.full((batch,), number, dtype=torch.int64, device=samples.device)
        else:
            own = lengths.to(samples.device, torch.int64)
            real = torch.arange(number, device=samples.device) < own.unsqueeze(1)
            samples = samples.masked_fill(~real, 0)
        if state is None:
            ragged = lengths is not None
            return FrontEndOutput(*self._whole(samples, own, ragged=ragged))
        width, total = state.waiting.shape[1], state.held + own
        place = torch.arange(width + number, device=samples.device).expand(batch, -1)
        source = torch.where(place < state.held.unsqueeze(1), place, place + width - state.held.unsqueeze(1))
        joined = take(
            torch.cat((state.waiting, samples.to(state.waiting.dtype)), 1), source.clamp_max(place.shape[1] - 1)
        )
        joined = joined.masked_fill(place >= total.unsqueeze(1), 0)
        new = self.num_frames(total, complete=True)
        features = self._features(joined, new, ragged=True)
        place = (new * self.hop_length).unsqueeze(1) + torch.arange(width, device=samples.device)
        rest = total - new * self.hop_length
        waiting = take(joined, place.clamp_max(max(joined.shape[1] - 1, 0)))
        waiting = waiting.masked_fill(torch.arange(width, device=samples.device) >= rest.unsqueeze(1), 0)
        return FrontEndOutput(features, FrontEndState(waiting, rest, state.given + new), new)

    def flush(self, state: FrontEndState) -> FrontEndOutput:
        """The frames that remain once the recordings have ended: none with tail "drop", one at most with "pad"."""
        last = torch.zeros_like(state.held)
        if self.tail == "pad":
            # A row whose last frame reached the end has nothing left that no frame has read.
            read = torch.where(state.given > 0, self.frame_length - self.hop_length, 0)
            last = (state.held > read).long()
        return FrontEndOutput(self._features(state.waiting, last, ragged=True), None, last)

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> FrontEndState:
        """Before the first sample. Raises ValueError where the norm is one of whole recordings."""
        self._check_streams()
        own = next(chain(self.parameters(), self.buffers()))
        device = device or own.device
        none = torch.zeros(batch_size, dtype=torch.int64, device=device)
        waiting = torch.zeros(batch_size, self.frame_length - 1, device=device, dtype=dtype or own.dtype)
        return FrontEndState(waiting, none, none.clone())

    @overload
    def num_frames(self, samples: int, *, complete: bool = False) -> int: ...
    @overload
    def num_frames(self, samples: Tensor, *, complete: bool = False) -> Tensor: ...
    def num_frames(self, samples: int | Tensor, *, complete: bool = False) -> int | Tensor:
        """Frames of a recording of so many samples. complete: only those that need no zeros, whatever `tail` is."""
        padded = self.tail == "pad" and not complete
        spare, least = (self.hop_length - 1, 1) if padded else (0, 0)
        if isinstance(samples, Tensor):
            frames = (samples - self.frame_length + spare) // self.hop_length + 1
            return torch.where(samples > 0, frames.clamp_min(least), 0)
        number = (samples - self.frame_length + spare) // self.hop_length + 1
        if not isinstance(samples, int):  # not known while a model is exported for any length
            return torch.sym_max(number, least)
        return max(number, least) if samples > 0 else 0

    def times(self, number: int, *, start: int = 0) -> Tensor:
        """Centres of the frames start, start + 1, ..., in seconds from the first sample: float64 (number,)."""
        frame = torch.arange(start, start + number, dtype=torch.int64)
        return (2 * frame * self.hop_length + self.frame_length).double() / (2 * self.sample_rate)

    def span(self, first: int, last: int) -> tuple[float, float]:
        """Start and end, in seconds, of what the frames first .. last (inclusive) stand for: half a hop around each
        centre, so that the spans of neighbours touch. The start is not below 0."""
        begin = 2 * first * self.hop_length + self.frame_length - self.hop_length
        end = 2 * last * self.hop_length + self.frame_length + self.hop_length
        return max(begin, 0) / (2 * self.sample_rate), end / (2 * self.sample_rate)

    @property
    def latency(self) -> float:
        """Seconds from the first sample of a frame until the frame is given."""
        return self.frame_length / self.sample_rate

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, frame_length={self.frame_length}, hop_length={self.hop_length}, "
            f"sample_rate={self.sample_rate}, tail={self.tail}"
        )

    def _whole(self, samples: Tensor, own: Tensor, *, ragged: bool) -> tuple[Tensor, None, Tensor]:
        number = self.num_frames(own)
        features = self._features(samples, number, ragged=ragged)
        if self.norm is not None and self.norm.whole:
            features = self.norm(features, lengths=number if ragged else None)
        return features, None, number

    def _features(self, samples: Tensor, number: Tensor, *, ragged: bool) -> Tensor:
        """The first frames of each row, number int64 (B,) of them; ragged: these may differ."""
        longest = int(number.max()) if ragged and number.shape[0] else self.num_frames(samples.shape[1])
        if longest == 0 or number.shape[0] == 0:
            return samples.new_zeros(samples.shape[0], longest, self.dim)
        needed = (longest - 1) * self.hop_length + self.frame_length
        features = self.frames(nn.functional.pad(samples, (0, needed - samples.shape[1])))
        if self.norm is not None and not self.norm.whole:
            features = self.norm(features)
        if not ragged:
            return features
        real = torch.arange(longest, device=features.device) < number.unsqueeze(1)
        return features.masked_fill(~real.unsqueeze(-1), 0)

    def _check_streams(self) -> None:
        if self.norm is not None and self.norm.whole:
            raise ValueError(
                f"{type(self).__name__}: the norm {self.norm.kind!r} takes statistics of whole recordings, so it "
                'cannot stream; norms that can: "fixed", "affine"'
            )

    def _check(self, samples: Tensor, lengths: Tensor | None, state: FrontEndState | None) -> None:
        name = type(self).__name__
        if samples.dim() != 2:
            raise ValueError(f"{name}: samples have the shape {tuple(samples.shape)}, expected (B, T), one channel")
        if not samples.is_floating_point():
            raise ValueError(f"{name}: samples are {samples.dtype}; expected floating-point numbers in [-1, 1]")
        if lengths is not None:
            if lengths.shape != samples.shape[:1] or lengths.is_floating_point() or lengths.dtype == torch.bool:
                raise ValueError(
                    f"{name}: lengths are {lengths.dtype} {tuple(lengths.shape)}, expected int64 ({samples.shape[0]},)"
                )
            if len(lengths) and not 0 <= int(lengths.min()) <= int(lengths.max()) <= samples.shape[1]:
                raise ValueError(
                    f"{name}: lengths are {int(lengths.min())} to {int(lengths.max())}, but rows have "
                    f"{samples.shape[1]} samples"
                )
        if state is None:
            return
        self._check_streams()
        if not isinstance(state, FrontEndState):
            raise ValueError(f"{name}: state is a {type(state).__name__}, expected the FrontEndState of init_state")
        shape = samples.shape[0], self.frame_length - 1
        if state.waiting.shape != shape:
            raise ValueError(f"{name}: state holds samples of shape {tuple(state.waiting.shape)}, expected {shape}")
