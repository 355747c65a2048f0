"""Running a model on one rank's part of a sequence, and what a training step needs around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..protocol import Mixer, exchanging
from ..registry import list_mixers, mixer_info
from .exchange import SharedSequence, even_lengths
from .transport import Transport


def list_shared_mixers(pattern: str) -> list[str]:
    """Names of the registered mixers that work over ranks in this pattern."""
    return [name for name in list_mixers(pattern=pattern) if pattern in mixer_info(name).cls.shared_patterns]


def check_shareable(model: nn.Module) -> None:
    """Raise ValueError for what sees more of a sequence than its mixers ask for, naming the part and what can serve.

    Mixers that need the whole sequence, embeddings that look back, batch norms, and convolutions, pools and recurrent
    networks outside of the mixers.
    """
    mixers = {name: part for name, part in model.named_modules() if isinstance(part, Mixer)}
    if not mixers:
        raise ValueError(f"{type(model).__name__} has no mixer, so there is nothing that ranks could share")
    for name, mixer in mixers.items():
        reason = mixer.refuse_sharing()
        if reason is not None:
            able = ", ".join(list_shared_mixers(mixer.pattern)) or "none"
            raise ValueError(
                f"{name or type(mixer).__name__}: {reason}, so it cannot be split over ranks; mixers that can "
                f"({mixer.pattern}): {able}"
            )
    for name, part in model.named_modules():
        if any(name == mixer or name.startswith(f"{mixer}.") for mixer in mixers if mixer) or "" in mixers:
            continue
        wide = isinstance(part, nn.modules.conv._ConvNd) and max(part.kernel_size) > 1
        if wide or isinstance(part, nn.RNNBase | nn.modules.pooling._MaxPoolNd | nn.modules.pooling._AvgPoolNd):
            raise ValueError(f"{name}: {type(part).__name__} reads across the border of two ranks' parts; leave it out")
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"{name}: a batch norm takes statistics over all tokens; give norm='rmsnorm' or 'layernorm'"
            )
        if hasattr(part, "read") and hasattr(part, "init_state") and not hasattr(part, "exchange"):
            raise ValueError(f"{name}: {type(part).__name__} looks back at earlier tokens, which another rank may hold")


@contextmanager
def sequence_parallel(model: nn.Module, exchange: SharedSequence) -> Iterator[SharedSequence]:
    """Within it `model` is given own part of a sequence, `exchange.split(x)`, and returns own part of the output.

    The model runs as it is; its mixers ask the ranks for what they need (`Exchange`), positions count from own first
    token. A carried state is that of the whole sequence, the same on every rank, before and after. Every rank must run
    the same model with the same options; with one rank nothing changes. Rows have equal lengths: no mask, no packing.
    Dropout draws its own numbers on each rank, also where whole channels of a sequence are dropped.
    Raises ValueError for a model that cannot (see `check_shareable`).
    """
    check_shareable(model)
    if exchange.size == 1:
        yield exchange
        return
    with exchanging(model, exchange):
        yield exchange


def next_tokens(tokens: Tensor, exchange: SharedSequence, *, ignore: int = -100) -> Tensor:
    """Own targets of next-token prediction: own tokens int64 (B, L) one on, the first of the next rank at the end,
    `ignore` behind the last token of the sequence."""
    ahead = exchange.around(tokens, 0, 1)[:, 1:]
    if exchange.start + tokens.shape[1] == exchange.total:
        ahead = torch.cat((ahead[:, :-1], torch.full_like(ahead[:, -1:], ignore)), 1)
    return ahead


def shared_mean(total: Tensor, number: Tensor | int, exchange: SharedSequence) -> tuple[Tensor, Tensor]:
    """A mean over all ranks of which each has the sum `total` over `number` of its own tokens.

    Returns (own share, mean): the shares add up to the mean, so backpropagate own share and sum the gradients; the mean
    is the same on all ranks and has no gradient.
    """
    both = torch.stack((total.detach().double(), torch.as_tensor(number, device=total.device).double()))
    found = exchange.transport.all_reduce(both)
    everything = found[1].clamp(min=1)
    return total / everything.to(total.dtype), (found[0] / everything).to(total.dtype)


def sum_gradients(parameters: Iterable[nn.Parameter], transport: Transport) -> None:
    """Replace each gradient by its sum over the ranks, in one collective per dtype; a missing one counts as zero."""
    wanted = [p for p in parameters if p.requires_grad]
    for dtype in sorted({p.dtype for p in wanted}, key=str):
        group = [p for p in wanted if p.dtype == dtype]
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
        flat = transport.all_reduce(torch.cat([g.reshape(-1) for g in own]))
        for p, g in zip(group, flat.split([p.numel() for p in group]), strict=True):
            p.grad = g.reshape(p.shape).clone()


def split_batch(batch: Mapping[str, Any], keys: Iterable[str], exchange: SharedSequence) -> dict[str, Any]:
    """The batch with own part of the tensors (B, T, ...) named by `keys`. Raises ValueError for another length."""
    own = dict(batch)
    for key in keys:
        if key not in batch:
            raise ValueError(f"the batch has no {key!r}; it has {', '.join(sorted(batch))}")
        own[key] = exchange.split(batch[key])
    return own


def shared_step(
    model: nn.Module,
    batch: Mapping[str, Any],
    loss: Callable[[nn.Module, dict[str, Any], SharedSequence], tuple[Tensor, Tensor | int]],
    transport: Transport,
    *,
    keys: Iterable[str],
) -> Tensor:
    """Forward, backward and the sum of the gradients for one batch that every rank holds whole; returns the mean loss.

    keys: tensors (B, T, ...) of the batch that are split along T. loss(model, own batch, exchange): the sum of the loss
    over own tokens, and their number. After it every rank has in `.grad` the gradient of the mean over all tokens, as
    one device would: call the optimiser on each rank. Gradients that were there before must be the same on all ranks'
    sum, so zero them first.
    """
    keys = list(keys)
    exchange = SharedSequence(transport, even_lengths(batch[keys[0]].shape[1], transport.size))
    with sequence_parallel(model, exchange):
        own, mean = shared_mean(*loss(model, split_batch(batch, keys, exchange), exchange), exchange)
        own.backward()
    sum_gradients(model.parameters(), transport)
    return mean
