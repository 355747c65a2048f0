"""A thread of its own in which a decoder lives, so that one that hangs is left behind."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from .faults import VideoError

T = TypeVar("T")


class Watched:
    """Runs calls one after the other in a daemon thread and gives up on one that shows no progress.

    name: for messages. timeout: seconds without a `beat`, after which the call is given up: VideoError, cause "hangs",
    now and at every later call. The thread cannot be killed; being a daemon, it does not keep the process from ending.
    Decoders release the interpreter's lock while they work; one that did not could not be timed.
    """

    def __init__(self, name: str, timeout: float) -> None:
        self.name, self.timeout = name, timeout
        self.hangs = False
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], _Answer] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._beaten, self._calls = 0.0, 0

    @property
    def busy(self) -> bool:
        """Whether a call runs or has hung."""
        return self._calls > 0

    def beat(self) -> None:
        """Called by the work: it goes on."""
        self._beaten = time.monotonic()

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """What the function returns or raises, run in the thread."""
        if self.hangs:
            raise self._error()
        if self._thread is None:
            self._thread = threading.Thread(target=_work, args=(self._jobs,), daemon=True, name="seqzoo-video")
            self._thread.start()
        answer = _Answer()
        self.beat()
        self._calls += 1
        self._jobs.put((lambda: function(*arguments), answer))
        while not answer.done.wait(max(0.0, self._beaten + self.timeout - time.monotonic())):
            if time.monotonic() - self._beaten >= self.timeout:
                self.hangs = True
                self._jobs.put(None)  # it ends if it ever comes back
                raise self._error()
        self._calls -= 1
        if answer.error is not None:
            raise answer.error
        return answer.value

    def close(self) -> None:
        """Let the thread end after what it does now."""
        if self._thread is not None and not self.hangs:
            self._jobs.put(None)
        self._thread = None

    def __del__(self) -> None:
        self.close()

    def _error(self) -> VideoError:
        return VideoError(f"{self.name}: the decoder gave no answer for {self.timeout:g} seconds", "hangs")


class _Answer:
    def __init__(self) -> None:
        self.done = threading.Event()
        self.value: Any = None
        self.error: BaseException | None = None


def _work(jobs: queue.SimpleQueue[tuple[Callable[[], Any], _Answer] | None]) -> None:
    while (job := jobs.get()) is not None:
        function, answer = job
        try:
            answer.value = function()
        except BaseException as error:
            answer.error = error
        answer.done.set()
        del job, function, answer  # hold nothing while waiting
