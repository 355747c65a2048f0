"""The LightningModule of documents: cross entropy, accuracy and macro-F1."""

from __future__ import annotations

from typing import Any

from ...blocks.layers.positions import LearnedPosition
from ...blocks.protocol import Mixer
from ...blocks.sequence_model import SequenceOutput
from ...zoo.classifier import SequenceClassifier
from ..classification import Batch, ClassificationModule
from ..errors import UserError
from ..nets import create_net


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


class DocumentModule(ClassificationModule):
    """Trains a classifier of documents; its scores are exact over documents, batches and processes.

    model: {"name", **options} of a zoo model. task: grad_checkpointing. schema: `DocumentData.schema()`. mixer_class:
    the class of a user's own mixer.
    """

    net: SequenceClassifier
    item = "document"
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
        self.net = create_net(model["name"], options, mixer_class, SequenceClassifier, "classifier of documents")
        self.net.backbone.set_grad_checkpointing(bool(task.get("grad_checkpointing")))
        self.test_sums = self.new_sums()

    @property
    def longest(self) -> int | None:
        """The most tokens that the model can read; None where there is no limit."""
        position = self.net.backbone.position
        return position.max_len if isinstance(position, LearnedPosition) else None

    def answer(self, batch: Batch) -> SequenceOutput:
        return self.net(batch["tokens"], mask=batch.get("mask"))
