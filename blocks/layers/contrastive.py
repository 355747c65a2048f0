"""How well long recordings and texts fit: CoLLAP's scores over clips and words, and the contrastive loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..registry import did_you_mean

SCORES = ("global", "attention", "token")
FUSIONS = ("mean", "learned")
MAX_SCALE = 100.0  # of the logits, as in CLIP
_BELOW = -2.0  # below every cosine


def clip_text_scores(
    clips: Tensor,
    text: Tensor,
    tokens: Tensor | None = None,
    *,
    clip_mask: Tensor | None = None,
    token_mask: Tensor | None = None,
    scores: Sequence[str] = SCORES,
    attention_temperature: float = 0.1,
    tile: int = 1 << 22,
) -> Tensor:
    """Each recording with each text, (S, B, C) in [-1, 1], one matrix for each of the `scores`.

    After CoLLAP (arXiv:2410.02271), of which no code is public: the formulas are ours and follow its abstract.

    clips a_1 .. a_n of a recording, the words w_1 .. w_m of a text and its vector t are brought to length 1 first.
    "global": cos(mean_i a_i, t). "attention": sum_i alpha_i a_i.t, alpha = softmax_i(a_i.t / temperature).
    "token": sum_j beta_j x_j, x_j = max_i a_i.w_j, beta = softmax_j(x_j / temperature).
    None depends on the order of the clips or of the words; with one clip and one word w = t all are cos(a, t).

    clips: floating (B, n, D). text: (C, D). tokens: (C, m, D), for "token". clip_mask, token_mask: bool (B, n), (C, m),
    True = real; None when all are. A recording without clips and a text without words have the score 0. tile: numbers
    that are held at a time: of B * C * n * m, which "token" goes through, what is kept is B * C * m. At least float32.
    Raises ValueError for other shapes, unknown scores, a temperature of 0 or less, and missing tokens.
    """
    _check(clips, text, tokens, clip_mask, token_mask, scores, attention_temperature)
    kind = torch.promote_types(clips.dtype, torch.float32)
    with torch.autocast(clips.device.type, enabled=False):
        t = F.normalize(text.to(kind), dim=-1)
        a, real = _unit_rows(clips.to(kind), clip_mask)
        found = []
        for name in scores:
            if name == "global":
                mean = a.sum(1) / real.sum(1, keepdim=True).clamp_min(1)
                found.append(F.normalize(mean, dim=-1) @ t.mT)
            elif name == "attention":
                found.append(_tiled(_attention, (a, real), (t,), attention_temperature, tile, a.shape[1]))
            elif tokens is not None:
                words = _unit_rows(tokens.to(kind), token_mask)
                each = a.shape[1] * words[0].shape[1]
                found.append(_tiled(_words, (a, real), words, attention_temperature, tile, each))
        return torch.stack(found)


def info_nce(similarity: Tensor, scale: Tensor | float, groups: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE (CLIP, arXiv:2103.00020) of pairs: the mean of -log softmax(scale s)_bb over rows and over
    columns, half each.

    similarity: (B, B), recording b with text c; pair b stands on the diagonal. groups: int64 (B,), pairs with the same
    number (the same text, say) are right answers of each other, in equal shares; None: each is its own.
    """
    if similarity.dim() != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(f"similarity has the shape {tuple(similarity.shape)}, expected (B, B)")
    logits = similarity * scale
    if groups is None:
        own = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.mT, own)) / 2
    right = (groups.unsqueeze(0) == groups.unsqueeze(1)).to(logits.dtype)
    right = right / right.sum(1, keepdim=True)
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.mT, right)) / 2


class ContrastiveScore(nn.Module):
    """The fused score of recordings and texts, (B, C) in [-1, 1], and its loss.

    scores: of `clip_text_scores`. fusion: "mean" of them, or "learned": their sum with weights softmax(fusion_logits),
    which start equal. temperature: tau of the loss at the start; 1 / tau is learned and stays below MAX_SCALE.
    attention_temperature: of the softmaxes over clips and words. tile: as there. Raises ValueError for unknown names
    and temperatures of 0 or less.
    """

    def __init__(
        self,
        scores: Sequence[str] = SCORES,
        *,
        fusion: str = "mean",
        temperature: float = 0.07,
        attention_temperature: float = 0.1,
        tile: int = 1 << 22,
    ) -> None:
        super().__init__()
        _check_scores(scores)
        if fusion not in FUSIONS:
            raise ValueError(f"fusion={fusion!r} is not a choice.{did_you_mean(str(fusion), FUSIONS)}")
        for name, value in (("temperature", temperature), ("attention_temperature", attention_temperature)):
            if not value > 0:
                raise ValueError(f"{name}={value} must be above 0")
        self.scores, self.fusion, self.tile = tuple(scores), fusion, tile
        self.attention_temperature = attention_temperature
        self.logit_scale = nn.Parameter(torch.tensor(min(-math.log(temperature), math.log(MAX_SCALE))))
        self.fusion_logits = nn.Parameter(torch.zeros(len(self.scores))) if fusion == "learned" else None

    @property
    def needs_tokens(self) -> bool:
        return "token" in self.scores

    @property
    def weights(self) -> Tensor:
        """Of the scores, (S,): positive, their sum is 1."""
        if self.fusion_logits is None:
            return torch.full((len(self.scores),), 1 / len(self.scores), device=self.logit_scale.device)
        return self.fusion_logits.softmax(0)

    def forward(
        self,
        clips: Tensor,
        text: Tensor,
        tokens: Tensor | None = None,
        *,
        clip_mask: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        """Arguments as of `clip_text_scores`."""
        found = clip_text_scores(
            clips,
            text,
            tokens if self.needs_tokens else None,
            clip_mask=clip_mask,
            token_mask=token_mask,
            scores=self.scores,
            attention_temperature=self.attention_temperature,
            tile=self.tile,
        )
        return torch.einsum("s,sbc->bc", self.weights.to(found.dtype), found)

    def loss(self, similarity: Tensor, groups: Tensor | None = None) -> Tensor:
        """`info_nce` at the learned scale. similarity: (B, B), what `forward` gives for B pairs."""
        if self.training:
            with torch.no_grad():  # not in the graph: beyond it there would be no gradient that leads back
                self.logit_scale.clamp_(max=math.log(MAX_SCALE))
        return info_nce(similarity, self.logit_scale.exp(), groups)

    @torch.no_grad()
    def clip_relevance(
        self, clips: Tensor, text: Tensor, tokens: Tensor | None = None, *, token_mask: Tensor | None = None
    ) -> Tensor:
        """How well each clip alone fits its recording's text, (B, n) in [-1, 1]: the fused score of that clip.

        clips: (B, n, D). text: (B, D). tokens: (B, m, D), token_mask: bool (B, m): of one text for each recording.
        """
        rows = []
        for row, own in enumerate(clips):
            words = None if tokens is None else tokens[row : row + 1]
            real = None if token_mask is None else token_mask[row : row + 1]
            rows.append(self(own.unsqueeze(1), text[row : row + 1], words, token_mask=real)[:, 0])
        return torch.stack(rows)

    def extra_repr(self) -> str:
        return f"{', '.join(self.scores)}, fusion={self.fusion}, attention_temperature={self.attention_temperature}"


def _unit_rows(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Vectors of length 1, those that are not real 0, and which are: (N, n, D), bool (N, n)."""
    if mask is None:
        return F.normalize(x, dim=-1), torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    return F.normalize(x.masked_fill(~mask.unsqueeze(-1), 0), dim=-1), mask


def _tiled(
    score: Callable[..., Tensor],
    recordings: tuple[Tensor, ...],
    texts: tuple[Tensor, ...],
    temperature: float,
    tile: int,
    each: int,
) -> Tensor:
    """(B, C) from squares of pairs, as many at a time as `tile` numbers hold. each: numbers of one pair."""
    side = max(1, math.isqrt(tile // max(each, 1)))
    rows = []
    for begin in range(0, len(recordings[0]), side):
        own = [x[begin : begin + side] for x in recordings]
        columns = [
            score(*own, *(x[first : first + side] for x in texts), temperature=temperature)
            for first in range(0, len(texts[0]), side)
        ]
        rows.append(torch.cat(columns, 1))
    return torch.cat(rows)


def _attention(a: Tensor, real: Tensor, t: Tensor, *, temperature: float) -> Tensor:
    """a: (b, n, D). real: (b, n). t: (c, D). Returns (b, c)."""
    return _softmax_mean((a @ t.mT).mT, real.unsqueeze(1), temperature)


def _words(a: Tensor, real: Tensor, w: Tensor, mask: Tensor, *, temperature: float) -> Tensor:
    """a: (b, n, D). real: (b, n). w: (c, m, D). mask: (c, m). Returns (b, c)."""
    fit = (a.flatten(0, 1) @ w.flatten(0, 1).mT).unflatten(0, a.shape[:2]).unflatten(-1, w.shape[:2])
    # max keeps places (b, c, m) for the backward pass, where amax would keep all of (b, n, c, m)
    best = fit.masked_fill(~real[:, :, None, None], _BELOW).max(1).values
    return _softmax_mean(best, real.any(1)[:, None, None] & mask, temperature)


def _softmax_mean(x: Tensor, real: Tensor, temperature: float) -> Tensor:
    """sum_i p_i x_i over the last axis, p = softmax of x / temperature over the real ones; 0 where none is."""
    weight = (x / temperature).masked_fill(~real, -torch.finfo(x.dtype).max).softmax(-1)
    return (weight * x).masked_fill(~real, 0).sum(-1)


def _check_scores(scores: Sequence[str]) -> None:
    if isinstance(scores, str) or not scores or len(set(scores)) < len(scores):
        raise ValueError(f"scores={scores!r} must be a list of different ones among {', '.join(SCORES)}")
    for name in scores:
        if name not in SCORES:
            raise ValueError(f"scores has {name!r}, which is unknown.{did_you_mean(str(name), SCORES)}")


def _check(
    clips: Tensor,
    text: Tensor,
    tokens: Tensor | None,
    clip_mask: Tensor | None,
    token_mask: Tensor | None,
    scores: Sequence[str],
    temperature: float,
) -> None:
    _check_scores(scores)
    if not temperature > 0:
        raise ValueError(f"attention_temperature={temperature} must be above 0")
    if clips.dim() != 3 or text.dim() != 2 or clips.shape[-1] != text.shape[-1]:
        raise ValueError(
            f"clips have the shape {tuple(clips.shape)}, text {tuple(text.shape)}; expected (B, n, D), (C, D)"
        )
    if tokens is None:
        if "token" in scores:
            raise ValueError('the score "token" needs tokens (C, m, D), the vectors of the words')
    elif tokens.dim() != 3 or tokens.shape[0] != len(text) or tokens.shape[-1] != text.shape[-1]:
        raise ValueError(f"tokens have the shape {tuple(tokens.shape)}, expected ({len(text)}, m, {text.shape[-1]})")
    for name, mask, like in (("clip_mask", clip_mask, clips), ("token_mask", token_mask, tokens)):
        if mask is not None and like is not None and (mask.shape != like.shape[:2] or mask.dtype != torch.bool):
            raise ValueError(f"{name} is {mask.dtype} {tuple(mask.shape)}, expected bool {tuple(like.shape[:2])}")
