"""One sequence over several ranks: each holds a part, mixers pass states, halos, keys and values to each other.

transport = GroupTransport()                                  # the default process group of torch.distributed
exchange = SharedSequence(transport, even_lengths(x.shape[1], transport.size))
with sequence_parallel(model, exchange):
    y = model(exchange.split(x))                              # own part of the output
"""

from .context import (
    check_shareable,
    list_shared_mixers,
    next_tokens,
    sequence_parallel,
    shared_mean,
    shared_step,
    split_batch,
    sum_gradients,
)
from .exchange import SharedSequence, even_lengths
from .transport import GroupTransport, ThreadTransport, Transport, run_ranks

__all__ = [
    "GroupTransport",
    "SharedSequence",
    "ThreadTransport",
    "Transport",
    "check_shareable",
    "even_lengths",
    "list_shared_mixers",
    "next_tokens",
    "run_ranks",
    "sequence_parallel",
    "shared_mean",
    "shared_step",
    "split_batch",
    "sum_gradients",
]
