"""One sequence over several ranks: each holds a part, mixers pass states, halos, keys and values to each other."""

from .exchange import SharedSequence, even_lengths
from .transport import GroupTransport, ThreadTransport, Transport, run_ranks

__all__ = ["GroupTransport", "SharedSequence", "ThreadTransport", "Transport", "even_lengths", "run_ranks"]
