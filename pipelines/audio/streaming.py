"""Recordings of any length through a model in constant memory: piece by piece with its state, or in windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ...zoo._audio import AudioEncoder, AudioOutput
from ..errors import UserError
from .reader import AudioReader

# What a head makes of the encoder's tokens: (B, L, D) -> (B, L, C).
Head = Callable[[Tensor], Tensor]


class Source(Protocol):
    """One channel of a recording. samples: the frames start .. stop, float32; streaming never goes back by more than
    the overlap of two windows."""

    @property
    def name(self) -> str: ...
    @property
    def frames(self) -> int: ...
    @property
    def sample_rate(self) -> int: ...
    def samples(self, start: int, stop: int) -> np.ndarray: ...


class FileSource:
    """A `Source` that reads a file once, from its start to its end, and holds what was asked for last.

    reader: of one channel. Raises AudioError for a file that turns out to be unusable.
    """

    def __init__(self, reader: AudioReader) -> None:
        self.name, self.frames, self.sample_rate = reader.name, reader.frames, reader.rate
        self._blocks = reader.blocks(10.0)
        self._samples, self._first = np.zeros(0, dtype=np.float32), 0

    def samples(self, start: int, stop: int) -> np.ndarray:
        """Frames start .. stop; start must not be below that of the call before."""
        if start < self._first:
            raise ValueError(f"{self.name} is read forwards: {start} is before {self._first}")
        parts, held = [self._samples[start - self._first :]], len(self._samples) - (start - self._first)
        while held < stop - start:
            block = next(self._blocks)
            parts.append(block[-held:] if held < 0 and -held < len(block) else block[:0] if held < 0 else block)
            held += len(block)
        self._samples, self._first = np.concatenate(parts), start
        return self._samples[: stop - start]


class Piece(NamedTuple):
    """first: number of the first token. values: (n, C), what the head gives for the tokens first .. first + n - 1."""

    first: int
    values: Tensor


def stream(
    encoder: AudioEncoder,
    head: Head,
    source: Source,
    *,
    piece_seconds: float = 20.0,
    context_seconds: float = 5.0,
    batch_size: int = 1,
) -> Iterator[Piece]:
    """The head's values for every token of a recording, in order, in pieces; the recording is never in memory.

    A model that streams (`encoder.streaming`) reads `piece_seconds` at a time and carries its state: the values are
    those of the whole recording up to rounding. Any other reads windows of piece_seconds with context_seconds more on
    either side, of whose tokens it gives the middle ones: the same up to rounding when no token sees further than the
    context (softmax with window_size w over n blocks: n (w - 1) tokens), otherwise others, without a bound; positions
    of the backbone and a norm of whole recordings ("utterance") are then those of windows. batch_size: windows at once.

    Raises UserError for a source of another sample rate and for lengths that are not above 0 (context: below 0).
    """
    front = encoder.front_end
    if source.sample_rate != encoder.sample_rate:
        raise UserError(f"the model hears {encoder.sample_rate} Hz, {source.name} is read at {source.sample_rate} Hz")
    if not piece_seconds > 0 or not context_seconds >= 0:
        raise UserError(f"piece_seconds={piece_seconds} must be above 0, context_seconds={context_seconds} not below 0")
    tokens = max(round(piece_seconds * front.sample_rate / front.hop_length), 1)
    if encoder.streaming:
        yield from _stateful(encoder, head, source, tokens * front.hop_length)
    else:
        context = math.ceil(context_seconds * front.sample_rate / front.hop_length)
        yield from _windows(encoder, head, source, tokens, context, batch_size)


@torch.inference_mode()
def _stateful(encoder: AudioEncoder, head: Head, source: Source, size: int) -> Iterator[Piece]:
    state, first = encoder.init_state(1), 0
    for start in range(0, source.frames, size):
        block = torch.from_numpy(source.samples(start, min(start + size, source.frames)))
        out = encoder(block.unsqueeze(0).to(encoder.proj.weight.device), state=state)
        state = out.state
        if out.y.shape[1]:
            yield Piece(first, head(out.y)[0])
            first += out.y.shape[1]
    out = encoder.flush(state)
    if out.y.shape[1]:
        yield Piece(first, head(out.y)[0])


@torch.inference_mode()
def _windows(
    encoder: AudioEncoder, head: Head, source: Source, tokens: int, context: int, batch_size: int
) -> Iterator[Piece]:
    front, total = encoder.front_end, encoder.front_end.num_frames(source.frames)
    spans = [
        (max(first - context, 0), first, min(first + tokens, total), min(first + tokens + context, total))
        for first in range(0, total, tokens)
    ]
    for begin in range(0, len(spans), batch_size):
        group = spans[begin : begin + batch_size]
        rows = []
        for left, _, _, right in group:
            # the last token may be filled with zeros, as in the whole
            stop = min((right - 1) * front.hop_length + front.frame_length, source.frames)
            rows.append(source.samples(left * front.hop_length, stop))
        lengths = torch.tensor([len(row) for row in rows])
        samples = np.zeros((len(rows), int(lengths.max())), dtype=np.float32)
        for line, own in zip(samples, rows, strict=True):
            line[: len(own)] = own
        starts = torch.tensor([left for left, *_ in group], device=encoder.proj.weight.device)
        out = _encode(encoder, samples, lengths, starts)
        for row, (left, first, last, _) in enumerate(group):
            yield Piece(first, head(out.y[row : row + 1, first - left : last - left])[0])


def _encode(encoder: AudioEncoder, samples: np.ndarray, lengths: Tensor, starts: Tensor) -> AudioOutput:
    batch = torch.from_numpy(samples).to(encoder.proj.weight.device)
    ragged = bool((lengths < samples.shape[1]).any())
    features = encoder.features(batch, lengths.to(batch.device) if ragged else None)
    return encoder.encode(features.features, features.lengths, start=starts)
