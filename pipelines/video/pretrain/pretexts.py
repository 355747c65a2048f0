"""What a model is trained on when videos have no labels. A pretext has a loss, a score, and what guessing scores."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....blocks.layers.ranks import num_ranks, own_rows
from ....zoo._video import per_frame
from ....zoo.selective_s4 import LongShortContrast
from ....zoo.video import VideoClassifier
from ...errors import UserError, nearest
from ..classify.module import VideoNet

PRETEXTS = ("order", "masked", "lsmcl")


class Judged(NamedTuple):
    """loss: a scalar. score: in the mean over clips, a scalar. guess: what guessing scores. aux: scalar losses. number:
    of what the loss is a mean over; None: it is that of all processes."""

    loss: Tensor
    score: Tensor
    guess: float
    aux: dict[str, Tensor]
    number: Tensor | int | None


class Pretext(nn.Module):
    """net: the model, in it what a later task takes over. score_name: what `Judged.score` is."""

    score_name: str
    num_classes: int = 1

    def forward(self, batch: dict[str, Tensor], generator: torch.Generator) -> Judged:
        """batch: frames (B, T, ...), mask, times. generator: of the CPU, all that is random; in training of all
        processes the same one."""
        raise NotImplementedError(f"{type(self).__name__} must define forward")


class SegmentOrder(Pretext):
    """Order prediction: the frames are cut in `segments` runs of equal length, these are shuffled, and the head of the
    model says by which of the segments! permutations, cross entropy (clip order prediction, Xu et al., CVPR 2019, with
    any model in place of a network for each clip). Times go with their places, not with the frames."""

    score_name = "accuracy"

    def __init__(self, net: VideoNet, *, segments: int) -> None:
        super().__init__()
        self.net, self.segments = net, segments
        self.register_buffer("orders", torch.tensor(list(itertools.permutations(range(segments)))), persistent=False)

    orders: Tensor

    def forward(self, batch: dict[str, Tensor], generator: torch.Generator) -> Judged:
        frames = batch["frames"]
        kinds = len(self.orders)
        chosen = own_rows(
            len(frames), lambda n: torch.randint(kinds, (n,), generator=generator), shared=self.training
        ).to(frames.device)
        out = self.net(self.shuffled(frames, chosen), None, batch["times"])
        right = (out.y.argmax(1) == chosen).float().mean()
        return Judged(F.cross_entropy(out.y.float(), chosen), right, 1 / kinds, out.aux, len(frames))

    def shuffled(self, frames: Tensor, chosen: Tensor) -> Tensor:
        """Segment j of row b is its segment orders[chosen[b], j]."""
        length = frames.shape[1] // self.segments
        place = (self.orders[chosen] * length).repeat_interleave(length, 1)
        place = place + torch.arange(length, device=frames.device).repeat(self.segments)
        return torch.stack([row[own] for row, own in zip(frames, place, strict=True)])


class MaskedFrames(Pretext):
    """Masked-feature prediction (after MaskFeat, arXiv:2112.09133): a share mask_ratio of the frames of each clip is
    replaced by a learned vector, and a linear map of its tokens tells what the vectors of the hidden frames were: mean
    squared error to these, each normalised to mean 0 and variance 1 over its channels. Score: 1 - error / variance
    about the mean of the clip's seen frames, so that 0 is what that mean says."""

    score_name = "explained"

    def __init__(self, net: VideoClassifier, dim: int, *, mask_ratio: float) -> None:
        super().__init__()
        self.net, self.mask_ratio = net, mask_ratio
        self.hidden = nn.Parameter(torch.zeros(dim))
        self.out = nn.Linear(net.encoder.dim, dim)

    def forward(self, batch: dict[str, Tensor], generator: torch.Generator) -> Judged:
        frames, real = batch["frames"], batch["mask"]
        hide = hidden_frames(real, self.mask_ratio, generator, shared=self.training)
        shown = torch.where(hide.unsqueeze(-1), self.hidden.to(frames.dtype), frames)
        tokens = self.net.encoder(shown, mask=real, times=batch["times"])
        found = self.out(per_frame(tokens, 1)).float()
        target = F.layer_norm(frames.float(), frames.shape[-1:])
        error = (found - target).square().mean(-1)[hide].mean()
        seen = (real & ~hide).unsqueeze(-1)
        mean = (target * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True).clamp_min(1)
        spread = (target - mean).square().mean(-1)[hide].mean()
        return Judged(error, (1 - error / spread.clamp_min(1e-12)).detach(), 0.0, tokens.aux, hide.sum())


class LongShort(Pretext):
    """LSMCL (see `LongShortContrast`): all frames against a run of a share short_ratio of them, the other clips of the
    batch are the negatives."""

    score_name = "right"

    def __init__(self, net: VideoNet, width: int, *, short_ratio: float, **options: Any) -> None:
        super().__init__()
        self.contrast, self.short_ratio = LongShortContrast(net, width, **options), short_ratio

    def forward(self, batch: dict[str, Tensor], generator: torch.Generator) -> Judged:
        frames = batch["frames"]
        total = frames.shape[1]
        length = max(1, round(total * self.short_ratio))
        room = total - length + 1
        first = own_rows(len(frames), lambda n: torch.randint(room, (n,), generator=generator), shared=self.training)
        short = torch.stack([row[begin : begin + length] for row, begin in zip(frames, first.tolist(), strict=True)])
        loss, found = self.contrast(frames, short, generator=generator)
        right = found.pop("right")
        rivals = len(frames) * (num_ranks() if self.training else 1)
        return Judged(loss, right, 1 / rivals, found, None)


def hidden_frames(real: Tensor, ratio: float, generator: torch.Generator, *, shared: bool = False) -> Tensor:
    """bool (B, T): a random share of each row's real frames, at least one and not all where it has two. shared: see
    `own_rows`."""
    number = real.sum(1)
    count = torch.minimum((number * ratio).round().long().clamp_min(1), (number - 1).clamp_min(1)).clamp_max(number)
    length = real.shape[1]
    noise = own_rows(len(real), lambda n: torch.rand(n, length, generator=generator), shared=shared)
    noise = noise.to(real.device).masked_fill(~real, 2.0)
    return noise.argsort(1).argsort(1) < count.unsqueeze(1)


def check_pretext(task: dict[str, Any], schema: dict[str, Any]) -> None:
    """Raise UserError for settings that make no sense or do not fit the data."""
    name = task["pretext"]
    if name not in PRETEXTS:
        raise UserError(f"task.pretext={name!r} is not a choice.{nearest(str(name), PRETEXTS)}")
    frames = schema["sampling"][0]
    if name != "masked" and frames is None:
        raise UserError(f"task.pretext={name} needs clips of one length: data.num_frames in place of data.fps")
    if name == "order":
        segments = task["segments"]
        if isinstance(segments, bool) or not isinstance(segments, int) or not 2 <= segments <= 5:
            raise UserError(f"task.segments={segments!r} must be from 2 to 5: there are segments! orders to tell apart")
        if frames % segments:
            raise UserError(
                f"task.segments={segments} does not divide data.num_frames={frames}; {frames // segments * segments} "
                "frames would do"
            )
    for key, low, high in (("mask_ratio", 0.0, 1.0), ("short_ratio", 0.0, 1.0)):
        value = task[key]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value < high:
            raise UserError(f"task.{key}={value!r} must be between {low:g} and {high:g}")
    if name == "masked" and (schema["features"] is None or schema["output"] != "pooled"):
        raise UserError("task.pretext=masked predicts vectors of frames: give data.features and data.output=pooled")


def head_classes(task: dict[str, Any]) -> int:
    """Classes of the model's own head: orders of segments, or none that count."""
    return math.factorial(task["segments"]) if task["pretext"] == "order" else 2


def create_pretext(net: VideoNet, task: dict[str, Any], schema: dict[str, Any]) -> Pretext:
    """Raises UserError for a model without a vector for each frame where the pretext needs one."""
    name = task["pretext"]
    if name == "order":
        return SegmentOrder(net, segments=task["segments"])
    if name == "masked":
        if not isinstance(net, VideoClassifier) or net.encoder.layout != "frames":
            raise UserError(
                "task.pretext=masked needs a model with a token for each frame: model=video_classifier_small with "
                "model.layout=frames"
            )
        return MaskedFrames(net, int(schema["dim"]), mask_ratio=float(task["mask_ratio"]))
    width = int(next(layer for layer in reversed(list(net.head.modules())) if isinstance(layer, nn.Linear)).in_features)
    return LongShort(
        net,
        width,
        short_ratio=float(task["short_ratio"]),
        temperature=float(task["temperature"]),
        momentum=float(task["momentum"]),
    )
