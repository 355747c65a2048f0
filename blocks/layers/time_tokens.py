"""Time as tokens: relative positions in a video as words, and a learned vector for the time of a frame."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from ..parameters import tag_parameter

_MICRO = 1_000_000
_TIME_TOKEN = re.compile(r"<t(\d+)>")


class RelativeTimeTokenizer:
    """num_tokens words <t0> .. <t{T-1}> for the times of a video, whatever its length: LITA's, arXiv:2403.19046.

    tau seconds in a video of D seconds are t = round((T - 1) tau / D), and t stands for t D / (T - 1): at most
    D / (2 (T - 1)) beside it. num_tokens: T, 100 as published. Raises ValueError for fewer than 2 and for a duration
    that is not positive.
    """

    def __init__(self, num_tokens: int = 100) -> None:
        if isinstance(num_tokens, bool) or not isinstance(num_tokens, int) or num_tokens < 2:
            raise ValueError(f"num_tokens={num_tokens!r} must be an integer of at least 2")
        self.num_tokens = num_tokens

    @property
    def tokens(self) -> list[str]:
        """The words in order, for a vocabulary."""
        return [f"<t{t}>" for t in range(self.num_tokens)]

    def encode(self, seconds: float, duration: float) -> int:
        """The number of the word of a time; one outside the video has that of its nearer end."""
        inside = min(max(seconds, 0.0), _positive(duration))
        return round((self.num_tokens - 1) * inside / duration)

    def decode(self, token: int, duration: float) -> float:
        """Seconds of a word; one beyond the last means the end."""
        return min(max(token, 0) * _positive(duration) / (self.num_tokens - 1), duration)

    def write(self, start: float, end: float, duration: float) -> str:
        """A span as two words: "<t25> <t50>"."""
        return f"<t{self.encode(start, duration)}> <t{self.encode(end, duration)}>"

    def read(self, text: str, duration: float) -> tuple[float, float]:
        """The span in an answer: its first two time words, within the video and in order; the whole video where there
        are fewer, as LITA is evaluated."""
        found = [self.decode(int(number), duration) for number in _TIME_TOKEN.findall(text)[:2]]
        if len(found) < 2:
            return 0.0, _positive(duration)
        return min(found), max(found)


class FrameTimeEncoding(nn.Module):
    """E[min(floor(t / seconds_per_step) + 1, num_steps - 1)] for frames at t seconds: the table of
    `AbsoluteTimeEncoding` (TimeAudio, arXiv:2511.11039), looked up by time and not by count, as frames of videos are
    anywhere.

    E starts at zero, so that a model is at first what it is without it. dim: D. num_steps: rows of E, later times share
    the last; row 0 is for no time. seconds_per_step: of a row, a third as published. Steps are counted in whole
    microseconds: exact at their borders. Raises ValueError for sizes that make no table.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_steps: int = 768,
        seconds_per_step: float = 1 / 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 2:
            raise ValueError(f"num_steps={num_steps!r} must be an integer of at least 2")
        if not 1 / _MICRO <= seconds_per_step < float("inf"):
            raise ValueError(f"seconds_per_step={seconds_per_step} must be a microsecond or more")
        self.dim, self.num_steps, self.step = dim, num_steps, round(seconds_per_step * _MICRO)
        self.table = nn.Parameter(torch.zeros(num_steps, dim, device=device, dtype=dtype))
        tag_parameter(self, "table", weight_decay=0.0)

    def index(self, times: Tensor) -> Tensor:
        """The row of each time, int64; times below 0 have the first, NaN has row 0."""
        known = ~times.isnan()
        whole = (times.double().nan_to_num(0, posinf=1e12).clamp(0, 1e12) * _MICRO).round().long()
        return torch.where(known, (whole // self.step + 1).clamp_max(self.num_steps - 1), 0)

    def forward(self, times: Tensor) -> Tensor:
        """times: floating (B, T), seconds. Returns (B, T, D)."""
        return self.table[self.index(times)]

    def extra_repr(self) -> str:
        return f"{self.dim}, num_steps={self.num_steps}, seconds_per_step={self.step / _MICRO:g}"


def _positive(duration: float) -> float:
    if not 0 < duration < float("inf"):
        raise ValueError(f"duration={duration} must be positive seconds")
    return float(duration)
