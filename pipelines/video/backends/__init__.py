"""The decoders behind one interface, and the order in which they are tried."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...errors import UserError, nearest, one_line
from ..faults import VideoError
from ..frame_table import FrameTable

# Tried in this order by "auto".
BACKENDS = ("decord", "av", "torchcodec")


class Decoder(Protocol):
    """Frames of one file by their numbers in its FrameTable, as they are shown: rotated and scaled."""

    def frames(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        """uint8 (height, width, 3) for each number; the numbers rise."""

    def close(self) -> None: ...


_MOST_TABLES = 256
_tables: dict[tuple[str, int, int], FrameTable] = {}


def open_decoder(
    name: str, path: Path, table: FrameTable, *, size: tuple[int, int], threads: int, beat: Callable[[], None]
) -> Decoder:
    """The decoder of that name for a file.

    size: (height, width) of the frames as they are shown; the file's own: they are not scaled. threads: for
    decoding. beat: to be called while it works. Raises VideoError, UserError when its package is missing, or what the
    package raises.
    """
    if name not in BACKENDS:
        raise UserError(f"backend={name!r} is not a choice.{nearest(name, ('auto', *BACKENDS))}")
    module = importlib.import_module(f".{name}_backend", __name__)
    return module.open_file(path, table, size=size, threads=threads, beat=beat)


def open_table(path: Path, *, threads: int, beat: Callable[[], None]) -> FrameTable:
    """The frames of a file; those of the files read last are known, as a data set opens the same ones again and again.

    Raises VideoError, saying what is wrong.
    """
    reading = importlib.import_module(".av_backend", __name__)
    state = path.stat()
    key = (str(path.absolute()), state.st_size, state.st_mtime_ns)
    table = _tables.get(key)
    if table is None:
        try:
            table = reading.read_table(path, threads=threads, beat=beat)
        except UserError:
            raise
        except Exception as error:  # PyAV's own, on damaged files
            raise VideoError(
                f"{path}: its frames cannot be listed ({one_line(error) or type(error).__name__})"
            ) from None
    while len(_tables) >= _MOST_TABLES:
        _tables.pop(next(iter(_tables)), None)
    _tables[key] = table
    return table


def package(name: str, install: str = "'seqzoo[video]'") -> Any:
    """The module of that name. Raises UserError with the command that installs it."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        missing = getattr(error, "name", None) or ""
        top = name.split(".")[0]
        if isinstance(error, ImportError) and missing in (name, top):
            raise UserError(f"reading video needs the package {top}: pip install {install}") from None
        raise UserError(f"the package {top} is installed and cannot be loaded: {one_line(error)[:200]}") from None
