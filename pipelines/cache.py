"""The folder where tables and corpora are kept as plain arrays: which one, and written all or nothing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .atomic import is_full_disk
from .errors import UserError

_UNUSED_SECONDS = 7 * 86_400.0


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """`cache_dir`, else $SEQZOO_CACHE, else seqzoo/ in the user's cache folder, else in the temporary folder;
    made.
    """
    if cache_dir or os.environ.get("SEQZOO_CACHE"):
        root = Path(cache_dir or os.environ["SEQZOO_CACHE"]).expanduser()
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the cache folder {root}: {error.strerror}; set data.cache_dir") from None
        return root
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    user = os.getuid() if hasattr(os, "getuid") else "user"
    for root in (home / "seqzoo", Path(tempfile.gettempdir()) / f"seqzoo-{user}"):
        with contextlib.suppress(OSError):
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            if os.access(root, os.W_OK | os.X_OK):
                return root
    raise UserError("no writable cache folder; set data.cache_dir")


def cached_folder(
    path: Path,
    options: dict[str, Any],
    cache_dir: str | Path | None,
    build: Callable[[Path], None],
    kind: str = "tables",
) -> Path:
    """The folder that `build` once filled for this file and these options; kind names the shelf it stands on.

    The key is the file's path, size and modification time with `options` (plain values). `build` writes into
    a temporary folder that is renamed at the end, so a killed run leaves nothing that another would take for
    whole. Folders of older states of the same file go once nobody has opened them for a week.
    """
    path = path.expanduser().resolve()
    state = path.stat()
    name = f"{path.name.split('.')[0][:40]}-{_digest(str(path))[:8]}"
    key = _digest(json.dumps([state.st_size, state.st_mtime_ns, options], sort_keys=True, default=str))[:16]
    parent = cache_root(cache_dir) / kind / name
    folder = parent / key
    if not folder.is_dir():
        try:
            parent.mkdir(parents=True, exist_ok=True)
            with _temporary_folder(parent) as temporary:
                build(temporary)
                # Another process may have been first, with the same content.
                with contextlib.suppress(OSError):
                    os.rename(temporary, folder)
        except OSError as error:
            if is_full_disk(error):
                raise UserError(f"the disk of the cache folder {parent} is full; set data.cache_dir") from None
            raise UserError(f"cannot write the cache folder {parent}: {error}; set data.cache_dir") from None
    with contextlib.suppress(OSError):
        os.utime(folder)
    _prune(parent, keep=folder)
    return folder


@contextlib.contextmanager
def _temporary_folder(parent: Path) -> Iterator[Path]:
    temporary = Path(tempfile.mkdtemp(dir=parent, prefix=".tmp-"))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _prune(parent: Path, keep: Path) -> None:
    for folder in parent.iterdir():
        with contextlib.suppress(OSError):
            if folder != keep and time.time() - folder.stat().st_mtime > _UNUSED_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()  # paths need not be UTF-8
