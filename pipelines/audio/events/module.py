"""The LightningModule of events: a score for each label and token, long recordings in windows, spans and their F1."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ....blocks.protocol import Mixer
from ....zoo.audio import EventDetector
from ...errors import UserError, nearest
from ...nets import create_net
from ...training import TrainingModule
from ..augmenting import Augmentation, step_generator
from ..streaming import Source, stream
from .decoding import Span, decode_events
from .recordings import EventRecording
from .scores import EventSums

CRITERIA = ("bce", "focal")
# Of which validation takes the one with the best event F1.
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
LARGEST_WEIGHT = 20.0
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class TokenScores(NamedTuple):
    """probabilities: float32 (L, C). first: the centre of the first token, step: from one to the next, in seconds."""

    probabilities: np.ndarray
    first: float
    step: float


def token_targets(times: Tensor, spans: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """float32 (B, L, C): 1 where the centre of a token lies in a span of the class, its end not included.

    times: float64 (L,), seconds. spans: float64 (B, N, 2). classes: int64 (B, N), -1 for none.
    """
    inside = (times >= spans[:, :, :1]) & (times < spans[:, :, 1:])  # (B, N, L)
    one_hot = F.one_hot(classes.clamp_min(0), num_classes) * (classes >= 0).unsqueeze(-1)
    return torch.einsum("bnl,bnc->blc", inside.float(), one_hot.float()).clamp_max(1)


def positive_weights(active: Tensor, power: float) -> Tensor:
    """How much more a token in which a label sounds counts than one without, w_c = ((1 - f_c) / f_c)^power, from 1 to
    20. active: f (C,), the share of the time in which each label sounds. power: 0 weighs nothing, 1 balances."""
    share = active.clamp(1e-6, 1 - 1e-6)
    return ((1 - share) / share).pow(power).clamp(1.0, LARGEST_WEIGHT)


def event_loss(
    logits: Tensor, targets: Tensor, lengths: Tensor, *, weights: Tensor, kind: str = "bce", gamma: float = 2.0
) -> Tensor:
    """Mean over the real tokens and the labels of -w_c y log p - (1 - y) log(1 - p), y the target and p = sigmoid(x).

    kind "focal": each term times (1 - p_t)^gamma, p_t the probability of what is true (arXiv:1708.02002, eq. 4).
    logits, targets: (B, L, C). lengths: int64 (B,), tokens. weights: (C,).
    """
    loss = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights, reduction="none")
    if kind == "focal":
        right = torch.where(targets > 0.5, logits, -logits).sigmoid()
        loss = loss * (1 - right) ** gamma
    real = torch.arange(logits.shape[1], device=logits.device) < lengths.unsqueeze(1)
    return (loss * real.unsqueeze(-1)).sum() / (real.sum().clamp_min(1) * logits.shape[2])


class AudioEventModule(TrainingModule):
    """Trains a detector of events; recordings of any length are heard in windows, and scored as spans.

    model: {"name", **options} of a zoo model. task: criterion ("bce" or "focal" with gamma), weight_power (see
    `positive_weights`), augment (see `Augmentation`), window and window_overlap (seconds) and windows_at_once of the
    evaluation, threshold (None: the one with the best event F1 in validation), low_ratio, median_seconds, max_gap and
    min_duration (see `EventDecoder`), seed. schema: `AudioEventData.schema()`. mixer_class: of a user's own mixer.
    """

    net: EventDetector
    threshold: Tensor
    weights: Tensor
    loss_name = "nats per token and label"

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
        self.augment = Augmentation.create(task.get("augment"))
        kind = task.get("criterion", "bce")
        if kind not in CRITERIA:
            raise UserError(f"task.criterion={kind!r} is not a choice.{nearest(str(kind), CRITERIA)}")
        if self.augment.mixup:
            raise UserError(
                "task.augment.mixup mixes clips of one label; composed recordings overlap with data.overlap"
            )
        options = {k: v for k, v in model.items() if k != "name"}
        options |= {"num_classes": len(schema["labels"]), "sample_rate": schema["sample_rate"]}
        self.net = create_net(model["name"], options, mixer_class, EventDetector, "detector of events")
        self.net.set_grad_checkpointing(bool(task.get("grad_checkpointing")))
        self.windows()  # raises for those that cannot be
        fixed = task.get("threshold")
        self.register_buffer("threshold", torch.tensor(0.5 if fixed is None else float(fixed), dtype=torch.float64))
        active = torch.tensor(schema["active"], dtype=torch.float32)
        self.register_buffer(
            "weights", positive_weights(active, float(task.get("weight_power", 0.5))), persistent=False
        )
        self.test_sums: dict[str, EventSums] = {}
        self.found: dict[str, list[Span]] = {}

    # training ---------------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        encoder, rate = self.net.encoder, self.schema["sample_rate"]
        generator = step_generator(int(self.task.get("seed", 0)), self.global_step, self.global_rank)
        samples, shift = self.augment.samples(batch["samples"], batch["lengths"], rate, generator)
        front = encoder.features(samples, batch["lengths"])
        features = self.augment.features(front.features, front.lengths, encoder.front_end, generator)
        out = self.net.detect(features, front.lengths)
        spans = batch["spans"] + (shift.double() / rate).to(batch["spans"].device).view(-1, 1, 1)
        own = self._loss(out.y, out.lengths, spans, batch["classes"])
        loss, seen, _ = self.over_ranks(own, out.lengths.sum())
        self.check_loss(seen + sum(out.aux.values()), batch_idx)
        total = loss + sum(out.aux.values())
        number = len(samples)
        self.log_auxiliary(out.aux, number)
        self.log("train/loss", seen, on_step=True, on_epoch=True, prog_bar=True, batch_size=number)
        return total

    def _loss(self, logits: Tensor, lengths: Tensor, spans: Tensor, classes: Tensor) -> Tensor:
        times = self.net.encoder.front_end.times(logits.shape[1]).to(logits.device)
        targets = token_targets(times, spans, classes, logits.shape[2])
        return event_loss(
            logits.float(),
            targets,
            lengths,
            weights=self.weights,
            kind=self.task.get("criterion", "bce"),
            gamma=float(self.task.get("gamma", 2.0)),
        )

    # whole recordings -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def logits(self, recording: Source, vectors: Tensor | None = None) -> Tensor:
        """float32 (L, C), on the CPU, as `stream` hears a recording: a model that streams with its state, any other in
        windows with half of `window_overlap` on either side. vectors: (N, text_dim), words in place of the labels."""

        def head(y: Tensor) -> Tensor:
            return self.net.answer(y) if vectors is None else self.net.score(y, vectors)

        seconds, overlap = self.windows()
        pieces = stream(
            self.net.encoder,
            head,
            recording,
            piece_seconds=seconds - overlap,
            context_seconds=overlap / 2,
            batch_size=int(self.task.get("windows_at_once", 8)),
        )
        found = [piece.values.float().cpu() for piece in pieces]
        return torch.cat(found) if found else torch.zeros(0, len(self.schema["labels"]))

    def windows(self) -> tuple[float, float]:
        """Seconds of a window and of what two of them share. Raises UserError for an overlap that leaves nothing."""
        seconds, overlap = float(self.task.get("window") or self.schema["window"]), self.task.get("window_overlap", 2.0)
        if not 0 <= overlap < seconds:
            raise UserError(f"task.window_overlap={overlap:g} must be below the window of {seconds:g} seconds")
        return seconds, float(overlap)

    def scores(self, recording: Source) -> TokenScores:
        """The probabilities of a recording's tokens and where they are."""
        return self._placed(self.logits(recording))

    def _placed(self, logits: Tensor) -> TokenScores:
        front = self.net.encoder.front_end
        probabilities = logits.double().sigmoid().float().numpy()
        return TokenScores(probabilities, float(front.times(1)[0]), front.hop_length / front.sample_rate)

    def decoder_options(self, threshold: float | None = None) -> dict[str, Any]:
        """Options of `EventDecoder` but for its place in time: those of the task with the threshold of validation."""
        front = self.net.encoder.front_end
        threshold = float(self.threshold) if threshold is None else threshold
        tokens = float(self.task.get("median_seconds", 0.0)) * front.sample_rate / front.hop_length
        return {
            "threshold": threshold,
            "low": threshold * float(self.task.get("low_ratio", 1.0)),
            "median": max(2 * round((tokens - 1) / 2) + 1, 1),  # the nearest odd number of tokens
            "max_gap": float(self.task.get("max_gap", 0.0)),
            "min_duration": float(self.task.get("min_duration", 0.0)),
        }

    def decode(self, scores: TokenScores, threshold: float | None = None) -> list[Span]:
        """Spans, by start."""
        return decode_events(
            scores.probabilities, first=scores.first, step=scores.step, **self.decoder_options(threshold)
        )

    # evaluation -------------------------------------------------------------------------------------------------------

    def _new_sums(self) -> EventSums:
        return EventSums(len(self.schema["labels"]))

    def on_validation_epoch_start(self) -> None:
        fixed = self.task.get("threshold")
        self._sums = {x: self._new_sums() for x in (THRESHOLDS if fixed is None else (float(fixed),))}
        self._losses = torch.zeros(2, dtype=torch.float64)

    def validation_step(self, batch: dict[str, EventRecording], batch_idx: int) -> None:
        recording = batch["recording"]
        logits = self.logits(recording)
        spans = torch.tensor([[start, end] for start, end, _ in recording.truth], dtype=torch.float64).view(1, -1, 2)
        classes = torch.tensor([label for _, _, label in recording.truth], dtype=torch.int64).view(1, -1)
        number = torch.tensor([len(logits)])
        loss = self._loss(*(x.to(self.device) for x in (logits.unsqueeze(0), number, spans, classes)))
        self._losses += torch.tensor([float(loss) * len(logits), len(logits)], dtype=torch.float64)
        scores = self._placed(logits)
        for threshold, sums in self._sums.items():
            sums.update(recording.truth, _bare(self.decode(scores, threshold)), recording.seconds)

    def on_validation_epoch_end(self) -> None:
        self._losses = self._over_ranks(self._losses)
        found = {}
        for threshold, sums in self._sums.items():
            sums.flat = self._over_ranks(sums.flat)
            found[threshold] = sums.compute()
        # the middle one of those that are equally good, as before any training
        best = max(found, key=lambda x: (np.nan_to_num(found[x]["event_f1"]), -abs(x - 0.5)))
        self.threshold.fill_(best)
        values = {key: found[best][key] for key in ("event_f1", "miou", "segment_f1")}
        values |= {"loss": float(self._losses[0] / self._losses[1].clamp_min(1)), "threshold": best}
        self.log_dict({f"val/{key}": value for key, value in values.items()}, prog_bar=True, rank_zero_only=True)

    def on_test_epoch_start(self) -> None:
        self.test_sums = {condition: self._new_sums() for condition in self.schema["conditions"]}
        self.found = {}

    def test_step(self, batch: dict[str, EventRecording], batch_idx: int) -> None:
        recording = batch["recording"]
        spans = self.decode(self.scores(recording))
        self.found[recording.name] = spans
        self.test_sums[recording.condition].update(recording.truth, _bare(spans), recording.seconds)

    def on_test_epoch_end(self) -> None:
        for condition, sums in self.test_sums.items():
            sums.flat = self._over_ranks(sums.flat)
            found = sums.compute()
            name = f"test/{condition}/" if condition else "test/"
            values = {name + key: found[key] for key in ("event_f1", "miou", "segment_f1")}
            self.log_dict(values, rank_zero_only=True)

    def _over_ranks(self, flat: Tensor) -> Tensor:
        return self.sum_over_ranks(flat) if self.trainer.world_size > 1 else flat

    # words ------------------------------------------------------------------------------------------------------------

    def set_labels_in_words(self) -> None:
        """With head="text": the vectors of the labels' names, by the text encoder."""
        if self.net.text:
            self.net.set_label_vectors(_vectors([label_text(label) for label in self.schema["labels"]]))

    def query(self, recording: Source, texts: list[str]) -> TokenScores:
        """Probabilities of any words in a recording, (L, N). Raises UserError where the head knows labels alone."""
        if not self.net.text:
            raise UserError("model.head=labels finds its labels alone; any words can be asked for with model.head=text")
        return self._placed(self.logits(recording, _vectors(texts).to(self.device)))


def label_text(label: str) -> str:
    """A label as words: "7" is "seven", "_", "-" and "/" are blanks."""
    if label.isdigit() and len(label) == 1:
        return _DIGITS[int(label)]
    return " ".join(re.split(r"[-_/\s]+", label)).strip()


def _vectors(texts: list[str]) -> Tensor:
    from ...text_vectors import text_vectors

    return text_vectors(texts)


def _bare(spans: list[Span]) -> list[tuple[float, float, int]]:
    return [(span.start, span.end, span.label) for span in spans]
