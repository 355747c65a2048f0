"""A module of one weight and its data, for tests of what surrounds a training."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader


class Tiny(L.LightningModule):
    """One weight; the validation loss falls by one each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = (self.weight * batch["x"]).sum()
        self.log(
            "train/loss",
            loss.detach(),
            on_step=True,
            on_epoch=True,
            prog_bar=True,
            batch_size=len(batch["x"]),
        )
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val/loss", 10.0 - self.current_epoch, prog_bar=True, batch_size=len(batch["x"]))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        pass

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return batch["x"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loader(batches: int = 23) -> DataLoader[Any]:
    """Batches of four rows of ones."""
    return DataLoader([{"x": torch.ones(3)} for _ in range(4 * batches)], batch_size=4)  # type: ignore[arg-type]
