"""The LightningModule of documents: cross entropy, accuracy and macro-F1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...blocks.layers.positions import LearnedPosition
from ...blocks.protocol import Mixer
from ...zoo import create_model
from ...zoo.classifier import SequenceClassifier
from ..errors import UserError
from ..instantiate import with_class
from ..training import TrainingModule
from .scores import ConfusionSums

Batch = dict[str, Tensor]


def model_arguments(model: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The options of the zoo model, with those that follow from the data."""
    given = {k: v for k, v in model.items() if k != "name"}
    given |= {"num_classes": len(schema["labels"]), "vocab_size": schema["vocab_size"], "towers": schema["towers"]}
    if given.get("inputs") == "values":
        if schema["vocab_size"] != 256:
            raise UserError(
                f"model.inputs=values reads numbers 0 .. 255, but the data have {schema['vocab_size']} tokens; "
                "take model.inputs=tokens"
            )
        given |= {key: schema[key] for key in ("value_mean", "value_std")}
    if given.get("position") == "learned":
        given["max_len"] = given.get("max_len") or schema["longest"]
        if given["max_len"] < schema["longest"]:
            raise UserError(
                f"model.max_len={given['max_len']} learned positions are too few for documents of "
                f"{schema['longest']} tokens: leave it null, cut with data.max_len, or take model.position=sinusoidal"
            )
    return given


class DocumentModule(TrainingModule):
    """Trains a classifier of documents; its scores are exact over documents, batches and processes.

    model: {"name", **options} of a zoo model. task: grad_checkpointing. schema: `DocumentData.schema()`. mixer_class:
    the class of a user's own mixer.
    """

    net: SequenceClassifier
    loss_name = "nats per document"

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
        options = model_arguments(model, schema)
        if mixer_class is not None:
            options["mixer"] = with_class(options["mixer"], mixer_class)
        net = create_model(model["name"], **options)
        if not isinstance(net, SequenceClassifier):
            raise UserError(f"model {model['name']!r} is no classifier of documents")
        self.net = net
        if mixer_class is not None:
            self.net.config["options"]["mixer"] = mixer_class
        self.net.backbone.set_grad_checkpointing(bool(task.get("grad_checkpointing")))
        self.test_sums = self._new_sums()

    @property
    def longest(self) -> int | None:
        """The most tokens that the model can read; None where there is no limit."""
        position = self.net.backbone.position
        return position.max_len if isinstance(position, LearnedPosition) else None

    def _new_sums(self) -> ConfusionSums:
        return ConfusionSums(len(self.schema["labels"]))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        out = self.net(batch["tokens"], mask=batch.get("mask"))
        loss = F.cross_entropy(out.y.float(), batch["labels"])
        total = self.check_loss(loss + sum(out.aux.values()), batch_idx)
        number = len(batch["labels"])
        self.log_auxiliary(out.aux, number)
        right = (out.y.detach().argmax(1) == batch["labels"]).float().mean()
        self.log("train/loss", loss.detach(), on_step=True, on_epoch=True, prog_bar=True, batch_size=number)
        self.log("train/accuracy", right, on_step=False, on_epoch=True, batch_size=number)
        return total

    def on_validation_epoch_start(self) -> None:
        self._sums = self._new_sums()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._sums.update(self.net(batch["tokens"], mask=batch.get("mask")).y, batch["labels"])

    def on_validation_epoch_end(self) -> None:
        found = self._compute(self._sums)
        values = {f"val/{key}": found[key] for key in ("loss", "accuracy", "macro_f1")}
        self.log_dict(values, prog_bar=True, rank_zero_only=True)

    def on_test_epoch_start(self) -> None:
        self.test_sums = self._new_sums()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.test_sums.update(self.net(batch["tokens"], mask=batch.get("mask")).y, batch["labels"])

    def on_test_epoch_end(self) -> None:
        found = self._compute(self.test_sums)
        self.log_dict({f"test/{key}": found[key] for key in ("loss", "accuracy", "macro_f1")}, rank_zero_only=True)

    def predict_step(self, batch: Batch, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Numbers of the documents, and their probabilities, float64 (B, C)."""
        logits = self.net(batch["tokens"], mask=batch.get("mask")).y
        return batch["document"].cpu(), torch.softmax(logits.double(), 1).cpu()

    def _compute(self, sums: ConfusionSums) -> dict[str, Any]:
        if self.trainer.world_size > 1:
            sums.flat = self.sum_over_ranks(sums.flat)
        return sums.compute()
