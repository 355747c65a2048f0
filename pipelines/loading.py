"""Which items make which batch: shuffled without lists, repeatable, split over processes, resumable mid-epoch.

An item is a number: a window of a table, a row of a text corpus.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from . import stopping
from .failures.workers import WorkerNotes, done, explain_worker, is_worker_failure, next_batch, processes_of

log = logging.getLogger("seqzoo")

_WINDOW = 50  # batches within which items are sorted by length
_RESTARTS = 3  # of dead workers, without a batch in between
_TIMEOUT = 600.0  # seconds without a batch after which a worker hangs
_timeout = _TIMEOUT


def set_worker_timeout(seconds: float | None) -> None:
    """How long the loaders that are made from now on wait for a batch of a worker. 0: for ever; None: the default."""
    global _timeout
    if seconds is not None and seconds < 0:
        raise ValueError(f"worker_timeout={seconds} must be at least 0 seconds")
    _timeout = _TIMEOUT if seconds is None else float(seconds)


class IndexSampler(DistributedSampler[Any]):
    """Yields the numbers of a batch's items as an int64 array.

    shuffle=False (evaluation): every item once in order, the last batch shorter; with several processes,
    process r takes the batches r, r + world, ...: nothing is dropped and nothing repeated.

    shuffle=True (training): an endless stream of permutations, each a function of (seed, its number) alone,
    cut into batches; epoch e takes the batches from e * len on. By default an epoch is one permutation; with
    `steps` it has that many batches, and every item still comes once before any comes twice. A permutation
    costs 4 or 8 bytes an item. With several processes each takes its share of every step, or with `shared` all
    take the same batches.

    Lightning recognises the base class and leaves the splitting to this one.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        steps: int | None = None,
        shared: bool = False,
    ) -> None:
        # The base constructor would ask for the process group now; here that happens when it is needed.
        for name, value in (("batch_size", batch_size), ("steps", 1 if steps is None else steps)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.size, self.batch_size, self.shuffle, self.seed, self.steps = (
            size,
            batch_size,
            shuffle,
            seed,
            steps,
        )
        self.shared = shared
        self.epoch = 0
        self.position = 0  # the batch of this epoch that comes first; not 0 only after a resume
        self._order: tuple[int, np.ndarray] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; going to another one forgets a position within this one."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    @property
    def rows(self) -> int:
        """Items of a training step of all processes."""
        return self.batch_size * self._part()[1]

    def _part(self) -> tuple[int, int]:
        """Which of how many parts of each step this process takes."""
        return (0, 1) if self.shared else _process()

    def __len__(self) -> int:
        rank, world = self._part()
        if self.shuffle:
            return (self.steps or -(-self._batches // world)) if self.size else 0
        return max(-(-(self._batches - rank) // world), 0)

    def __iter__(self) -> Iterator[np.ndarray]:
        rank, world = self._part()
        length, begin = len(self), self.position
        self.position = 0
        for step in range(begin, length):
            if not self.shuffle:
                first = (step * world + rank) * self.batch_size
                yield np.arange(first, min(first + self.batch_size, self.size))
                continue
            cycle, batch = divmod((self.epoch * length + step) * world + rank, self._batches)
            first = batch * self.batch_size
            yield self._permutation(cycle)[first : first + self.batch_size].astype(np.int64)

    @property
    def _batches(self) -> int:
        return -(-self.size // self.batch_size)

    def _permutation(self, cycle: int) -> np.ndarray:
        if self._order is None or self._order[0] != cycle:
            order = np.arange(self.size, dtype=np.int32 if self.size < 2**31 else np.int64)
            np.random.default_rng([self.seed, cycle]).shuffle(order)
            self._order = (cycle, order)
        return self._order[1]


class BucketSampler(IndexSampler):
    """An `IndexSampler` whose training batches hold items of similar lengths: less padding.

    lengths: of the items. Of every fifty batches of a permutation the items are sorted by length, and the
    batches come in random order; every item still comes once before any comes twice. With several processes a batch in
    this sense is that of all of them, of which each takes its part: they wait for none with longer items, but in the
    step in which a permutation ends.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, *, seed: int = 0, steps: int | None = None) -> None:
        super().__init__(len(lengths), batch_size, shuffle=True, seed=seed, steps=steps)
        self.lengths = lengths
        self._bucketed: tuple[int, np.ndarray] | None = None

    def _permutation(self, cycle: int) -> np.ndarray:
        if self._bucketed is None or self._bucketed[0] != cycle:
            order = super()._permutation(cycle).copy()
            together, ranks = self.rows, self._part()[1]
            size = together * _WINDOW
            random = np.random.default_rng([self.seed, cycle, 1])
            # the first batches may belong to the step in which the permutation before ends
            for begin in range(-cycle * self._batches % ranks * self.batch_size, len(order), size):
                window = order[begin : begin + size]
                window = window[np.argsort(self.lengths[window], kind="stable")]
                whole = len(window) // together * together
                # the one short batch, at the end of the last window, stays where it is
                batches = window[:whole].reshape(-1, together)
                window = np.concatenate([batches[random.permutation(len(batches))].reshape(-1), window[whole:]])
                order[begin : begin + size] = window
            self._bucketed = (cycle, order)
        return self._bucketed[1]


class NumberSampler(IndexSampler):
    """Arrays of numbers that never come again, batch by batch; which ones is a function of epoch and step alone.

    steps: batches of an epoch in each process; or size: numbers of an epoch, in all of them together.
    """

    def __init__(self, batch_size: int, *, steps: int | None = None, size: int | None = None) -> None:
        if (steps is None) == (size is None):
            raise ValueError(f"steps={steps} and size={size}: give one of them")
        super().__init__(batch_size, batch_size, shuffle=True, steps=1 if steps is None else steps)
        self.numbers = size

    def __len__(self) -> int:
        return super().__len__() if self.numbers is None else -(-self.numbers // (self.batch_size * _process()[1]))

    def _permutation(self, cycle: int) -> np.ndarray:
        return np.arange(cycle * self.batch_size, (cycle + 1) * self.batch_size, dtype=np.int64)


class ResumableLoader(DataLoader[Any]):
    """A DataLoader over an `IndexSampler` that knows its position: training resumes within an epoch.

    before_batch: called when the next batch is asked for, before anything is drawn or read for it. Workers that die,
    for want of memory perhaps, are started again at the same batch, three times; an error within one is raised as ever.
    """

    before_batch: Callable[[], None] | None = None
    _taken = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        sampler = self.sampler
        if not isinstance(sampler, IndexSampler):  # Lightning has put another one in its place (overfit_batches)
            for batch in super().__iter__():
                yield batch
                if self.before_batch is not None:
                    self.before_batch()
            return
        self._taken = sampler.position
        batches, restarts = None, 0
        while True:
            if self.before_batch is not None and self._taken < len(sampler):
                self.before_batch()
            if batches is None:
                batches = self._epoch(sampler)
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                restarts += 1
                if not (self.num_workers and _worker_died(error)) or stopping.asked() or restarts > _RESTARTS:
                    raise
                said = explain_worker(error) if is_worker_failure(error) else error
                log.warning("a data worker died (%s): all start again at batch %d", said, self._taken)
                self._iterator, sampler.position, batches = None, self._taken, None
                continue
            restarts = 0
            self._taken += 1
            yield batch

    def _epoch(self, sampler: IndexSampler) -> Iterator[Any]:
        # The base class draws a seed for its workers when an epoch begins; one that is gone on with has drawn it.
        begun = sampler.position > 0
        if self.num_workers or self.pin_memory or self.batch_size is not None:
            with torch.random.fork_rng(devices=[], enabled=begun), _handler_kept("SIGCHLD"):
                batches = super().__iter__()
            yield from _watched(batches)
            return
        # In this process a batch is the dataset's own: the base class calls the profiler around it, which costs as much
        # as a few of its tensors. The seed is drawn all the same, so that what is drawn next depends on no option.
        if not begun:
            torch.empty((), dtype=torch.int64).random_(generator=self.generator)
        for indices in sampler:
            yield self.collate_fn(self.dataset[indices])

    def state_dict(self) -> dict[str, int]:
        """Epoch and number of its batches that were handed out."""
        return {"epoch": getattr(self.sampler, "epoch", 0), "taken": self._taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the batches that a saved state had handed out; a finished epoch starts anew."""
        sampler = self.sampler
        if isinstance(sampler, IndexSampler):
            sampler.set_epoch(state["epoch"])
            self._taken = state["taken"]
            sampler.position = state["taken"] if state["taken"] < len(sampler) else 0


class EvaluationLoader(DataLoader[Any]):
    """A DataLoader over an `IndexSampler` of evaluation, which may have no batch for this process.

    Its length is at least 1 then: Lightning refuses a loader without batches, and the others would wait for ever for
    the sums of a process that leaves its evaluation out.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return _watched(super().__iter__())

    def __len__(self) -> int:
        own = super().__len__()
        return max(own, 1) if getattr(self.sampler, "size", 0) else own


def loader_options(num_workers: int) -> dict[str, Any]:
    """Arguments of a DataLoader over an `IndexSampler`, whose items are batches already.

    With a generator of its own: the base class draws a seed for workers at times that a resumed run does not repeat.
    Workers note what they read, and one that gives nothing for `set_worker_timeout` seconds ends the run.
    """
    return {
        "generator": torch.Generator(),
        "batch_size": None,
        "collate_fn": done if num_workers else identity,
        "worker_init_fn": WorkerNotes(num_workers) if num_workers else None,
        "timeout": _timeout if num_workers else 0,
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "pin_memory": torch.cuda.is_available(),
    }


def identity(batch: dict[str, Any]) -> dict[str, Any]:
    """The collate function of datasets whose items are batches already."""
    return batch


def _watched(batches: Any) -> Iterator[Any]:
    """A loader's batches, with the deaths of its workers while one is waited for."""
    processes = processes_of(batches)
    while True:
        try:
            batch = next_batch(batches, processes)
        except StopIteration:
            return
        yield batch


def _worker_died(error: Exception) -> bool:
    """Whether a worker is gone, as torch says or because what it has sent can no longer be fetched from it; an error
    within one is not."""
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker (pid")
    return isinstance(error, (ConnectionError, EOFError)) and not str(error).startswith("Caught ")


@contextlib.contextmanager
def _handler_kept(name: str) -> Iterator[None]:
    """Keep a signal's handler: torch sets one by which the death of a worker is an error wherever this process is, in
    the middle of a step too. Without it the batch that the worker owes says so, seconds later."""
    number = getattr(signal, name, None)
    if number is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(number)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(number, before)


def _process() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
