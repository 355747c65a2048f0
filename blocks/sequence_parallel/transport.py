"""How ranks pass numbers to each other: over torch.distributed, or between threads of one process."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Transport:
    """Three collectives on flat tensors, and a count of what was received from other ranks.

    rank, size: place in the group and its ranks. received: bytes by collective; calls: how often it ran. A subclass
    defines `_all_gather`, `_all_to_all` and `_all_reduce`; every rank must call them in the same order.
    """

    def __init__(self, rank: int, size: int) -> None:
        if not 0 <= rank < size:
            raise ValueError(f"rank={rank} must be in 0 .. {size - 1}")
        self.rank, self.size = rank, size
        self.received: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """The x of every rank, equally large everywhere."""
        if self.size == 1:
            return [x]
        self._count("all_gather", x, (self.size - 1) * x.numel())
        return self._all_gather(x.contiguous())

    def all_to_all(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """parts: what each rank is to get, flat. sizes: how many numbers come from each. Own part is not sent."""
        own = parts[self.rank]
        if self.size == 1:
            return [own]
        self._count("all_to_all", own, sum(sizes) - sizes[self.rank])
        empty = own.new_empty(0)
        sent = [empty if i == self.rank else part.contiguous() for i, part in enumerate(parts)]
        found = self._all_to_all(sent, [0 if i == self.rank else n for i, n in enumerate(sizes)])
        found[self.rank] = own
        return found

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of the x of every rank."""
        if self.size == 1:
            return x
        self._count("all_reduce", x, (self.size - 1) * x.numel())
        return self._all_reduce(x.contiguous())

    def reset(self) -> None:
        """Start counting anew."""
        self.received.clear()
        self.calls.clear()

    def _count(self, name: str, x: Tensor, number: int) -> None:
        self.received[name] += number * x.element_size()
        self.calls[name] += 1

    def _all_gather(self, x: Tensor) -> list[Tensor]:
        raise NotImplementedError

    def _all_to_all(self, parts: list[Tensor], sizes: list[int]) -> list[Tensor]:
        raise NotImplementedError

    def _all_reduce(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class GroupTransport(Transport):
    """The ranks of a `torch.distributed` process group, None for all. Gloo and NCCL.

    Raises ValueError where no process group was started.
    """

    def __init__(self, group: Any = None) -> None:
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError("torch.distributed has no process group; call torch.distributed.init_process_group first")
        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        self._dist, self._group = dist, group

    def _all_gather(self, x: Tensor) -> list[Tensor]:
        found = [torch.empty_like(x) for _ in range(self.size)]
        self._dist.all_gather(found, x, group=self._group)
        return found

    def _all_to_all(self, parts: list[Tensor], sizes: list[int]) -> list[Tensor]:
        sent = torch.cat(parts)
        found = sent.new_empty(sum(sizes))
        self._dist.all_to_all_single(found, sent, sizes, [part.numel() for part in parts], group=self._group)
        return list(found.split(sizes))

    def _all_reduce(self, x: Tensor) -> Tensor:
        x = x.clone()
        self._dist.all_reduce(x, group=self._group)
        return x


class ThreadTransport(Transport):
    """Ranks that are threads of one process, for tests and for looking at the mathematics; made by `run_ranks`."""

    def __init__(self, rank: int, slots: list[Any], barrier: threading.Barrier) -> None:
        super().__init__(rank, len(slots))
        self._slots, self._barrier = slots, barrier

    def _swap(self, mine: Any) -> list[Any]:
        self._slots[self.rank] = mine
        self._barrier.wait()
        found = list(self._slots)
        self._barrier.wait()
        return found

    def _all_gather(self, x: Tensor) -> list[Tensor]:
        return [t.clone() for t in self._swap(x.detach())]

    def _all_to_all(self, parts: list[Tensor], sizes: list[int]) -> list[Tensor]:
        found = [sent[self.rank].clone() for sent in self._swap([part.detach() for part in parts])]
        if [t.numel() for t in found] != list(sizes):
            raise RuntimeError(f"rank {self.rank} expected {list(sizes)} numbers, got {[t.numel() for t in found]}")
        return found

    def _all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self._swap(x.detach())).sum(0)


def run_ranks(size: int, function: Callable[[Transport], Any], *, timeout: float = 300.0) -> list[Any]:
    """What `function(transport)` returns on each of `size` ranks, which are threads of this process.

    The first error of a rank is raised again. timeout: seconds that a rank waits for the others.
    """
    slots: list[Any] = [None] * size
    barrier = threading.Barrier(size, timeout=timeout)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            results[rank] = function(ThreadTransport(rank, slots, barrier))
        except BaseException as error:
            if not isinstance(error, threading.BrokenBarrierError):
                errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    if barrier.broken:
        raise RuntimeError(f"the {size} ranks waited {timeout:g} s for each other: they call different collectives")
    return results
