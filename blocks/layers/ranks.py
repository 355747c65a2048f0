"""Sums and rows over the processes of torch.distributed, with gradients, and batch norm over all of them.

The loss of a step is the mean over the processes of what each computes, as data parallel training has it: a value that
all of them compute from all rows has the gradient that one process would have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F


def num_ranks() -> int:
    """Processes of the default group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int]) -> Tensor:
        ctx.first, ctx.own = sum(sizes[: dist.get_rank()]), len(x)
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[ctx.first : ctx.first + ctx.own], None


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of a tensor of one shape over all processes, on each of them; its gradient is the sum of theirs."""
    return x if num_ranks() == 1 else _Sum.apply(x)


def sizes_of_ranks(number: int, device: torch.device) -> list[int]:
    """A number of each process, in the order of the ranks."""
    if num_ranks() == 1:
        return [number]
    own = torch.tensor([number], device=device)
    every = [torch.empty_like(own) for _ in range(num_ranks())]
    dist.all_gather(every, own)
    return torch.cat(every).tolist()


def rows_of_ranks(x: Tensor, *, fill: float = 0) -> Tensor:
    """(sum of the b, ...): the rows (b, ...) of all processes in the order of their ranks, on each of them; gradients
    lead back to where a row is from.

    Processes may have different numbers of rows, and of the second axis, which is filled with `fill` on the right.
    """
    if num_ranks() == 1:
        return x
    if x.dim() > 1:
        width = max(sizes_of_ranks(x.shape[1], x.device))
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, width - x.shape[1]), value=fill)
    # NCCL knows no bool
    rows = _Rows.apply(x.to(torch.uint8) if x.dtype == torch.bool else x, sizes_of_ranks(len(x), x.device))
    return rows.to(x.dtype)


def own_rows(number: int, draw: Callable[[int], Tensor], *, shared: bool = True) -> Tensor:
    """What is drawn for this process's rows of a batch that all processes draw for, each from the same generator.

    number: of its rows. draw: gives the drawn rows of so many. shared: False for a batch of this process alone.
    """
    if not shared or num_ranks() == 1:
        return draw(number)
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    sizes = sizes_of_ranks(number, device)
    first = sum(sizes[: dist.get_rank()])
    return draw(sum(sizes))[first : first + number]


class SharedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm whose statistics in training are of the rows of all processes, on any device.

    mean = sum x / N and var = sum (x - mean)^2 / N over all of them, running_var with N - 1, as `nn.BatchNorm1d` has
    them in one process. (`nn.SyncBatchNorm` is for GPUs alone.) Two messages of `num_features` numbers a step, and as
    many in the backward pass. Made by `share_batch_norms`.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch norm of a tensor of {input.dim()} axes, at least 2 are needed")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or num_ranks() == 1:
            return super().forward(x)
        self._check_input_dim(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        axes = [axis for axis in range(x.dim()) if axis != 1]
        shape = [-1 if axis == 1 else 1 for axis in range(x.dim())]
        counts = wide.new_tensor([x.numel() / max(x.shape[1], 1)])
        sums = sum_over_ranks(torch.cat((wide.sum(axes), counts)))
        number = sums[-1].detach().clamp_min(1)
        mean = sums[:-1] / number
        centred = wide - mean.view(shape)
        var = sum_over_ranks(centred.square().sum(axes)) / number
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            self._track(mean.detach(), var.detach() * number / (number - 1).clamp_min(1))
        y = centred * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        factor = 1 / float(self.num_batches_tracked or 1) if self.momentum is None else self.momentum
        for running, value in ((self.running_mean, mean), (self.running_var, var)):
            if running is not None:
                running.lerp_(value.to(running.dtype), factor)


def share_batch_norms(module: nn.Module) -> nn.Module:
    """Replace every `nn.BatchNorm1d`, 2d and 3d in a module by a `SharedBatchNorm` with its parameters and buffers (the
    names in a state dict stay); returns the module."""
    for name, part in module.named_children():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            setattr(module, name, _shared(part))
        else:
            share_batch_norms(part)
    return module


def _shared(norm: nn.modules.batchnorm._BatchNorm) -> SharedBatchNorm:
    found = SharedBatchNorm(
        norm.num_features,
        eps=norm.eps,
        momentum=norm.momentum,
        affine=False,
        track_running_stats=False,
    )
    found.affine, found.track_running_stats = norm.affine, norm.track_running_stats
    for name, value in norm._parameters.items():
        found.register_parameter(name, value)
    for name, buffer in norm._buffers.items():
        found._buffers[name] = buffer
    found.train(norm.training)
    return found
