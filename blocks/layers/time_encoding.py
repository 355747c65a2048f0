"""Absolute time for audio frames: a learned vector for each window of a recording."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..parameters import tag_parameter


class AbsoluteTimeEncoding(nn.Module):
    """y_t = x_t + E[min(floor(t / frames_per_window) + 1, num_steps - 1)]: TimeAudio's encoding, arXiv:2511.11039.

    The table E starts at zero, so that a model is at first what it is without it. Frames of windows beyond the end of a
    recording get E[0]. dim: D. num_steps: rows of E, windows beyond share the last. frames_per_window: 17 as published,
    a third of a second of frames at 50 Hz. The index is an integer throughout; the released code divides float
    multiples of 0.333333 and cuts, and can be off by one. Raises ValueError for sizes below 1 (num_steps: 2).
    """

    def __init__(
        self,
        dim: int,
        *,
        num_steps: int = 768,
        frames_per_window: int = 17,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("dim", dim, 1),
            ("num_steps", num_steps, 2),
            ("frames_per_window", frames_per_window, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} must be an integer of at least {least}")
        self.dim, self.num_steps, self.frames_per_window = dim, num_steps, frames_per_window
        self.table = nn.Parameter(torch.zeros(num_steps, dim, device=device, dtype=dtype))
        tag_parameter(self, "table", weight_decay=0.0)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        num_windows: Tensor | None = None,
        start: Tensor | int = 0,
    ) -> Tensor:
        """x: (B, L, D), the frames of a recording in order. mask: bool (B, L), True for a real frame; the others become
        0. num_windows: int64 (B,), windows within each recording (`windows_in`), None when all are. start: int64 (B,)
        or a number, frames before the first, so that pieces get what the whole would. Raises ValueError for other
        shapes."""
        if x.dim() != 3 or x.shape[2] != self.dim:
            raise ValueError(f"AbsoluteTimeEncoding: x has shape {tuple(x.shape)}, expected (B, L, {self.dim})")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
            raise ValueError(
                f"AbsoluteTimeEncoding: mask is {mask.dtype} {tuple(mask.shape)}, expected bool {tuple(x.shape[:2])}"
            )
        for name, value in (("num_windows", num_windows), ("start", start)):
            if isinstance(value, Tensor) and (value.is_floating_point() or value.shape != x.shape[:1]):
                raise ValueError(
                    f"AbsoluteTimeEncoding: {name} is {value.dtype} {tuple(value.shape)}, expected int64 ({len(x)},)"
                )
        index = self.index(x.shape[1], start=start, num_windows=num_windows, device=x.device)
        y = x + self.table[index].to(x.dtype)
        return y if mask is None else y.masked_fill(~mask.unsqueeze(-1), 0)

    def index(
        self,
        length: int,
        *,
        start: Tensor | int = 0,
        num_windows: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The row of the table for each frame, int64 (1, L) or (B, L); arguments as in `forward`."""
        first = torch.as_tensor(start, device=device).reshape(-1, 1)
        window = (first + torch.arange(length, device=device)) // self.frames_per_window
        index = (window + 1).clamp_max(self.num_steps - 1)
        if num_windows is None:
            return index
        return torch.where(window < num_windows.to(window.device).unsqueeze(1), index, 0)


def windows_in(num_samples: int, sample_rate: int, *, windows_per_second: int = 3) -> int:
    """Whole windows in a recording: floor(duration * windows_per_second), in integers. sample_rate: in Hz."""
    if num_samples < 0 or sample_rate < 1 or windows_per_second < 1:
        raise ValueError(
            f"num_samples={num_samples} must be at least 0, sample_rate={sample_rate} and "
            f"windows_per_second={windows_per_second} at least 1"
        )
    return num_samples * windows_per_second // sample_rate
