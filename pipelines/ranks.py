"""Several processes: losses over the items of all of them, their random numbers, and going on with another number.

Process r takes its part of each batch (see `loading.IndexSampler`). The gradients are averaged over the processes, so
what each of them goes back from is its part of the loss of the whole batch, whatever its share of the items.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..blocks.layers.ranks import num_ranks, share_batch_norms
from ..blocks.sequence_parallel import sequence_parallel, split_batch
from .context_parallel import ContextParallelStrategy
from .errors import UserError
from .failures.steps import WatchedModule
from .loading import IndexSampler


class RankedModule(WatchedModule):
    """A LightningModule whose training step is that of one process on the batches of all."""

    def over_ranks(self, loss: Tensor, number: Tensor | int) -> tuple[Tensor, Tensor, Tensor | int]:
        """A mean over `number` items of this process as one over the items of all: what to go back from, the mean over
        all to be shown, and their number. In one process the mean as it is. One message of two numbers."""
        ranks = num_ranks()
        if ranks == 1:
            return loss, loss.detach(), number
        own = torch.as_tensor(number, device=loss.device).double()
        sums = torch.stack((loss.detach().double() * own, own))
        dist.all_reduce(sums)
        share = (ranks * own / sums[1].clamp_min(1)).to(loss.dtype)
        return loss * share, (sums[0] / sums[1].clamp_min(1)).to(loss.dtype), sums[1]

    @contextmanager
    def own_part(self, batch: dict[str, Any], *keys: str) -> Iterator[dict[str, Any]]:
        """Within it the model is given this process's part of each row: with trainer=context_parallel the tensors
        (B, T, ...) named by `keys` are cut along T, else the batch is what it was."""
        strategy = self._trainer and self._trainer.strategy
        if not isinstance(strategy, ContextParallelStrategy):
            yield batch
            return
        exchange = strategy.sequence(batch[keys[0]].shape[1])
        with sequence_parallel(self.net, exchange):  # type: ignore[arg-type]
            yield split_batch(batch, keys, exchange)

    def sum_over_ranks(self, flat: Tensor) -> Tensor:
        """The sum of a vector over all processes, on the CPU."""
        total = flat.to(self.device, copy=True)
        if num_ranks() > 1:
            dist.all_reduce(total)
        return total.cpu()

    def configure_model(self) -> None:
        """Statistics of batch norms are of the rows of all processes; with trainer=fsdp weights are shared out."""
        trainer = self._trainer
        if trainer is None or trainer.state.fn != TrainerFn.FITTING or trainer.world_size == 1:
            return
        if isinstance(trainer.strategy, ContextParallelStrategy):
            return
        share_batch_norms(self)
        from .sharding import ShardedStrategy, shard

        if isinstance(trainer.strategy, ShardedStrategy) and not trainer.strategy.sharded:
            shard(self, trainer.strategy.device_mesh["data_parallel"])
            trainer.strategy.sharded = True

    def on_fit_start(self) -> None:
        """Buffers are the same in all processes, sums over them all. DDP would send them before every forward pass, in
        an evaluation too, where processes have different numbers of batches and would wait for ever."""
        model = self.trainer.strategy.model
        if isinstance(model, DistributedDataParallel):
            model.broadcast_buffers = False

    def on_validation_start(self) -> None:
        """Processes have different numbers of batches: none may wait there for the weights that another holds."""
        self._together(True)

    def on_validation_end(self) -> None:
        self._together(False)

    def _together(self, whole: bool) -> None:
        if getattr(self._trainer and self._trainer.strategy, "sharded", False):
            from .sharding import keep_whole

            keep_whole(self, whole)

    # checkpoints ------------------------------------------------------------------------------------------------------

    def save_ranks(self, checkpoint: dict[str, Any]) -> None:
        """The random state of every process, and how many rows of how many processes a step has."""
        sampler = getattr(self.trainer.train_dataloader, "sampler", None)
        rows = sampler.rows if isinstance(sampler, IndexSampler) else None
        checkpoint["ranks"] = {"number": num_ranks(), "rows": rows}
        if num_ranks() > 1:
            cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
            checkpoint["ranks"]["generators"] = every_rank({"cpu": torch.get_rng_state(), "cuda": cuda})

    def start_ranks(self, saved: dict[str, Any] | None) -> None:
        """Random numbers of this process's own: those that it saved, else a stream for each. saved: what `save_ranks`
        put in the checkpoint that is gone on from. Raises UserError for another number of processes whose steps have
        another number of rows: the position in the data would not be the same one."""
        ranks = num_ranks()
        if getattr(getattr(self.trainer, "strategy", None), "sharded", False):
            for group in (group for optimizer in self.trainer.optimizers for group in optimizer.param_groups):
                group["fused"] = False  # a checkpoint of another strategy brings its own
        if saved is not None and saved["number"] != ranks:
            sampler = getattr(self.trainer.train_dataloader, "sampler", None)
            here = sampler.rows if isinstance(sampler, IndexSampler) else None
            if saved["rows"] != here:
                each, rest = divmod(saved["rows"] or 0, 1 if getattr(sampler, "shared", False) else ranks)
                fits = f"data.batch_size={each}" if each and not rest else f"trainer.devices={saved['number']}"
                raise UserError(
                    f"the checkpoint is of {saved['number']} process(es) with {saved['rows']} rows a step, here are "
                    f"{ranks} with {here}: the steps would not be the same. {fits} goes on where it was"
                )
        own = (saved or {}).get("generators") or []
        if len(own) == ranks > 1:
            torch.set_rng_state(own[self.global_rank]["cpu"])
            if own[self.global_rank]["cuda"] is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(own[self.global_rank]["cuda"], self.device)
        elif self.global_rank:
            torch.manual_seed(torch.initial_seed() + self.global_rank)


def every_rank(value: Any) -> list[Any]:
    """A plain value of each process, in the order of the ranks, on all of them."""
    if num_ranks() == 1:
        return [value]
    found: list[Any] = [None] * num_ranks()
    dist.all_gather_object(found, value)
    return found


def predicted(trainer: L.Trainer, module: L.LightningModule, loader: Any) -> list[Any]:
    """What `predict_step` returns for all batches of all processes: complete on each of them."""
    found = trainer.predict(module, dataloaders=loader, return_predictions=True) or []
    return [batch for batches in every_rank(list(found)) for batch in batches]
