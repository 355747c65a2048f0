"""The LightningModule of videos: cross entropy, accuracy and macro-F1."""

from __future__ import annotations

from typing import Any

from ....blocks.protocol import Mixer
from ....blocks.sequence_model import SequenceOutput
from ....zoo import list_models, model_info
from ....zoo._features import ZooModel
from ....zoo.video import VideoClassifier
from ....zoo.vis4mer import ViS4mer
from ...classification import Batch, ClassificationModule
from ...errors import UserError
from ...nets import create_net

VideoNet = VideoClassifier | ViS4mer


class VideoClipModule(ClassificationModule):
    """Trains a classifier of videos; its scores are exact over clips, batches and processes.

    model: {"name", **options} of a zoo model, of which the data decide num_classes and the width of given vectors.
    task: grad_checkpointing. schema: `VideoClipData.schema()`. mixer_class: the class of a user's own mixer.
    """

    net: VideoNet
    item = "clip"
    loss_name = "nats per clip"

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
        self.net = create_video_net(model, schema, mixer_class, num_classes=len(schema["labels"]))
        if task.get("grad_checkpointing"):
            self.net.set_grad_checkpointing(True)
        self.test_sums = self.new_sums()

    def answer(self, batch: Batch) -> SequenceOutput:
        out = self.net(batch["frames"], batch["mask"], batch["times"])
        return SequenceOutput(out.y, None, out.aux)


def create_video_net(
    model: dict[str, Any], schema: dict[str, Any], mixer_class: type[Mixer] | None, *, num_classes: int
) -> VideoNet:
    """The model of a config for frames as the data show them: vectors of a width, or pictures, which need an encoder of
    pixels. Raises UserError where the two do not fit, and for a model that is no classifier of videos."""
    options = {k: v for k, v in model.items() if k != "name"}
    encoder = options.get("encoder", "features")
    encoder = {"name": encoder} if isinstance(encoder, str) else dict(encoder)
    if schema["features"] is not None:
        if encoder.get("name", "features") != "features":
            raise UserError(
                f"model.encoder.name={encoder['name']!r} reads pictures, but data.features={schema['features']!r} "
                "gives vectors: take model.encoder.name=features, or data.features=null"
            )
        encoder = {"name": "features", "dim": int(schema["dim"])}
    elif encoder.get("name", "features") == "features":
        raise UserError(
            "data.features=null gives pictures, but model.encoder.name=features reads vectors: take "
            "model.encoder.name=patches or a model of timm, or data.features=packaged"
        )
    else:
        encoder.pop("dim", None)  # of given vectors
    options |= {"num_classes": num_classes, "encoder": encoder}
    if not issubclass(model_info(model["name"]).cls, (VideoClassifier, ViS4mer)):
        known = ", ".join(list_models(task="video_classify"))
        raise UserError(f"model {model['name']!r} is no classifier of videos; these are: {known}")
    net: Any = create_net(model["name"], options, mixer_class, ZooModel, "classifier of videos")
    return net
