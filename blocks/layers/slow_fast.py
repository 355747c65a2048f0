"""Few tokens for many frames: every frame as one vector, a few frames as pictures."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def spread(lengths: Tensor, number: int) -> Tensor:
    """`number` places spread over each row of 0 .. length - 1, int64 (B, number): place i is i (length - 1) /
    (number - 1), rounded to the nearest and halves to even; the first place is 0, the last length - 1. Rows that are
    shorter repeat places. lengths: int64 (B,), at least 1."""
    if number == 1:
        return torch.zeros(len(lengths), 1, dtype=torch.int64, device=lengths.device)
    step = torch.arange(number, device=lengths.device)
    return (step * (lengths.unsqueeze(1) - 1) / torch.tensor(number - 1.0, dtype=torch.float64)).round().long()


class SlowFastPool(nn.Module):
    """LITA's tokens of a video (arXiv:2403.19046): T + s^2 (h / s) (w / s) from frames of h x w patches; no parameters.

    T frames are spread over the video. Fast: the mean over the patches of each, T tokens. Slow: s^2 of these T frames,
    spread over them, their patches averaged in windows of s x s; frame by frame, in a frame row by row. Fast comes
    first. As published T = 100 and s = 2: 356 tokens from 100 frames of 16 x 16 patches. A shorter video repeats
    frames. num_frames: T. pool: s. Raises ValueError for numbers below 1, and for a grid that s does not divide.
    """

    def __init__(self, num_frames: int = 100, pool: int = 2) -> None:
        super().__init__()
        for name, value in (("num_frames", num_frames), ("pool", pool)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive integer")
        self.num_frames, self.pool = num_frames, pool

    def num_tokens(self, height: int, width: int) -> int:
        """Tokens of a video whose frames have height x width patches."""
        return self.num_frames + height * width

    def frames(self, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The frames of the fast and of the slow tokens, int64 (B, T) and (B, s^2), of videos of so many frames."""
        fast = spread(lengths, self.num_frames)
        chosen = spread(torch.tensor([self.num_frames], device=lengths.device), self.pool**2)
        return fast, fast[:, chosen[0]]

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """x: (B, N, h, w, D). lengths: int64 (B,), real frames of each video, which come first; None when all are.
        Returns (B, T + s^2 (h / s) (w / s), D)."""
        if x.dim() != 5 or not x.shape[1]:
            raise ValueError(f"SlowFastPool: x has shape {tuple(x.shape)}, expected (B, N, h, w, D), N at least 1")
        height, width = x.shape[2:4]
        if height % self.pool or width % self.pool:
            raise ValueError(f"SlowFastPool: pool={self.pool} does not divide the grid {height} x {width}")
        if lengths is None:
            lengths = torch.full((len(x),), x.shape[1], device=x.device)
        elif lengths.shape != x.shape[:1] or not bool(((lengths > 0) & (lengths <= x.shape[1])).all()):
            raise ValueError(f"SlowFastPool: lengths {tuple(lengths.shape)} must be from 1 to {x.shape[1]} in each row")
        row = torch.arange(len(x), device=x.device).unsqueeze(1)
        first, second = self.frames(lengths)
        slow = x[row, second].flatten(0, 1).movedim(-1, 1)
        slow = F.avg_pool2d(slow, self.pool).movedim(1, -1).reshape(len(x), -1, x.shape[-1])
        return torch.cat((x.mean((2, 3))[row, first], slow), 1)

    def extra_repr(self) -> str:
        return f"num_frames={self.num_frames}, pool={self.pool}"
