"""The LightningModule of recordings and texts: contrastive loss, recall in both directions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....blocks.layers.ranks import rows_of_ranks
from ....blocks.protocol import Mixer
from ....zoo.audio_text import AudioTextModel, ClipOutput
from ...errors import UserError
from ...nets import create_net
from ...ranks import every_rank
from ...text_vectors import pad_tokens
from ...training import TrainingModule
from ..augmenting import Augmentation, step_generator
from .scores import chance, places, ranks, retrieval_scores

Batch = dict[str, Tensor]
DIRECTIONS = ("text_to_audio", "audio_to_text")


class Found:
    """Recordings and texts of an evaluation, on the CPU, kept until all are there."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, Tensor, Tensor, Tensor]] = []

    def update(self, batch: Batch, out: ClipOutput, words: bool) -> None:
        """The clips of each recording of a batch, and the vectors of its text as they came."""
        for row, number in enumerate(batch["clip"].tolist()):
            tokens = batch["tokens"][row][batch["token_mask"][row]].cpu() if words else torch.zeros(0)
            clips = out.y[row][out.mask[row]].cpu()
            self.rows.append((number, int(batch["group"][row]), clips, batch["text"][row].cpu(), tokens))

    def gather(self) -> None:
        """The rows of all processes, in their order, each once."""
        self.rows = [row for rows in every_rank(self.rows) for row in rows]
        self.rows = list({row[0]: row for row in sorted(self.rows, key=lambda row: row[0])}.values())


class AudioTextModule(TrainingModule):
    """Trains a model of recordings and texts; an evaluation compares every recording with every text of its set.

    model: {"name", **options} of a zoo model. task: recall_at, grad_checkpointing, augment (see `Augmentation`), seed
    of it. schema: `AudioPairData.schema()`. mixer_class: the class of a user's own mixer. With several processes every
    recording is compared with the texts of all of them.
    """

    net: AudioTextModel
    loss_name = "nats per pair"

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
        self.recall_at = tuple(task["recall_at"])
        self.augment = Augmentation.create(task.get("augment"))
        if self.augment.mixup:
            raise UserError("task.augment.mixup mixes labels; data.join puts recordings with their texts together")
        options = {k: v for k, v in model.items() if k != "name"}
        options |= {"sample_rate": schema["sample_rate"], "text_dim": schema["text_dim"]}
        self.net = create_net(model["name"], options, mixer_class, AudioTextModel, "model of recordings and texts")
        self.net.set_grad_checkpointing(bool(task.get("grad_checkpointing")))
        self.tested: dict[str, Any] = {}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        lengths = batch["lengths"]
        generator = step_generator(int(self.task.get("seed", 0)), self.global_step, self.global_rank)
        samples, _ = self.augment.samples(batch["samples"], lengths, self.schema["sample_rate"], generator)
        front = self.net.encoder.features(samples, lengths)
        features = self.augment.features(front.features, front.lengths, self.net.encoder.front_end, generator)
        out = self.net.encode(features, front.lengths)
        text, tokens = self.net.embed_texts(batch["text"], batch.get("tokens"))
        token_mask = batch.get("token_mask") if tokens is not None else None
        clips, clip_mask, text, group = (rows_of_ranks(x) for x in (out.y, out.mask, text, batch["group"]))
        if tokens is not None and token_mask is not None:
            tokens, token_mask = rows_of_ranks(tokens), rows_of_ranks(token_mask)
        similarity = self.net.score(clips, text, tokens, clip_mask=clip_mask, token_mask=token_mask)
        loss = self.net.score.loss(similarity, group)
        total = self.check_loss(loss + sum(out.aux.values()), batch_idx)
        number = len(similarity)
        self.log_auxiliary(out.aux, number)
        right = (similarity.detach().argmax(0) == torch.arange(number, device=loss.device)).float().mean()
        self.log("train/loss", loss.detach(), on_step=True, on_epoch=True, prog_bar=True, batch_size=number)
        self.log("train/recall@1_in_batch", right, on_step=False, on_epoch=True, batch_size=number)
        return total

    def on_validation_epoch_start(self) -> None:
        self._found = Found()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._found.update(batch, self.net(batch["samples"], batch["lengths"]), self.net.score.needs_tokens)

    def on_validation_epoch_end(self) -> None:
        scores = self.evaluate(self._found)
        values = {f"val/{name}": scores[name] for name in ("loss", "mean_recall")}
        for direction in DIRECTIONS:
            values |= {f"val/{direction}/{key}": value for key, value in scores[direction].items()}
        self.log_dict(values, rank_zero_only=True)
        shown = {"val/recall": scores["mean_recall"]}
        self.log_dict(shown, prog_bar=True, logger=False, rank_zero_only=True)

    def on_test_epoch_start(self) -> None:
        self._found = Found()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._found.update(batch, self.net(batch["samples"], batch["lengths"]), self.net.score.needs_tokens)

    def on_test_epoch_end(self) -> None:
        self.tested = self.evaluate(self._found)
        self.log_dict({f"test/{key}": self.tested[key] for key in ("loss", "mean_recall")}, rank_zero_only=True)

    def predict_step(self, batch: Batch, batch_idx: int) -> tuple[Tensor, list[Tensor]]:
        """Numbers of the recordings, and the vectors of their clips, (n, E) each."""
        out = self.net(batch["samples"], batch["lengths"])
        return batch["clip"].cpu(), [y[mask].cpu() for y, mask in zip(out.y, out.mask, strict=True)]

    def evaluate(self, found: Found) -> dict[str, Any]:
        """Scores over all pairs: for both directions recall@k and ranks, `chance` of them, mean_recall (of all k and
        both), loss in nats over the whole set, where a guess has log N, and for each pair similarity and ranks."""
        found.gather()
        similarity = self.similarity([row[2] for row in found.rows], [row[3:] for row in found.rows])
        group = torch.tensor([row[1] for row in found.rows])
        right = (group.unsqueeze(0) == group.unsqueeze(1)).numpy()
        # batches are told apart by small differences of rounding, which must not break ties
        table = np.round(similarity.double().numpy(), 6)
        at = [k for k in self.recall_at if k <= len(table)]
        by_text, by_audio = retrieval_scores(table.T, right, at), retrieval_scores(table, right, at)
        recalls = [scores[f"recall@{k}"] for scores in (by_text, by_audio) for k in at]
        with torch.no_grad():
            loss = float(self.net.score.loss(similarity.to(self.device), group.to(self.device)))
        return {
            "pairs": len(table),
            "loss": loss,
            "mean_recall": float(np.mean(recalls)) if recalls else 0.0,
            "text_to_audio": by_text,
            "audio_to_text": by_audio,
            "chance": chance(right, at),
            "clip": [row[0] for row in found.rows],
            "similarity": table,
            "ranks": {"text_to_audio": ranks(places(table.T, right)), "audio_to_text": ranks(places(table, right))},
        }

    @torch.no_grad()
    def similarity(self, clips: list[Tensor], texts: list[tuple[Tensor, Tensor]]) -> Tensor:
        """(N, M) on the CPU: recordings as their clips (n_i, E), what the network gives, with texts as vector (D,) and
        words (m_j, D), what the text encoder gives."""
        mask = torch.arange(max(map(len, clips))) < torch.tensor([[len(row)] for row in clips])
        padded = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
        tokens, token_mask = None, None
        if self.net.score.needs_tokens:
            tokens, token_mask = (x.to(self.device) for x in pad_tokens([words for _, words in texts]))
        text, words = self.net.embed_texts(torch.stack([vector for vector, _ in texts]).to(self.device), tokens)
        return self.net.score(
            padded.to(self.device), text, words, clip_mask=mask.to(self.device), token_mask=token_mask
        ).cpu()
