"""trainer=context_parallel: each process holds a part of every training sequence, and all weights.

All processes are given the same rows. Mixers pass states, halos, keys and values between the parts (LASP-2,
arXiv:2502.07563, see `blocks.sequence_parallel`); the gradients are averaged once a step. Evaluation is shared out by
rows, as with trainer=ddp: without gradients a whole row fits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from ..blocks.sequence_parallel import (
    GroupTransport,
    SharedSequence,
    check_shareable,
    even_lengths,
    sum_gradients,
)
from .errors import UserError


class ContextParallelStrategy(DDPStrategy):
    """The processes of `DDPStrategy`, without its wrapper: gradients are averaged when all of a step are there."""

    def configure_ddp(self) -> None:
        """All begin with the weights of the first process."""
        assert self.model is not None
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            dist.broadcast(tensor.data, 0)

    def sequence(self, length: int) -> SharedSequence:
        """The parts of a sequence of so many tokens. Raises UserError where a process would have none."""
        transport = GroupTransport()
        if length < transport.size:
            raise UserError(
                f"rows of {length} token(s) cannot be cut for {transport.size} processes: make data.seq_len longer, or "
                "use fewer (trainer.devices) or trainer=ddp"
            )
        return SharedSequence(transport, even_lengths(length, transport.size))

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **given: Any) -> Any:
        """Batches of `accumulate_grad_batches` before the last one add up in each process."""

        def averaged() -> Any:
            loss = closure()
            transport, trained = GroupTransport(), model or self.lightning_module
            if loss is not None and transport.size > 1 and trained is not None:
                parameters = list(trained.parameters())
                sum_gradients(parameters, transport)
                for parameter in parameters:
                    if parameter.grad is not None:
                        parameter.grad /= transport.size
            return loss

        return super().optimizer_step(optimizer, averaged, model, **given)


def check_context_parallel(net: nn.Module, trainer_options: dict[str, Any]) -> None:
    """Raise UserError for a model whose sequences cannot be cut, naming the part and the mixers that can, and for
    options of the trainer that do not go with it."""
    if trainer_options.get("compile"):
        raise UserError("trainer.compile=true does not go with trainer=context_parallel, whose mixers wait for others")
    if str(trainer_options.get("precision")) == "16-mixed":
        raise UserError(
            "trainer.precision=16-mixed does not go with trainer=context_parallel: each process would scale its own "
            "gradients; use bf16-mixed or 32-true"
        )
    try:
        check_shareable(net)
    except ValueError as error:
        raise UserError(f"trainer=context_parallel: {error}; trainer=ddp takes every model") from error


def is_context_parallel(cfg: dict[str, Any]) -> bool:
    """Whether a config's training shares out each sequence."""
    return bool(cfg["trainer"].get("strategy") == "context_parallel")
