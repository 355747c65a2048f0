"""Hugging Face `datasets`: saved folders, local tables and shards, or a name that a hub knows."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any, NamedTuple

from .errors import UserError, nearest, one_line

# What `datasets` calls the readers of single files.
_READERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".txt": "text",
}
_PACKED = (".gz", ".bz2", ".xz", ".zst")


class LocalData(NamedTuple):
    """anchor: the file or folder that was named, or that holds the pattern. files: all that it consists of."""

    anchor: Path
    files: list[Path]


def is_table(path: str) -> bool:
    """Whether this is a file or pattern that only `datasets` reads: Parquet or Arrow."""
    return not path.startswith("hf:") and Path(path).suffix.lower() in (".parquet", ".arrow")


def local_data(name: str) -> LocalData | None:
    """The files of a dataset that is here; None for a name that a hub may know.

    Raises UserError for a path that leads nowhere.
    """
    place = Path(name).expanduser()
    if place.is_dir():
        return LocalData(place, sorted(p for p in place.rglob("*") if p.is_file()))
    if place.is_file():
        return LocalData(place, [place])
    if glob.has_magic(name):
        found = sorted(Path(p) for p in glob.glob(str(place), recursive=True) if Path(p).is_file())
        if not found:
            raise UserError(f"data.path=hf:{name}: no file matches this pattern")
        return LocalData(found[0].parent, found)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or _reader(place) is not None:
        siblings = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
        raise UserError(f"no such file or folder: data.path=hf:{name}.{nearest(place.name, siblings)}")
    return None


def _reader(path: Path) -> str | None:
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in _PACKED:
        suffixes.pop()
    return _READERS.get(suffixes[-1]) if suffixes else None


def open_dataset(name: str, split: str, streaming: bool) -> Any:
    """A `datasets.Dataset`, or an IterableDataset where streaming. Raises UserError with the cause when it cannot be
    opened."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"data.path=hf:{name} needs the package datasets: pip install seqzoo[text]") from None
    local = local_data(name)
    folder = Path(name).expanduser()
    try:
        if (folder / "dataset_info.json").is_file():
            return datasets.load_from_disk(str(folder))
        if (folder / "dataset_dict.json").is_file():
            every = datasets.load_from_disk(str(folder))
            if split not in every:
                raise UserError(f"{name} has no split {split!r} (data.hf_split).{nearest(split, list(every))}")
            return every[split]
        if local is None or (local.anchor.is_dir() and local.anchor == folder):
            return datasets.load_dataset(name if local is None else str(folder), split=split, streaming=streaming)
        reader = _reader(local.files[0])
        if reader is None:
            raise UserError(f"data.path=hf:{name}: {local.files[0].name} ends in none of {', '.join(_READERS)}")
        return datasets.load_dataset(reader, data_files=list(map(str, local.files)), split=split, streaming=streaming)
    except UserError:
        raise
    except Exception as error:  # datasets raises a dozen kinds: no network, no such name, no such split
        raise UserError(f"data.path=hf:{name} cannot be opened: {one_line(error)[:300]}") from None
