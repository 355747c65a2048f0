"""The LightningModule of videos without labels: the loss and the score of a pretext."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....blocks.protocol import Mixer
from ...training import TrainingModule
from ..classify.module import VideoNet, create_video_net
from .pretexts import Judged, check_pretext, create_pretext, head_classes


class VideoPretrainModule(TrainingModule):
    """Trains a classifier of videos on a pretext; `net` is what is exported.

    model: {"name", **options} of a zoo model. task: pretext, "order", "masked" or "lsmcl", its settings, seed. schema:
    `VideoPretrainData.schema()`. mixer_class: the class of a user's own mixer.
    """

    net: VideoNet

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
        check_pretext(self.task, self.schema)
        self.net = create_video_net(model, schema, mixer_class, num_classes=head_classes(self.task))
        self.pretext = create_pretext(self.net, self.task, self.schema)
        if task["pretext"] != "order":  # the classes are not asked for; DDP waits for the gradient of all that it knows
            self.net.head.requires_grad_(False)
        if task.get("grad_checkpointing"):
            self.net.set_grad_checkpointing(True)
        self.scores: dict[str, float] = {}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        found = self._judge(batch, self.global_step)
        number = len(batch["frames"])
        loss, seen = found.loss, found.loss.detach()
        if found.number is not None:
            loss, seen, _ = self.over_ranks(loss, found.number)
        self.log_auxiliary(found.aux, number)
        self.log("train/loss", seen, on_step=True, on_epoch=True, prog_bar=True, batch_size=number)
        self.check_loss(seen + sum(found.aux.values()), batch_idx)
        return loss + sum(found.aux.values())

    def on_validation_epoch_start(self) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64)

    def on_test_epoch_start(self) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._add(batch, batch_idx)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._add(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self._log("val")

    def on_test_epoch_end(self) -> None:
        self._log("test")

    def _add(self, batch: dict[str, Tensor], number: int) -> None:
        """The same draws in every evaluation, by the number of the batch among those of all processes."""
        found, clips = (
            self._judge(batch, number * self.trainer.world_size + self.global_rank, first=1),
            len(batch["clip"]),
        )
        each = torch.tensor([float(found.loss), float(found.score), found.guess, 1.0], dtype=torch.float64)
        self._sums += each * clips

    def _log(self, stage: str) -> None:
        *sums, number = self.sum_over_ranks(self._sums).tolist()
        names = ("loss", self.pretext.score_name, "guess")
        values = {f"{stage}/{name}": total / max(number, 1) for name, total in zip(names, sums, strict=True)}
        self.log_dict(values, prog_bar=True, rank_zero_only=True)

    def _judge(self, batch: dict[str, Tensor], number: int, first: int = 0) -> Judged:
        seed = hash((int(self.task.get("seed", 0)), first, number, 0)) % 2**63
        return self.pretext(batch, torch.Generator().manual_seed(seed))
