"""The LightningModule of grounding: scores and edges of frames, long videos in windows, spans and how good they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ....blocks.protocol import Mixer
from ....zoo._video import VideoOutput
from ....zoo.video import VideoGrounder
from ...errors import UserError
from ...nets import create_net
from ...ranks import every_rank
from ...training import TrainingModule
from ..spans import Levels, Span, frame_cells, score_spans
from .scores import GroundingSums, best_threshold
from .videos import GroundingVideo, Seen

# Of which validation takes the one with the best mIoU.
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
LARGEST_WEIGHT = 20.0
_SHOWN = ("miou", "recall_at_0.5", "precision_at_0.5", "event_f1")
Batch = dict[str, Tensor]


class FrameScores(NamedTuple):
    """Of a query: probabilities float32 (N,), and logits of being the first and the last frame, float32 (N, 2)."""

    probabilities: np.ndarray
    edges: np.ndarray


def grounding_loss(out: VideoOutput, batch: Batch, *, weight: float, edge_weight: float) -> tuple[Tensor, Tensor]:
    """Two losses: of the frames, the mean over real ones of -w y log p - (1 - y) log(1 - p); and edge_weight times that
    of the edges, the cross entropy between the softmax over the real frames of a row and the share of its spans that
    begin (end) there, mean over rows with a span, start and end (VSLNet, arXiv:2004.13931, eq. 9, here of several).

    out: logits (B, T), boundaries (B, T, 2). weight: w.
    """
    mask = batch["mask"]
    factor = torch.tensor(weight, device=out.y.device)
    frames = F.binary_cross_entropy_with_logits(out.y.float(), batch["inside"], pos_weight=factor, reduction="none")
    frames = (frames * mask).sum() / mask.sum().clamp_min(1)
    if out.boundaries is None or not edge_weight:
        return frames, frames.new_zeros(())
    log = out.boundaries.float().masked_fill(~mask.unsqueeze(-1), -torch.inf).log_softmax(1)
    each = -(batch["edges"] * log.masked_fill(~mask.unsqueeze(-1), 0)).sum(1)  # (B, 2)
    rows = batch["inside"].any(1)
    return frames, edge_weight * each[rows].sum() / (2 * rows.sum()).clamp_min(1)


def with_cosine(features: Tensor, query: Tensor, mask: Tensor | None = None) -> Tensor:
    """Vectors of frames (B, T, D) with two more channels: c, the cosine with the query (B, D), and a tenth of how many
    standard deviations c is above its mean over the real frames of the window; 0 at pads."""
    cosine = F.cosine_similarity(features, query.unsqueeze(1), dim=-1)
    real = torch.ones_like(cosine) if mask is None else mask.to(cosine)
    number = real.sum(1, keepdim=True).clamp_min(1)
    centred = (cosine - (cosine * real).sum(1, keepdim=True) / number) * real
    spread = (centred.square().sum(1, keepdim=True) / number).sqrt()
    return torch.cat((features, torch.stack((cosine * real, 0.1 * centred / (spread + 1e-3)), -1)), -1)


def rotation(dim: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix (dim, dim), uniform: Q of a Gaussian matrix with the signs of R's diagonal."""
    q, r = torch.linalg.qr(torch.randn(dim, dim, generator=generator))
    return q * r.diagonal().sign()


class VideoGroundingModule(TrainingModule):
    """Trains a grounder; videos of any length are looked at in windows, and found spans scored as spans.

    model: {"name", **options} of a zoo model, to which the data give the widths of frames and queries. task: cosine
    (whether the model is also given what `with_cosine` adds), weight_power (a frame within a span counts
    ((1 - f) / f)^power times, f the share of such, at most 20), edge_weight (see `grounding_loss`), rotate (the share
    of batches whose vectors of frames and queries are turned together by a random rotation: it keeps how they relate
    and hides which ones they are, so that few labels are not learned by heart), noise (standard deviation of noise on
    the vectors of frames, as a part of their length), window and window_overlap (seconds) and windows_at_once of the
    evaluation, threshold (None: the one with the best mIoU in validation), low_ratio, max_gap, min_seconds (see
    `score_spans`), refine_seconds (see `refine`), seed.
    schema: `VideoGroundingData.schema()`. mixer_class: of a user's own mixer.
    """

    net: VideoGrounder
    threshold: Tensor
    loss_name = "nats per frame"

    def __init__(
        self,
        model: dict[str, Any],
        task: dict[str, Any],
        optimizer: dict[str, Any],
        scheduler: dict[str, Any],
        schema: dict[str, Any],
        mixer_class: type[Mixer] | None = None,
    ) -> None:
        super().__init__(optimizer=optimizer, scheduler=scheduler)
        self.save_hyperparameters(
            {"model": model, "task": task, "optimizer": optimizer, "scheduler": scheduler, "schema": schema}
        )
        self.task, self.schema = dict(task), dict(schema)
        for name in ("rotate", "noise", "edge_weight", "weight_power"):
            value = task.get(name, 0.0)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
                raise UserError(f"task.{name}={value!r} must be a number of at least 0")
        options = {k: v for k, v in model.items() if k != "name"}
        encoder = options.get("encoder", {})
        kind = encoder if isinstance(encoder, str) else encoder.get("name", "features")
        if kind != "features":
            raise UserError(
                f"model.encoder.name={kind!r}: grounding reads vectors of data.scorer, model.encoder.name=features"
            )
        self.windows()
        self.cosine = bool(task.get("cosine", True))
        dim = int(schema["dim"])
        options |= {"encoder": {"name": "features", "dim": dim + 2 * self.cosine}, "query_dim": dim}
        self.net = create_net(model["name"], options, mixer_class, VideoGrounder, "grounder of moments")
        self.net.set_grad_checkpointing(bool(task.get("grad_checkpointing")))
        share = min(max(float(schema["inside"]), 1e-6), 1 - 1e-6)
        power = float(task.get("weight_power", 0.5))
        self.weight = min(max(((1 - share) / share) ** power, 1.0), LARGEST_WEIGHT)
        self.register_buffer("threshold", torch.tensor(0.5))
        self.test_sums = GroundingSums()
        self.found: dict[tuple[str, str], list[Span]] = {}

    # training ---------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        features, query = self._augmented(batch)
        out = self.answer(features, query, batch["mask"], batch["times"])
        own_frames, own_edges = self._loss(out, batch)
        frames, seen_frames, _ = self.over_ranks(own_frames, batch["mask"].sum())
        edges, seen_edges, _ = self.over_ranks(own_edges, batch["inside"].any(1).sum())
        number, seen = len(query), seen_frames + seen_edges
        self.log("train/loss", seen, on_step=True, on_epoch=True, prog_bar=True, batch_size=number)
        self.log("train/frame_loss", seen_frames, on_step=False, on_epoch=True, batch_size=number)
        self.log_auxiliary(out.aux, number)
        self.check_loss(seen + sum(out.aux.values()), batch_idx)
        return frames + edges + sum(out.aux.values())

    def answer(self, features: Tensor, query: Tensor, mask: Tensor | None, times: Tensor) -> VideoOutput:
        """What the model makes of vectors of frames (B, T, D) and queries (B, D)."""
        return self.net(with_cosine(features, query, mask) if self.cosine else features, query, mask, times)

    def _loss(self, out: VideoOutput, batch: Batch) -> tuple[Tensor, Tensor]:
        return grounding_loss(out, batch, weight=self.weight, edge_weight=float(self.task.get("edge_weight", 0.0)))

    def _augmented(self, batch: Batch) -> tuple[Tensor, Tensor]:
        features, query = batch["features"], batch["query"]
        seed = hash((int(self.task.get("seed", 0)), self.global_step, self.global_rank)) % 2**63
        generator = torch.Generator().manual_seed(seed)
        if noise := float(self.task.get("noise", 0.0)):
            drawn = torch.randn(features.shape, generator=generator) * (noise / features.shape[-1] ** 0.5)
            features = F.normalize(features + drawn.to(features), dim=-1) * features.norm(dim=-1, keepdim=True)
        if torch.rand((), generator=generator) < float(self.task.get("rotate", 0.0)):
            turn = rotation(features.shape[-1], generator).to(features)
            features, query = features @ turn, query @ turn
        return features, query

    # long videos ------------------------------------------------------------------------------------------------------

    def windows(self) -> tuple[int, int]:
        """Frames of a window and of what two of them share. Raises UserError for an overlap that leaves nothing."""
        seconds = float(self.task.get("window") or self.schema["window"])
        overlap, fps = float(self.task.get("window_overlap", 20.0)), float(self.schema["fps"])
        if not 0 <= overlap < seconds:
            raise UserError(f"task.window_overlap={overlap:g} must be below the window of {seconds:g} seconds")
        frames = max(round(seconds * fps), 1)
        return frames, min(round(overlap * fps), frames - 1)

    @torch.inference_mode()
    def scores(self, seen: Seen, query: np.ndarray) -> FrameScores:
        """Of every frame of a video of any length: windows, of each of which the middle counts; the last one ends with
        the video. Memory is that of `windows_at_once` windows."""
        size, overlap = self.windows()
        total = len(seen.times)
        found = np.empty((total, 3), np.float32)
        starts = [0] if total <= size else [*range(0, total - size, size - overlap), total - size]
        vector = torch.from_numpy(np.asarray(query, np.float32)).to(self.device)
        at_once = max(int(self.task.get("windows_at_once", 8)), 1)
        features = torch.from_numpy(seen.features)
        times = torch.from_numpy(np.ascontiguousarray(seen.times))
        for begin in range(0, len(starts), at_once):
            group = starts[begin : begin + at_once]
            own = torch.stack([features[start : start + size] for start in group]).to(self.device)
            when = torch.stack([times[start : start + size] - times[start] for start in group]).to(self.device)
            out = self.answer(own, vector.expand(len(group), -1), None, when)
            edges = torch.zeros(*out.y.shape, 2) if out.boundaries is None else out.boundaries.float().cpu()
            values = torch.cat((out.y.float().sigmoid().cpu().unsqueeze(-1), edges), -1).numpy()
            for row, start in enumerate(group):
                # what is nearer to the edge of this window than to that of the one before is from there
                left = 0 if start == 0 else (starts[begin + row - 1] + size - start) // 2
                found[start + left : start + size] = values[row, left:]
        return FrameScores(found[:, 0], found[:, 1:])

    def decode(self, seen: Seen, scores: FrameScores, duration: float, threshold: float | None = None) -> list[Span]:
        """The spans of a query, by start."""
        threshold = float(self.threshold) if threshold is None else threshold
        spans = score_spans(
            seen.times,
            scores.probabilities,
            levels=Levels(threshold, threshold * float(self.task.get("low_ratio", 1.0))),
            max_gap=float(self.task.get("max_gap", 0.0)),
            min_seconds=float(self.task.get("min_seconds", 0.0)),
            start=0.0,
            end=duration,
        )
        return refine(spans, seen.times, scores.edges, duration, float(self.task.get("refine_seconds", 0.0)))

    # evaluation -------------------------------------------------------------------------------------------------------

    def set_queries(self, queries: dict[str, np.ndarray]) -> None:
        """The vectors of what evaluated videos are asked for."""
        self.queries = dict(queries)

    def on_validation_epoch_start(self) -> None:
        fixed = self.task.get("threshold")
        self._sums = {x: GroundingSums() for x in (THRESHOLDS if fixed is None else (float(fixed),))}
        self._losses = torch.zeros(2, dtype=torch.float64)

    def validation_step(self, batch: dict[str, GroundingVideo], batch_idx: int) -> None:
        video = batch["video"]
        seen = video.seen()
        for text, truth in video.queries:
            scores = self.scores(seen, self.queries[text])
            inside = np.zeros(len(seen.times), np.float32)
            for start, end in truth:
                inside[(seen.times >= start) & (seen.times < end)] = 1
            chances = np.clip(scores.probabilities.astype(np.float64), 1e-7, 1 - 1e-7)
            loss = -(self.weight * inside * np.log(chances) + (1 - inside) * np.log(1 - chances))
            self._losses += torch.tensor([float(loss.sum()), len(loss)], dtype=torch.float64)
            for threshold, sums in self._sums.items():
                spans = self.decode(seen, scores, video.duration, threshold)
                sums.update(truth, [(span.start, span.end) for span in spans], seen.times)

    def on_validation_epoch_end(self) -> None:
        self._losses = self._over_ranks(self._losses)
        flat = {threshold: self._over_ranks(sums.flat) for threshold, sums in self._sums.items()}
        best = best_threshold(flat)
        self.threshold.fill_(best)
        sums = GroundingSums()
        sums.flat = flat[best]
        found = sums.compute()
        values = {key: found[key] for key in _SHOWN}
        values |= {"loss": float(self._losses[0] / self._losses[1].clamp_min(1)), "threshold": best}
        self.log_dict({f"val/{key}": value for key, value in values.items()}, prog_bar=True, rank_zero_only=True)

    def on_test_epoch_start(self) -> None:
        self.test_sums, self.found = GroundingSums(), {}

    def test_step(self, batch: dict[str, GroundingVideo], batch_idx: int) -> None:
        video = batch["video"]
        seen = video.seen()
        for text, truth in video.queries:
            spans = self.decode(seen, self.scores(seen, self.queries[text]), video.duration)
            self.found[video.name, text] = spans
            self.test_sums.update(truth, [(span.start, span.end) for span in spans], seen.times)

    def on_test_epoch_end(self) -> None:
        self.test_sums.flat = self._over_ranks(self.test_sums.flat)
        self.found = {key: spans for found in every_rank(self.found) for key, spans in found.items()}
        found = self.test_sums.compute()
        self.log_dict({f"test/{key}": found[key] for key in _SHOWN}, rank_zero_only=True)

    def _over_ranks(self, flat: Tensor) -> Tensor:
        return self.sum_over_ranks(flat) if self.trainer.world_size > 1 else flat


def refine(spans: Sequence[Span], times: np.ndarray, edges: np.ndarray, duration: float, seconds: float) -> list[Span]:
    """Spans whose start (end) is that of the likeliest first (last) frame within so many seconds of it; 0: as they are.

    edges: (N, 2), logits. A span that would end before it starts stays as it is; spans that come to touch are one.
    """
    if not seconds:
        return list(spans)
    cells = frame_cells(times, start=0.0, end=duration)
    found: list[Span] = []
    for span in spans:
        moved = []
        for side, place in enumerate((span.start, span.end)):
            near = np.flatnonzero(np.abs(cells[:, side] - place) <= seconds)
            moved.append(float(cells[near[edges[near, side].argmax()], side]) if len(near) else place)
        start, end = moved if moved[0] < moved[1] else (span.start, span.end)
        if found and start <= found[-1].end:
            before = found[-1]
            found[-1] = Span(before.start, max(before.end, end), max(before.score, span.score))
        else:
            found.append(Span(start, end, span.score))
    return found
