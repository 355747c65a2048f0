"""Ctrl-C, SIGTERM and SIGHUP: a training ends its batch and saves; everything else ends at once.

A signal that a shell or `nohup` told the process to ignore stays ignored. A second signal does not wait for the end
of the batch; while a checkpoint is being written it waits.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(KeyboardInterrupt):
    """The run was asked to end by `signum`; Lightning shuts down after it as after Ctrl-C."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class _Wish:
    """What the handler has heard, and what the process is at."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self.process = os.getpid()
        self.deferring = False  # a training looks for the wish between its batches
        self.saving = False


_wish = _Wish()


def asked() -> int | None:
    """The signal that asked this process to end, None where there was none."""
    return _wish.signum


def exit_status(signum: int) -> int:
    """What a shell gives a process that the signal ended: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + signum


def clear() -> None:
    """Forget what was asked, at the beginning of a run."""
    _wish.signum, _wish.deferring, _wish.saving, _wish.process = None, False, False, os.getpid()


def defer(deferring: bool) -> None:
    """Whether the first signal from now on waits for the end of a batch. Lightning has set handlers of its own at the
    beginning of a training, which would raise in the middle of one."""
    _wish.deferring = deferring
    if deferring:
        _install()


@contextlib.contextmanager
def saving() -> Iterator[None]:
    """Within the block a signal is only noted; who saves looks at `asked()` after it."""
    before, _wish.saving = _wish.saving, True
    try:
        yield
    finally:
        _wish.saving = before


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """The handler for a block of the main thread; the handlers before it come back after it, and what was asked is
    forgotten: a later training in this process is not stopped by it."""
    clear()
    before = _install()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        clear()


def _install() -> dict[int, Any]:
    if threading.current_thread() is not threading.main_thread():
        return {}
    found = {number: signal.getsignal(number) for number in SIGNALS}
    wanted = {number: handler for number, handler in found.items() if handler not in (signal.SIG_IGN, None)}
    for number in wanted:
        signal.signal(number, _handle)
    return wanted


def _handle(signum: int, frame: FrameType | None) -> None:
    if os.getpid() != _wish.process:
        _handle_in_child(signum)
        return
    first = _wish.signum is None
    _wish.signum = signum
    name = signal.Signals(signum).name
    if _wish.saving:
        _say(f"{name}: a checkpoint is being written, one moment")
    elif _wish.deferring and first:
        _say(f"{name}: saving after this batch; once more: end at once, without")
    else:
        raise Stopped(signum)


def _handle_in_child(signum: int) -> None:
    """In a worker that was forked from this process, which has the handler too: Ctrl-C is the parent's, which still
    needs the batch; another signal ends it as ever."""
    if signum != signal.SIGINT:
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)


def _say(text: str) -> None:
    # print is not safe in a handler: the signal may have come within another print
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(2, f"{text}\n".encode())
