"""Heads for series: from tokens to P output parameters for every step of the horizon."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ForecastHead(nn.Module):
    """Flatten the tokens and map them to the horizon: (N, tokens, D) -> (N, H, P) (PatchTST, arXiv:2211.14730).

    With `num_future_features` > 0 each step first gets `step_dim` numbers from the tokens, then a small network reads
    them beside what is known of that step in advance (calendar, future covariates, static values).
    """

    def __init__(
        self,
        dim: int,
        num_tokens: int,
        pred_len: int,
        num_params: int,
        *,
        num_future_features: int = 0,
        step_dim: int = 16,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim, self.pred_len, self.num_params = dim, pred_len, num_params
        self.num_future_features = num_future_features
        self.drop = nn.Dropout(drop)
        self.proj = nn.Linear(dim * num_tokens, pred_len * num_params)
        if num_future_features:
            self.step = nn.Linear(dim * num_tokens, pred_len * step_dim)
            self.decode = nn.Sequential(
                nn.Linear(step_dim + num_future_features, 4 * step_dim),
                nn.GELU(),
                nn.Dropout(drop),
                nn.Linear(4 * step_dim, num_params),
            )

    def forward(self, tokens: Tensor, future: Tensor | None = None) -> Tensor:
        """tokens: (N, tokens, D); future: (N, H, num_future_features)."""
        flat = self.drop(tokens.flatten(1))
        out = self.proj(flat).unflatten(1, (self.pred_len, self.num_params))
        if self.num_future_features:
            if future is None:
                raise ValueError("this head was built with future features; pass them")
            steps = self.step(flat).unflatten(1, (self.pred_len, -1))
            out = out + self.decode(torch.cat((steps, future.to(steps.dtype)), dim=-1))
        return out
