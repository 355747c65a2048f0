"""The processes of a loader: what each of them reads, so that one that dies or hangs is named with its file.

A reader says `reading(path)`; in a worker that goes into a few bytes of memory that the main process sees too. What
Python itself opens there is noted without being said.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np

_SLOT, _HEAD = 1024, 24  # bytes of a worker: its process, when it began, the length of the text, the text
_UNSAID = (".py", ".pyc", ".so", ".pth")
_UNSAID_PLACES = ("/proc/", "/dev/", "/sys/")
_live: weakref.WeakSet[WorkerNotes] = weakref.WeakSet()
_here: np.ndarray | None = None  # the slot of this process, in a worker


class WorkerError(RuntimeError):
    """A process of a loader has died or hangs. The message: how, and which file it was reading."""


class WorkerNotes:
    """The `worker_init_fn` of a loader: gives each worker its bytes. `done` is to be its collate function."""

    def __init__(self, num_workers: int) -> None:
        import torch  # readers use this module without it

        self._slots = torch.zeros(num_workers, _SLOT, dtype=torch.uint8).share_memory_()
        _live.add(self)

    def __call__(self, worker_id: int) -> None:
        global _here
        _here = self._slots[worker_id].numpy()
        _here[:8].view(np.int64)[0] = os.getpid()
        sys.addaudithook(_opened)  # cannot be taken back: in the worker only

    def found(self) -> Iterator[tuple[int, float, str]]:
        """(process, when it began to read or 0 where it is done, what) of each worker."""
        for slot in self._slots.numpy():
            pid, length = (int(slot[place : place + 8].view(np.int64)[0]) for place in (0, 16))
            text = slot[_HEAD : _HEAD + length].tobytes().decode("utf-8", "replace")
            yield pid, float(slot[8:16].view(np.float64)[0]), text


def reading(name: object) -> None:
    """Note, in a worker, what it reads from now on; costs nothing elsewhere."""
    slot = _here
    if slot is None:
        return
    text = str(name).encode("utf-8", "replace")[-(_SLOT - _HEAD) :]
    slot[16:24].view(np.int64)[0] = len(text)
    slot[_HEAD : _HEAD + len(text)] = np.frombuffer(text, dtype=np.uint8)
    slot[8:16].view(np.float64)[0] = time.time()


def done(batch: Any) -> Any:
    """The collate function of datasets whose items are batches already: the worker has read it."""
    if _here is not None:
        _here[8:16].view(np.float64)[0] = 0.0
    return batch


def _opened(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "open":
        return
    path = arguments[0]
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    if isinstance(path, str) and not path.endswith(_UNSAID) and not path.startswith(_UNSAID_PLACES):
        reading(path)


# What is said -------------------------------------------------------------------------------------------------------

_DIED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.*)", re.DOTALL)
_HANGS = re.compile(r"DataLoader timed out after ([\d.]+) seconds")


def is_worker_failure(error: BaseException) -> bool:
    """Whether a process of a loader died or gave nothing within the loader's time-out."""
    text = str(error)
    return isinstance(error, RuntimeError) and bool(_DIED.match(text) or _HANGS.match(text))


def explain_worker(error: BaseException) -> str:
    """The message for an error of which `is_worker_failure` is true."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    notes = {pid: (began, text) for group in list(_live) for pid, began, text in group.found() if pid}
    hang = _HANGS.match(str(error))
    if hang:
        pid = _awaited(error, notes)
        how = f"gave no batch for {float(hang[1]):g} seconds{_at(pid, notes)}"
        return f"a loader's process {how}; worker_timeout=... waits longer, 0 for ever. {_HINT}"
    deaths = [match for match in (_DIED.match(str(one)) for one in chain) if match]
    pids = [int(word) for word in deaths[0][1].replace(",", " ").split()]
    pid = next((p for p in pids if p in notes), pids[0])
    return f"a loader's process {_how(pid, ' '.join(match[2] for match in deaths), error)}{_at(pid, notes)}. {_HINT}"


_HINT = "Leave that file out, or read it in this process with data.num_workers=0 to see its own error"


def _at(pid: int | None, notes: dict[int, tuple[float, str]]) -> str:
    began, text = notes.get(pid or 0, (0.0, ""))
    if not text:
        return ", before it had opened a file"
    return f" while it was reading {text}" if began else f"; the last that it read is {text}"


def _how(pid: int, text: str, error: BaseException) -> str:
    """How a process ended: from torch's words, or from what Python knows of it."""
    status = re.search(r"exit code (-?\d+)", text)
    code = int(status[1]) if status else None
    killed = re.search(r"killed by signal: ([\w ]+?)\s*\.", text)
    if killed:
        code = next((-int(n) for n in signal.valid_signals() if signal.strsignal(n) == killed[1]), None)
    if not code:
        code = next((w.exitcode for w in _workers(error) if w.pid == pid), None)
    if code is None:
        return "ended"
    if code >= 0:
        return f"ended with exit status {code}"
    name = signal.Signals(-code).name
    why = {
        "SIGKILL": ", as the system does when memory runs out",
        "SIGBUS": ", as happens when /dev/shm is full",
        "SIGSEGV": ", a crash in the library that reads it",
    }
    return f"was killed by {name}{why.get(name, '')}"


def _iterators(error: BaseException) -> Iterator[Any]:
    """The loader's iterators in the frames that the error came through."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        found = frame.f_locals.get("self")
        if hasattr(found, "_rcvd_idx") and hasattr(found, "_workers"):
            yield found


def _workers(error: BaseException) -> list[Any]:
    return [worker for iterator in _iterators(error) for worker in iterator._workers]


def _awaited(error: BaseException, notes: dict[int, tuple[float, str]]) -> int | None:
    """The process whose batch was waited for; where torch does not say, the one that has read longest."""
    for iterator in _iterators(error):
        task = iterator._task_info.get(iterator._rcvd_idx)
        if task is not None:
            return iterator._workers[task[0]].pid
    busy = {pid: began for pid, (began, _) in notes.items() if began}
    return min(busy, key=busy.__getitem__) if busy else None


# Waiting for a batch --------------------------------------------------------------------------------------------------


def next_batch(batches: Iterator[Any], processes: Sequence[BaseProcess]) -> Any:
    """The next of a loader's batches. The death of one of the processes, its workers, is an error while this one waits,
    at once and not at the end of the time-out; in between it is none, so that the step under way is not lost.

    Raises StopIteration at the end, RuntimeError for a dead worker, which says how it ended.
    """
    if not processes or not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        return next(batches)

    def look(*_: Any) -> None:
        for worker in processes:
            if worker.exitcode:  # 0: it was told to end, as all are after the last batch
                raise RuntimeError(
                    f"DataLoader worker (pid {worker.pid}) exited unexpectedly with exit code {worker.exitcode}"
                )

    before = signal.signal(signal.SIGCHLD, look)
    try:
        look()
        return next(batches)
    except (ConnectionError, EOFError) as error:
        if not str(error).startswith("Caught "):  # no error within a worker: what it has sent died with it
            look()
        raise
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)


def processes_of(batches: Any) -> tuple[BaseProcess, ...]:
    """The workers of a loader's iterator."""
    return tuple(getattr(batches, "_workers", ()))
