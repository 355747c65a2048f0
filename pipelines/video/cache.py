"""Arrays computed from video, kept on the disk: bounded, the least recently used goes first, shared by processes."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from ..atomic import TEMPORARY_SUFFIX, atomic_path, is_full_disk
from ..cache import cache_root
from ..errors import UserError, one_line
from .faults import say_once

_SUFFIX = ".array"
_DIGEST = 32  # bytes of SHA-256 before the array
_LEFT_SECONDS = 3600.0  # after which a temporary file is of a writer that was killed
_LOOK_EVERY = 64  # arrays written by this process before it looks again what the others wrote


class FeatureCache:
    """Numpy arrays by a key of plain values, such as (reader.key, scorer.key, settings).

    folder: None for video/ in the cache folder ($SEQZOO_CACHE, else the user's). max_bytes: of all entries together;
    past it those that were not asked for the longest go. Writes are all or nothing, several processes may use one
    folder, an entry that is damaged is as one that is not there. A disk that is full or cannot be written is said once,
    and nothing more is kept by this object.
    """

    def __init__(self, folder: str | Path | None = None, max_bytes: int = 4 << 30) -> None:
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 0:
            raise UserError(f"max_bytes={max_bytes!r} must be a whole number of at least 0")
        self.folder = Path(folder).expanduser() if folder is not None else cache_root() / "video"
        self.max_bytes = max_bytes
        self._total, self._written = -1, 0  # bytes there when last looked, plus what was written since; arrays written
        self._off = False

    def get(self, key: Any) -> np.ndarray | None:
        """The array that was put by the key, None where there is none."""
        path = self._path(key)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        if hashlib.sha256(content[_DIGEST:]).digest() != content[:_DIGEST]:
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return np.load(io.BytesIO(content[_DIGEST:]), allow_pickle=False)

    def put(self, key: Any, array: ArrayLike) -> bool:
        """Keep an array; whether it was kept: not when it alone is larger than max_bytes, nor on a full disk.

        Raises UserError for an array of Python objects.
        """
        values = np.asarray(array)
        if values.dtype.hasobject:
            raise UserError(f"an array of {values.dtype} cannot be kept")
        buffer = io.BytesIO()
        np.save(buffer, values, allow_pickle=False)
        content = buffer.getvalue()
        size = len(content) + _DIGEST
        if self._off or size > self.max_bytes:
            return False
        path = self._path(key)
        try:
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                file.write(hashlib.sha256(content).digest())
                file.write(content)
        except OSError as error:
            self._off = True
            why = "its disk is full" if is_full_disk(error) else one_line(error.strerror or error)
            say_once(str(self.folder), f"nothing more is cached here: {why}")
            return False
        self._written += 1
        self._total += size
        if self._total - size < 0 or self._total > self.max_bytes or self._written % _LOOK_EVERY == 0:
            self._bound(path)
        return True

    def clear(self) -> None:
        """Remove every entry."""
        for path, _, _ in self._entries():
            path.unlink(missing_ok=True)
        self._total = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_total": -1, "_written": 0}

    def _path(self, key: Any) -> Path:
        try:
            text = json.dumps(key, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(f"a key of plain values is needed, not {key!r} ({one_line(error)})") from None
        name = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        return self.folder / name[:2] / f"{name[2:40]}{_SUFFIX}"

    def _entries(self) -> list[tuple[Path, int, int]]:
        """Path, time of last use and bytes of each; what killed writers left is removed."""
        found = []
        for path in self.folder.glob("??/*"):
            with contextlib.suppress(OSError):  # another process was first
                state = path.stat()
                if path.suffix == _SUFFIX:
                    found.append((path, state.st_mtime_ns, state.st_size))
                elif path.suffix == TEMPORARY_SUFFIX and time.time() - state.st_mtime > _LEFT_SECONDS:
                    path.unlink()
        return found

    def _bound(self, keep: Path) -> None:
        entries = self._entries()
        self._total = sum(size for _, _, size in entries)
        for path, _, size in sorted(entries, key=lambda entry: entry[1]):
            if self._total <= self.max_bytes:
                break
            if path != keep:
                with contextlib.suppress(OSError):
                    path.unlink()
                self._total -= size


class Readable(Protocol):
    """A VideoReader, or what reads like one."""

    @property
    def size(self) -> tuple[int, int]: ...
    def read(self, indices: ArrayLike) -> np.ndarray: ...
    def identities(self, indices: ArrayLike) -> list[tuple[str, int]]: ...


def read_cached(reader: Readable, indices: ArrayLike, cache: FeatureCache) -> np.ndarray:
    """Frames uint8 (n, H, W, 3) as `reader.read` gives them; those that the cache has are not decoded again."""
    numbers = np.asarray(indices, np.int64).reshape(-1)
    height, width = reader.size
    way = getattr(reader, "asked_backend", "")
    keys = [["frame", key, frame, height, width, way] for key, frame in reader.identities(numbers)]
    frames = np.empty((len(numbers), height, width, 3), np.uint8)
    missing = []
    for place, key in enumerate(keys):
        found = cache.get(key)
        if found is None or found.shape != frames.shape[1:] or found.dtype != np.uint8:
            missing.append(place)
        else:
            frames[place] = found
    if missing:
        frames[missing] = reader.read(numbers[missing])
        for place in missing:
            cache.put(keys[place], frames[place])
    return frames
