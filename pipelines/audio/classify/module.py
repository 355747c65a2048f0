"""The LightningModule of clips: cross entropy, accuracy and macro-F1."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ....blocks.protocol import Mixer
from ....zoo._audio import AudioOutput
from ....zoo.audio import AudioClassifier
from ...classification import Batch, ClassificationModule
from ...nets import create_net
from ..augmenting import Augmentation, step_generator


class AudioClipModule(ClassificationModule):
    """Trains a classifier of recordings; its scores are exact over recordings, batches and processes.

    model: {"name", **options} of a zoo model. task: grad_checkpointing, augment (see `Augmentation`), seed of it.
    schema: `AudioClipData.schema()`. mixer_class: the class of a user's own mixer.
    """

    net: AudioClassifier
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
        self.augment = Augmentation.create(task.get("augment"))
        options = {k: v for k, v in model.items() if k != "name"}
        options |= {"num_classes": len(schema["labels"]), "sample_rate": schema["sample_rate"]}
        self.net = create_net(model["name"], options, mixer_class, AudioClassifier, "classifier of recordings")
        self.net.set_grad_checkpointing(bool(task.get("grad_checkpointing")))
        self.test_sums = self.new_sums()

    def answer(self, batch: Batch) -> AudioOutput:
        return self.net(batch["samples"], batch["lengths"])

    def training_output(self, batch: Batch) -> tuple[AudioOutput, Tensor]:
        generator = step_generator(int(self.task.get("seed", 0)), self.global_step, self.global_rank)
        samples, lengths = self.augment.faster(batch["samples"], batch["lengths"], generator)
        samples, _ = self.augment.samples(samples, lengths, self.schema["sample_rate"], generator)
        targets = F.one_hot(batch["labels"], len(self.schema["labels"])).float()
        samples, targets = self.augment.mixed(samples, targets, lengths, generator)
        front = self.net.encoder.features(samples, lengths)
        features = self.augment.features(front.features, front.lengths, self.net.encoder.front_end, generator)
        return self.net.classify(features, front.lengths), targets
