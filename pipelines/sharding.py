"""trainer=fsdp: each process holds a part of every weight, of its gradient and of the optimiser's state (FSDP2).

ZeRO stage 3 (arXiv:1910.02054) as torch's `fully_shard` has it. A Block's weights are gathered before it is used,
forward and backward, and dropped after; what is outside the Blocks is gathered for a whole step.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from ..blocks.block import Block
from ..zoo.selective_s4 import LongShortContrast, SelectiveS4
from .context_parallel import ContextParallelStrategy
from .errors import UserError


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all processes. Checkpoints hold the full weights and states in one file, written by the first process:
    they are those of any other strategy. sharded: whether the module's weights are shared out."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)
        self.sharded = False

    def _setup_distributed(self) -> None:
        super()._setup_distributed()
        self._data_parallel_size = self.world_size

    def teardown(self) -> None:
        self.sharded = False
        super().teardown()


def create_strategy(name: Any) -> Any:
    """`trainer.strategy` as Lightning takes it: "fsdp" and "context_parallel" are ours, all others are its own."""
    ours = {"fsdp": ShardedStrategy, "context_parallel": ContextParallelStrategy}
    return ours[name]() if name in ours else name


def shard(module: nn.Module, mesh: Any) -> None:
    """Share out the weights: Blocks one by one, what is left in one piece.

    Raises UserError for models whose weights are changed outside the optimiser, which torch's sharding would lose, and
    for weights without an axis to cut.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    check_shardable(module)
    for part in module.modules():
        if isinstance(part, Block):
            fully_shard(part, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for name in ("training_step", "validation_step"):
        register_fsdp_forward_method(module, name)


def check_shardable(module: nn.Module) -> None:
    """Raise UserError for a module that `shard` cannot take."""
    for name, part in module.named_modules():
        if isinstance(part, LongShortContrast) or (isinstance(part, SelectiveS4) and part.mask_generator is not None):
            raise UserError(
                f"trainer=fsdp cannot share out {type(part).__name__} ({name}): its momentum copy is changed outside "
                "the optimizer; use trainer=ddp"
            )
    for name, parameter in module.named_parameters():
        if not parameter.dim():
            raise UserError(f"trainer=fsdp cannot share out {name}, a single number; use trainer=ddp")


def keep_whole(module: nn.Module, whole: bool) -> None:
    """Gather all weights and keep them (True), or give them back (False)."""
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_reshard_after_forward(not whole, recurse=False)
            if whole:
                part.unshard()
            else:
                part.reshard()


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """The full state dict on the CPU, on every process."""
    return {
        key: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().cpu()
        for key, value in module.state_dict().items()
    }
