"""Heads: logits over a vocabulary; for series P output parameters for every step of the horizon."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LanguageHead(nn.Module):
    """Logits of the next token, (B, L, D) -> (B, L, num_tokens), without bias.

    tied: the embedding whose table is the weight (arXiv:1608.05859); it stays that module's parameter and is neither
    counted nor saved twice. std: of the normal start of a weight of its own.
    """

    def __init__(self, dim: int, num_tokens: int, *, tied: nn.Embedding | None = None, std: float = 0.02) -> None:
        super().__init__()
        if tied is not None and tuple(tied.weight.shape) != (num_tokens, dim):
            raise ValueError(f"the embedding is {tuple(tied.weight.shape)}, the head needs {(num_tokens, dim)}")
        self.dim, self.num_tokens = dim, num_tokens
        self.proj: nn.Linear | None = None
        source: nn.Embedding | nn.Linear
        if tied is None:
            source = self.proj = nn.Linear(dim, num_tokens, bias=False)
            nn.init.normal_(source.weight, std=std)
        else:
            source = tied
        self._table = (source,)  # in a tuple, so that an embedding is no submodule of this one

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self._table[0].weight)


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
