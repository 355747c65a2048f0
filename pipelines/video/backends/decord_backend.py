"""decord, in a process of its own that the readers of this process share: it can be killed, and it may crash."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError, one_line
from ..frame_table import FrameTable

_CHILD = Path(__file__).with_name("decord_child.py")
_CHUNK_FRAMES, _CHUNK_BYTES = 32, 1 << 25  # that are decoded in one call
# Elsewhere decord 0.6 loses frames at the start or has no times.
_CONTAINERS = ("mov", "matroska")


class DecordError(RuntimeError):
    """What decord said, or that it cannot be trusted with a file."""


def open_file(
    path: Path, table: FrameTable, *, size: tuple[int, int], threads: int, beat: Callable[[], None]
) -> DecordDecoder:
    """Raises DecordError for a file in which decord would count frames differently."""
    if importlib.util.find_spec("decord") is None:
        raise UserError("reading video with decord needs the package decord: pip install 'seqzoo[video]'")
    if table.container not in _CONTAINERS:
        raise DecordError(f"decord does not count the frames of a {table.container} file right")
    if not table.alone:
        raise DecordError("decord cannot be told which of several video streams to take")
    if not table.closed:
        raise DecordError("decord does not find frames in open groups of pictures")
    return DecordDecoder(path, table, size=size, beat=beat)


class DecordDecoder:
    """Frames as shown: decord rotates and scales by itself, with swscale as PyAV does."""

    def __init__(self, path: Path, table: FrameTable, *, size: tuple[int, int], beat: Callable[[], None]) -> None:
        self._path, self._table, self._beat = path, table, beat
        self._size, self._scaled = size, size != table.shown
        self._child: _Child | None = None
        self._number = next(_numbers)
        self._connect()

    def frames(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        step = max(1, min(_CHUNK_FRAMES, _CHUNK_BYTES // (3 * self._size[0] * self._size[1])))
        for begin in range(0, len(numbers), step):
            chunk = list(numbers[begin : begin + step])
            if self._child is not _child or self._child is None or not self._child.runs:
                self._connect()  # another file brought it down
            assert self._child is not None
            answer, content = self._child.ask({"do": "read", "id": self._number, "numbers": chunk})
            self._beat()
            shape = (len(chunk), *self._size, 3)
            if tuple(answer["shape"]) != shape:
                raise DecordError(f"decord gave frames of {answer['shape']}, not {list(shape)}")
            yield from np.frombuffer(content, np.uint8).reshape(shape)

    def close(self) -> None:
        if self._child is not None and self._child.runs:
            with contextlib.suppress(DecordError):
                self._child.ask({"do": "close", "id": self._number})
        self._child = None

    def __del__(self) -> None:
        child: _Child | None = getattr(self, "_child", None)
        if child is not None:
            child.dropped.append(self._number)

    def kill(self) -> None:
        """End the process: it hangs."""
        if self._child is not None:
            self._child.kill()

    def _connect(self) -> None:
        self._child = _running()
        height, width = self._size if self._scaled else (-1, -1)
        answer, content = self._child.ask(
            {"do": "open", "id": self._number, "path": str(self._path.absolute()), "height": height, "width": width}
        )
        seconds, expected = np.frombuffer(content, np.float64), self._table.seconds
        if answer["frames"] != len(expected):
            raise DecordError(f"decord counts {answer['frames']:,} frames, {len(expected):,} can be decoded")
        # Its times are float32.
        if not np.allclose(seconds - seconds[0], expected - expected[0], rtol=1e-6, atol=1e-3):
            raise DecordError("decord has other times")


class _Child:
    """The process and the pipes to it; one question at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._lock = threading.Lock()
        self.dropped: deque[int] = deque()  # files whose readers are gone
        self.runs = True

    def ask(self, question: dict[str, Any]) -> tuple[dict[str, Any], bytearray]:
        drop = [self.dropped.popleft() for _ in range(len(self.dropped))]
        text = json.dumps({**question, "drop": drop}).encode("utf-8", "surrogateescape")
        with self._lock:
            try:
                given, answers = self._process.stdin, self._process.stdout
                assert given is not None and answers is not None
                given.write(len(text).to_bytes(4, "little") + text)
                given.flush()
                head = answers.read(4)
                answer = json.loads(answers.read(int.from_bytes(head, "little"))) if len(head) == 4 else None
                content = bytearray(0 if answer is None else answer["bytes"])
                if answer is None or answers.readinto(content) != len(content):  # type: ignore[attr-defined]
                    raise EOFError
            except (OSError, ValueError, EOFError):
                self.kill()
                raise DecordError("decord crashed") from None
        if "error" in answer:
            raise DecordError(_reason(answer["error"]))
        return answer, content

    def kill(self) -> None:
        self.runs = False
        with contextlib.suppress(OSError):
            self._process.kill()
            self._process.wait(5)

    def forget(self) -> None:
        """In a forked process: the pipes are the parent's."""
        self.runs = False
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    os.close(pipe.fileno())


_numbers = itertools.count()
_child: _Child | None = None
_start = threading.Lock()


def _running() -> _Child:
    global _child
    with _start:
        if _child is None or not _child.runs:
            _child = _Child()
        return _child


def _end() -> None:
    if _child is not None:
        _child.kill()


def _after_fork() -> None:
    global _child, _start
    if _child is not None:
        _child.forget()
        _left.append(_child)  # collecting it would wait for a process that is not this one's
    _child, _start = None, threading.Lock()


_left: list[object] = []
os.register_at_fork(after_in_child=_after_fork)
atexit.register(_end)


def _reason(text: str) -> str:
    """The end of decord's message, without the place in its source and the stack."""
    line = one_line(text.split("Stack trace")[0])
    return f"decord: {line.rsplit('Check failed: ', 1)[-1].rsplit('.cc:', 1)[-1][:200]}"
