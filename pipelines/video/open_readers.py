"""The readers of this process whose decoders are open: few at a time, and none of a parent's."""

from __future__ import annotations

import itertools
import os
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .reader import VideoReader

# Each holds a file, a thread and the frames that it refers to. The one that was not asked for the longest is closed;
# its reader opens it again.
MOST_OPEN = 16

_last_use: weakref.WeakKeyDictionary[VideoReader, int] = weakref.WeakKeyDictionary()
_uses = itertools.count()
_left: list[object] = []


def remember(reader: VideoReader) -> None:
    """A reader that may open a decoder."""
    _last_use[reader] = -1


def use(reader: VideoReader) -> None:
    """A reader is about to decode: make room for it."""
    others = [(used, other) for other, used in list(_last_use.items()) if other is not reader and other.is_idle]
    for _, other in sorted(others, key=lambda pair: pair[0])[: max(0, len(others) - MOST_OPEN + 1)]:
        other.close()
    _last_use[reader] = next(_uses)


def _after_fork() -> None:
    """In the child: it has the memory of decoders and not their threads. To close one, or to let it be collected, would
    wait for ever."""
    for reader in list(_last_use):
        _left.append(reader.leave_to_parent())


os.register_at_fork(after_in_child=_after_fork)
