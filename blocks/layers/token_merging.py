"""Fewer tokens for long audio: each segment keeps its dominant tokens and merges the others into a few."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..registry import did_you_mean
from .rows import take

SCORES = ("query", "largest", "mean")


class MergedTokens(NamedTuple):
    """y: (B, M, D), zero beyond a row's tokens. mask: bool (B, M), True for a token. source: int64 (B, M), the place in
    the input of the token, for a contextual one that of its target; -1 beyond."""

    y: Tensor
    mask: Tensor
    source: Tensor


class TokenMerging(nn.Module):
    """Segment-level token merging of TimeAudio, arXiv:2511.11039: M tokens from L, segment by segment. No parameters.

    A row of L > tokens_per_window tokens is cut into floor(segments_per_window L / tokens_per_window) segments of equal
    length, the last of which takes the rest; a shorter row stays as it is. A segment of n tokens keeps the num_dominant
    of the highest score, in time order. Of the R = n - num_dominant others every (R // num_contextual)-th is a target,
    num_contextual in all, and every further one goes to the target of the largest cosine similarity; the contextual
    token of target t is x_t + mean of the tokens that went to it (x_t where none did). A segment of at most
    num_dominant + num_contextual tokens stays as it is. Contextual tokens follow the dominant ones of their segment.

    score: of a token, "query": attention received from a global query, softmax_i(q x_i / sqrt(D)) over its row, the
        query q being given or the mean of the row; ours. "largest": the largest weight of its attention row; ours.
        "mean": the mean of its attention row, the published one, which for a softmax row of S weights is 1 / S whatever
        they are, so that rounding chooses.

    Of equal scores the earlier token wins. Gradients pass through the kept values, not through the choice.
    Raises ValueError for counts below 1 (num_dominant: 0) and unknown scores.
    """

    def __init__(
        self,
        *,
        num_dominant: int = 22,
        num_contextual: int = 4,
        tokens_per_window: int = 88,
        segments_per_window: int = 2,
        score: str = "query",
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("num_dominant", num_dominant, 0),
            ("num_contextual", num_contextual, 1),
            ("tokens_per_window", tokens_per_window, 1),
            ("segments_per_window", segments_per_window, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} must be an integer of at least {least}")
        if segments_per_window > tokens_per_window:
            raise ValueError(
                f"segments_per_window={segments_per_window} is above tokens_per_window={tokens_per_window}: a segment "
                "would hold less than a token"
            )
        if score not in SCORES:
            raise ValueError(f"score={score!r} is unknown.{did_you_mean(score, SCORES)}")
        self.num_dominant, self.num_contextual, self.score = num_dominant, num_contextual, score
        self.tokens_per_window, self.segments_per_window = tokens_per_window, segments_per_window

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        query: Tensor | None = None,
        attention: Tensor | None = None,
        scores: Tensor | None = None,
    ) -> MergedTokens:
        """x: (B, L, D). mask: bool (B, L), True for a real token; the others are left out. query: (B, D), for "query".
        attention: (B, L, S), the weights with which each token was made from its S keys, for "largest" and "mean".
        scores: (B, L), in place of all that. Raises ValueError for other shapes and an attention that is missing."""
        self._check(x, mask, query, attention, scores)
        batch, length = x.shape[:2]
        if scores is None:
            scores = self._scores(x, mask, query, attention)
        real = torch.ones(batch, length, dtype=torch.bool, device=x.device) if mask is None else mask
        rows: dict[int, tuple[Tensor, Tensor]] = {}
        groups: dict[int, list[int]] = {}
        for row, number in enumerate(real.sum(1).tolist()):
            groups.setdefault(number, []).append(row)
        for number, members in groups.items():
            index = torch.tensor(members, device=x.device)
            place = real[index].nonzero()[:, 1].view(len(members), number)
            merged, source = self._rows(take(x[index], place), take(scores[index], place))
            source = take(place, source)
            rows.update(zip(members, zip(merged, source, strict=True), strict=True))
        if not batch:
            return MergedTokens(x[:, :0], real[:, :0], real[:, :0].long())
        parts = [rows[row] for row in range(batch)]
        longest = max(len(source) for _, source in parts)
        y = torch.stack([F.pad(y, (0, 0, 0, longest - len(y))) for y, _ in parts])
        source = torch.stack([F.pad(source, (0, longest - len(source)), value=-1) for _, source in parts])
        return MergedTokens(y, source >= 0, source)

    def num_tokens(self, length: int) -> int:
        """Tokens that a row of so many real ones becomes."""
        if length <= self.tokens_per_window:
            return length
        most = self.num_dominant + self.num_contextual
        return sum(min(end - start, most) for start, end in self.segments(length))

    def segments(self, length: int) -> list[tuple[int, int]]:
        """Start and end of each segment of a row of so many tokens; one where nothing is merged."""
        if length <= self.tokens_per_window:
            return [(0, length)]
        number = self.segments_per_window * length // self.tokens_per_window
        size = length // number
        return [(i * size, (i + 1) * size if i < number - 1 else length) for i in range(number)]

    def _rows(self, x: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (R, L, D) of real tokens only, to (R, M, D) and the places (R, M) they stem from."""
        count, length, dim = x.shape
        if length <= self.tokens_per_window:
            return x, torch.arange(length, device=x.device).expand(count, -1)
        *equal, (last, _) = self.segments(length)
        parts, places = [], []
        if equal:
            size = equal[0][1]
            y, place = self._segment(
                x[:, :last].reshape(count * len(equal), size, dim), scores[:, :last].reshape(count * len(equal), size)
            )
            start = torch.arange(len(equal), device=x.device).view(1, -1, 1) * size
            parts.append(y.reshape(count, -1, dim))
            places.append((place.view(count, len(equal), -1) + start).flatten(1))
        y, place = self._segment(x[:, last:], scores[:, last:])
        return torch.cat([*parts, y], 1), torch.cat([*places, place + last], 1)

    def _segment(self, x: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Segments (N, n, D) with scores (N, n), to (N, min(n, num_dominant + num_contextual), D) and places."""
        count, size = x.shape[:2]
        if size <= self.num_dominant + self.num_contextual:
            return x, torch.arange(size, device=x.device).expand(count, -1)
        order = scores.argsort(dim=1, descending=True, stable=True)
        kept, rest = order[:, : self.num_dominant].sort(1).values, order[:, self.num_dominant :].sort(1).values
        others = take(x, rest)
        step = rest.shape[1] // self.num_contextual
        chosen = torch.zeros(rest.shape[1], dtype=torch.bool, device=x.device)
        chosen[torch.arange(self.num_contextual, device=x.device) * step] = True
        targets, merged = others[:, chosen], others[:, ~chosen]
        with torch.no_grad():
            likeness = F.normalize(merged.float(), dim=-1) @ F.normalize(targets.float(), dim=-1).mT
            goes = F.one_hot(likeness.argmax(-1), self.num_contextual).to(x.dtype)
        mean = goes.mT @ merged / goes.sum(1).clamp_min(1).unsqueeze(-1)
        return torch.cat((take(x, kept), targets + mean), 1), torch.cat((kept, rest[:, chosen]), 1)

    @torch.no_grad()
    def _scores(self, x: Tensor, mask: Tensor | None, query: Tensor | None, attention: Tensor | None) -> Tensor:
        if self.score == "query":
            real = x.new_ones(x.shape[:2]) if mask is None else mask.to(x.dtype)
            x = x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0)
            if query is None:
                query = x.sum(1) / real.sum(1, keepdim=True).clamp_min(1)
            products = torch.einsum("bld,bd->bl", x.float(), query.float()) * x.shape[-1] ** -0.5
            # A row without a token would be 0 / 0: a finite number stands for minus infinity.
            return products.masked_fill(real == 0, torch.finfo(products.dtype).min).softmax(1)
        if attention is None:
            raise ValueError(f'score={self.score!r} needs attention (B, L, S); without it take score="query" or scores')
        return attention.mean(-1) if self.score == "mean" else attention.amax(-1)

    def _check(
        self, x: Tensor, mask: Tensor | None, query: Tensor | None, attention: Tensor | None, scores: Tensor | None
    ) -> None:
        if x.dim() != 3:
            raise ValueError(f"TokenMerging: x has shape {tuple(x.shape)}, expected (B, L, D)")
        batch, length, dim = x.shape
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (batch, length)):
            raise ValueError(f"TokenMerging: mask is {mask.dtype} {tuple(mask.shape)}, expected bool {(batch, length)}")
        for name, tensor, shape in (("query", query, (batch, dim)), ("scores", scores, (batch, length))):
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"TokenMerging: {name} has shape {tuple(tensor.shape)}, expected {shape}")
        if attention is not None and (attention.dim() != 3 or attention.shape[:2] != (batch, length)):
            raise ValueError(
                f"TokenMerging: attention has shape {tuple(attention.shape)}, expected ({batch}, {length}, S)"
            )

    def extra_repr(self) -> str:
        return (
            f"num_dominant={self.num_dominant}, num_contextual={self.num_contextual}, "
            f"tokens_per_window={self.tokens_per_window}, segments_per_window={self.segments_per_window}, "
            f"score={self.score}"
        )
