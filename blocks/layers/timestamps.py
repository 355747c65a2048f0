"""Timestamps as text between the frames of a video: the tokens and their positions, for any language model.

Positions have three rows, of time, height and width, as in Qwen2-VL (arXiv:2409.12191): text has the same number in all
three, a token of a video has that of its step, of its row and of its column.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Tokenize = Callable[[str], Sequence[int]]
_STAMP = re.compile(r"<(-?\d+\.\d)s>")


class VideoPart(NamedTuple):
    """A video in a stream of tokens. grid: (T, h, w), its steps and the tokens of each. times: seconds of its frames,
    of which T or a multiple of T are given, every step having as many."""

    grid: tuple[int, int, int]
    times: Sequence[float] = ()

    def step_times(self) -> list[float]:
        """Seconds of each step: of its first frame, times[j (n // T)] of n. Raises ValueError for fewer than T."""
        steps = self.grid[0]
        if len(self.times) < steps:
            raise ValueError(f"a video of {steps} steps came with {len(self.times)} times; give at least one for each")
        return [float(self.times[j * (len(self.times) // steps)]) for j in range(steps)]


class TokenStream(NamedTuple):
    """ids: int64 (L,). positions: int64 (3, L), time, height, width. visual: int64 (L,), the number of a token of a
    video among all such tokens, in the order of the stream; -1 for text."""

    ids: Tensor
    positions: Tensor
    visual: Tensor


Part = Sequence[int] | VideoPart


def number_tokens(parts: Sequence[Part], *, video_token: int) -> TokenStream:
    """The stream without timestamps, its positions as Qwen2-VL numbers them: text goes on from the largest number so
    far; a video that starts at p has p + step, p + row and p + column.

    parts: token ids of texts, and videos, in order. video_token: the id that stands for a token of a video.
    """
    stream = _Stream(video_token)
    for part in parts:
        if isinstance(part, VideoPart):
            start = stream.next
            for step in range(part.grid[0]):
                stream.picture(part.grid, start + step, start)
            stream.next = start + max(part.grid)
        else:
            stream.text(part)
    return stream.finish()


def inject_timestamps(parts: Sequence[Part], tokenize: Tokenize, *, video_token: int) -> TokenStream:
    """TIM, timestamp injection (DATE, arXiv:2509.09263): after each step of a video comes its time as text, "<12.5s>".

    Positions: text has equal numbers in the three rows. A step has the time number that follows the last one; rows and
    columns of all steps of a video count from the number at which the video starts. The text of a time goes on from the
    time number of its step, but the one behind the last step, and what follows, from the largest number of that step in
    any row. Each video has its own times (the released code has one list for all of them).

    parts, video_token: of `number_tokens`. tokenize: text to ids. Raises ValueError for a video with too few times.
    """
    stream = _Stream(video_token)
    for part in parts:
        if not isinstance(part, VideoPart):
            stream.text(part)
            continue
        start, times = stream.next, part.step_times()
        for step, seconds in enumerate(times):
            now = stream.next
            stream.picture(part.grid, now, start)
            last = step + 1 == len(times)
            stream.next = max(now, start + max(part.grid[1:]) - 1) + 1 if last else now + 1
            stream.text(tokenize(time_stamp(seconds)))
    return stream.finish()


def prefix_timestamps(parts: Sequence[Part], tokenize: Tokenize, *, video_token: int) -> TokenStream:
    """TAFR (TimeSearch, arXiv:2504.01407): before each frame its time as text, "12.0s"; each frame is then a picture of
    its own, numbered as `number_tokens` does. Arguments as of `inject_timestamps`."""
    expanded: list[Part] = []
    for part in parts:
        if not isinstance(part, VideoPart):
            expanded.append(part)
            continue
        for seconds in part.step_times():
            expanded += [tokenize(frame_stamp(seconds)), VideoPart((1, *part.grid[1:]))]
    return number_tokens(expanded, video_token=video_token)


def extract_timestamps(
    ids: Tensor | Sequence[int],
    grids: Sequence[tuple[int, int, int]],
    decode: Callable[[Sequence[int]], str],
    *,
    tokenize: Tokenize,
    video_token: int,
) -> list[Part]:
    """The reverse of `inject_timestamps`: the texts and the videos with the time of each step, rounded as written.

    ids: int64 (L,). grids: of the videos in order. decode: ids to text; tokenize: text to ids. Raises ValueError where
    the stream is not of that form.
    """
    left = [int(i) for i in ids]
    parts: list[Part] = []
    for number, grid in enumerate(grids):
        before = left.index(video_token) if video_token in left else len(left)
        if before:
            parts.append(left[:before])
        left, times = left[before:], []
        for step in range(grid[0]):
            size = grid[1] * grid[2]
            if left[:size] != [video_token] * size:
                raise ValueError(f"step {step} of video {number} has fewer than {size} tokens")
            seconds, length = _leading_stamp(left[size:], decode, tokenize, step)
            times.append(seconds)
            left = left[size + length :]
        parts.append(VideoPart(grid, times))
    if video_token in left:
        raise ValueError(f"the stream has more videos than the {len(grids)} grids that were given")
    return [*parts, left] if left else parts


def time_stamp(seconds: float) -> str:
    """TIM's text of a time: "<12.5s>"."""
    return f"<{round(float(seconds), 1)}s>"


def frame_stamp(seconds: float) -> str:
    """TAFR's text of a time: "12.0s"."""
    return f"{float(seconds):.1f}s"


class _Stream:
    """What has been written so far; `next` is the number that comes next."""

    def __init__(self, video_token: int) -> None:
        self.video_token, self.next, self.seen = video_token, 0, 0
        self.ids: list[Tensor] = []
        self.positions: list[Tensor] = []
        self.visual: list[Tensor] = []

    def text(self, ids: Sequence[int]) -> None:
        number = len(ids)
        self.ids.append(torch.as_tensor(ids, dtype=torch.int64).reshape(number))
        self.positions.append((self.next + torch.arange(number)).expand(3, -1))
        self.visual.append(torch.full((number,), -1))
        self.next += number

    def picture(self, grid: tuple[int, int, int], time: int, start: int) -> None:
        """One step of a video: its number of time, and where rows and columns start."""
        _, height, width = grid
        if min(grid) < 1:
            raise ValueError(f"grid={grid} of a video must be three numbers of at least 1: steps, rows, columns")
        number = height * width
        place = torch.arange(number)
        self.ids.append(torch.full((number,), self.video_token))
        self.positions.append(
            torch.stack((torch.full_like(place, time), start + place // width, start + place % width))
        )
        self.visual.append(self.seen + place)
        self.seen += number

    def finish(self) -> TokenStream:
        if not self.ids:
            empty = torch.zeros(0, dtype=torch.int64)
            return TokenStream(empty, empty.new_zeros(3, 0), empty)
        return TokenStream(torch.cat(self.ids), torch.cat(self.positions, 1), torch.cat(self.visual))


def _leading_stamp(
    ids: Sequence[int], decode: Callable[[Sequence[int]], str], tokenize: Tokenize, step: int
) -> tuple[float, int]:
    """The time at the front of a stream and how many tokens it takes."""
    for length in range(1, min(len(ids), 32) + 1):
        found = _STAMP.fullmatch(decode(ids[:length]))
        if found and list(tokenize(found.group())) == list(ids[:length]):
            return float(found.group(1)), length
    raise ValueError(f"no time such as <12.5s> follows step {step} of a video")
