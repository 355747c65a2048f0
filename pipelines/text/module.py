"""The language-modelling LightningModule: next token or masked tokens, with or without a carried state."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...blocks.layers.positions import LearnedPosition
from ...blocks.protocol import Mixer, State, detach_state, map_state, reset_rows
from ...zoo import LanguageModel, model_info
from ..errors import UserError
from ..nets import create_net
from ..training import TrainingModule
from .data import TextData
from .masking import mask_tokens
from .scores import LossSums, positions, token_losses

Batch = dict[str, Tensor]


def model_arguments(model: dict[str, Any], task: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The options of the zoo model that follow from the data. Raises UserError where they contradict the config."""
    given = {k: v for k, v in model.items() if k != "name"}
    causal = given.get("causal", model_info(model["name"]).options.get("causal", True))
    if task["objective"] == "next" and not causal:
        raise UserError(
            f"model {model['name']!r} is not causal: it learns masked tokens (task.objective=masked), not the next one"
        )
    learned = given.get("position", model_info(model["name"]).options.get("position")) == "learned"
    if learned and given.get("max_len") is not None and given["max_len"] < schema["seq_len"]:
        raise UserError(
            f"data.seq_len={schema['seq_len']} is longer than the learned positions of the model, "
            f"model.max_len={given['max_len']}"
        )
    needed = schema["vocab_size"] + (task["objective"] == "masked")
    # A model of the zoo is for bytes unless its size says otherwise; more numbers than the tokenizer has do no harm.
    if given.get("vocab_size", 256) < needed:
        given["vocab_size"] = needed
    return given


class LanguageModule(TrainingModule):
    """Trains a language model on rows of a corpus; sums are exact over documents.

    model: {"name", **options} of a zoo model. task: objective ("next" or "masked"), carry_state, grad_checkpointing,
    mask_share. schema: `TextData.schema()`. mixer_class: the class of a user's own mixer.
    """

    net: LanguageModel
    loss_name = "nats per token"

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
        options = model_arguments(model, task, schema)
        self.net = create_net(model["name"], options, mixer_class, LanguageModel, "language model")
        self.net.backbone.set_grad_checkpointing(bool(task["grad_checkpointing"]))
        if task["carry_state"]:
            self._check_carry(model["name"])
        self._state: State | None = None
        self._resumed: list[Tensor] | None = None
        self.test_sums: dict[str, LossSums] = {}

    def _check_carry(self, name: str) -> None:
        if self.task["objective"] == "masked":
            raise UserError("task.carry_state=true needs task.objective=next: masked models see both sides")
        if not constant_state(self.net):
            raise UserError(
                f"task.carry_state=true needs a state of constant size, which model {name!r} does not have: "
                "give softmax a mixer.window_size, or take a recurrent mixer, and no learned positions"
            )

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.task["carry_state"] and self.trainer.world_size > 1:
            raise UserError("task.carry_state=true reads documents side by side in one process; use trainer.devices=1")

    # the carried state ------------------------------------------------------------------------------------------------

    def _carried(self, batch: Batch, before: State | None) -> State:
        """The state for this batch: that after the one before, new where a document begins."""
        fresh = self.net.init_state(len(batch["fresh"]), device=batch["tokens"].device)
        return fresh if before is None else reset_rows(before, batch["fresh"], fresh)

    def on_train_epoch_start(self) -> None:
        if self._resumed is None:
            self._state = None

    def _before(self) -> State | None:
        """The state after the batch before, which may have been in a run that this one continues."""
        if self._resumed is not None:
            values = iter(self._resumed)
            state = self.net.init_state(len(self._resumed[0]), device=self.device)
            self._state = map_state(lambda old: next(values).to(old.device), state)
            self._resumed = None
        return self._state

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self._state is not None and not self.trainer.validating:
            tensors: list[Tensor] = []

            def keep(tensor: Tensor) -> Tensor:
                tensors.append(tensor.detach().cpu().clone())
                return tensor

            map_state(keep, self._state)
            checkpoint["carried_state"] = tensors

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._resumed = checkpoint.get("carried_state")

    # training ---------------------------------------------------------------------------------------------------------

    def logits(self, batch: Batch, state: State | None = None) -> Any:
        """The model's output for a batch of any of the three kinds of rows."""
        return self.net(batch["tokens"], mask=batch.get("mask"), cu_seqlens=batch.get("cu_seqlens"), state=state)

    def _masked(self, batch: Batch, *, fixed: bool = False) -> Batch:
        """Inputs with hidden tokens: others in every step, fixed: the same ones every time; in any batch and on any
        number of processes."""
        place = positions({**batch, "start": batch["first"]}).expand_as(batch["tokens"])
        inputs, targets = mask_tokens(
            batch["tokens"],
            share=self.task["mask_share"],
            mask_token=self.schema["vocab_size"],
            vocab_size=self.schema["vocab_size"],
            real=batch.get("mask"),
            place=place,
            draw=0 if fixed else 1 + self.global_step,
        )
        return {**batch, "tokens": inputs, "targets": targets}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self.task["objective"] == "masked":
            batch = self._masked(batch)
        state = None
        if self.task["carry_state"]:
            state = self._carried(batch, self._before())
        with self.own_part(batch, "tokens", "targets") as batch:
            out = self.logits(batch, state)
        if state is not None:
            self._state = detach_state(out.state)
        asked = (batch["targets"] >= 0).sum()
        own = token_losses(out.y, batch["targets"]).sum() / asked.clamp(min=1)
        loss, seen, total = self.over_ranks(own, asked)
        seen = seen + sum(value.detach() for value in out.aux.values())
        self.check_loss(seen, batch_idx)
        number = int(total)
        self.log_auxiliary(out.aux, number)
        self.log("train/loss", seen, on_step=True, on_epoch=True, prog_bar=True, batch_size=number)
        return loss + sum(out.aux.values())

    # validation and test: sums, so that neither the batch size nor the number of processes matters -----------------

    def on_validation_epoch_start(self) -> None:
        self._sums = LossSums()
        self._training_state, self._state = self._state, None

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._add(self._sums, batch)

    def on_validation_epoch_end(self) -> None:
        self._state = self._training_state
        scores = self._compute(self._sums, "val")
        values = {"val/loss": scores["loss"]}
        if self.task["objective"] == "next":
            values["val/bits_per_byte"] = scores["bits_per_byte"]
        self.log_dict(values, prog_bar=True, rank_zero_only=True)

    def on_test_epoch_start(self) -> None:
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, TextData):
            raise TypeError("testing needs a TextData")
        self._protocols = list(data.protocols)
        self.test_sums = {name: LossSums() for name in self._protocols}
        self._state = None

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._add(self.test_sums[self._protocols[dataloader_idx]], batch)

    def on_test_epoch_end(self) -> None:
        self._state = None
        for name, sums in self.test_sums.items():
            scores = self._compute(sums, "test")
            self.log_dict({f"test/{name}/bits_per_byte": scores["bits_per_byte"]}, rank_zero_only=True)

    def _add(self, sums: LossSums, batch: Batch) -> None:
        if self.task["objective"] == "masked":
            batch = self._masked(batch, fixed=True)
        carries = "fresh" in batch and self.task["objective"] == "next"
        state = self._carried(batch, self._state) if carries else None
        out = self.logits(batch, state)
        if carries:
            self._state = out.state
        sums.update(token_losses(out.y, batch["targets"]), batch)

    def _compute(self, sums: LossSums, stage: str) -> dict[str, Any]:
        if self.trainer.world_size > 1:
            sums.flat = self.sum_over_ranks(sums.flat)
        data = getattr(self.trainer, "datamodule", None)
        return sums.compute(*(data.size(stage) if isinstance(data, TextData) else (0, 0)))


def constant_state(net: LanguageModel) -> bool:
    """Whether the model carries a state whose size does not grow with the tokens seen, for any number of them."""
    if any(isinstance(part, LearnedPosition) for part in net.modules()):
        return False  # its table ends
    try:
        return net.state_size(1 << 20) == net.state_size(1 << 30)
    except ValueError:
        return False
