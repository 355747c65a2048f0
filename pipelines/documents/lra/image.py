"""CIFAR-10 as sequences of grey pixels, row by row (arXiv:2011.04006, section 2.4): ten classes, 1,024 tokens of 256.

The pictures are read from a folder of the user's, in either form of the public archive: the binary version
(data_batch_1.bin .. data_batch_5.bin, test_batch.bin) or the Python version (the same names without ending), which is
unpickled by a reader that builds arrays, numbers, texts and containers of these and nothing else.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from .bits import bits, stream
from .split import Split, cached_splits, check_sizes

MEAN, STD = 0.48, 0.24  # of pixel / 255, for models that read one real channel
TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST = "test_batch"
FOLDERS = ("", "cifar-10-batches-bin", "cifar-10-batches-py")
ADVICE = (
    "unpack cifar-10-binary.tar.gz or cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html there, or"
    " set the folder to where it is"
)
_PIXELS = 32 * 32
_RECORD = 1 + 3 * _PIXELS
_LARGEST = 1 << 27  # bytes of a batch; the public ones have 31 million


def image_splits(
    folder: str | Path, *, val: int = 5_000, seed: int = 0, cache_dir: str | Path | None = None
) -> dict[str, Split]:
    """45,000/5,000/10,000 pictures of the archive in `folder`, from the cache or read. `val` of the 50,000 for training
    are drawn for validation. Raises UserError where files are missing or are something else."""
    check_sizes(val=val)
    files = find_batches(Path(folder).expanduser())
    state = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files.values()]

    def make() -> dict[str, Split]:
        batches = {name: read_batch(file) for name, file in files.items()}
        images = np.concatenate([batches[name][0] for name in TRAIN])
        labels = np.concatenate([batches[name][1] for name in TRAIN])
        if val >= len(labels):
            raise UserError(f"val={val} leaves nothing of the {len(labels)} pictures for training")
        order = np.argsort(bits(stream(seed, "cifar-10"), np.arange(len(labels))), kind="stable")
        return {
            "train": _split(images[order[val:]], labels[order[val:]]),
            "val": _split(images[order[:val]], labels[order[:val]]),
            "test": _split(*batches[TEST]),
        }

    options = {"task": "image", "val": val, "seed": seed, "files": state}
    return cached_splits(files[TEST].parent, options, cache_dir, make)


def find_batches(folder: Path) -> dict[str, Path]:
    """The files of the six batches, by name. Raises UserError with what is missing and where to get it."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder} with CIFAR-10; {ADVICE}")
    for place in (folder / inner for inner in FOLDERS):
        for ending in (".bin", ""):
            files = {name: place / f"{name}{ending}" for name in (*TRAIN, TEST)}
            missing = [file.name for file in files.values() if not file.is_file()]
            if not missing:
                return files
            if len(missing) < len(files):
                raise UserError(f"{place} lacks {', '.join(missing)} of CIFAR-10; {ADVICE}")
    raise UserError(f"no CIFAR-10 batches in {folder}; {ADVICE}")


def read_batch(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Grey pictures uint8 (n, 1024) and labels int64 (n,) of a batch. Raises UserError for anything else."""
    if file.stat().st_size > _LARGEST:
        raise UserError(f"{file} has {file.stat().st_size:,} bytes: no batch of CIFAR-10; {ADVICE}")
    content = file.read_bytes()
    data, labels = _binary(file, content) if file.suffix == ".bin" else _pickled(file, content)
    if len(labels) == 0:
        raise UserError(f"{file} has no pictures; {ADVICE}")
    if labels.min() < 0 or labels.max() > 9:
        raise UserError(f"{file} has the label {max(labels.max(), -labels.min())}, not 0 to 9: no batch of CIFAR-10")
    return grey(data), labels


def grey(data: np.ndarray) -> np.ndarray:
    """Brightness uint8 (n, 1024) of colours (n, 3072), all red, then all green, then all blue:
    0.299 R + 0.587 G + 0.114 B (ITU-R 601) in steps of 2^-16, rounded."""
    red, green, blue = (data[:, channel * _PIXELS : (channel + 1) * _PIXELS].astype(np.uint32) for channel in range(3))
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).astype(np.uint8)


def _split(images: np.ndarray, labels: np.ndarray) -> Split:
    return Split(images, np.full(len(labels), _PIXELS, dtype=np.int32), labels, num_classes=10, vocab_size=256)


def _binary(file: Path, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    if len(content) % _RECORD:
        raise UserError(f"{file} has {len(content):,} bytes, not a multiple of {_RECORD:,}: no binary batch; {ADVICE}")
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, _RECORD)
    return records[:, 1:], records[:, 0].astype(np.int64)


def _pickled(file: Path, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    except _Refused as error:
        raise UserError(f"{file} asks for {error}, which no batch of CIFAR-10 needs: not read") from None
    except Exception as error:  # a broken pickle can raise anything
        raise UserError(f"{file} is no Python batch of CIFAR-10 ({type(error).__name__}); {ADVICE}") from None
    batch = {_text(key): value for key, value in batch.items()} if isinstance(batch, dict) else {}
    data, labels = batch.get("data"), batch.get("labels")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3 * _PIXELS,):
        raise UserError(
            f"{file} has no uint8 array 'data' of rows of 3,072: no batch of CIFAR-10 (CIFAR-100?); {ADVICE}"
        )
    if not isinstance(labels, list) or len(labels) != len(data) or not all(type(label) is int for label in labels):
        raise UserError(f"{file} has no list 'labels' of {len(data):,} whole numbers: no batch of CIFAR-10; {ADVICE}")
    return data, np.array(labels, dtype=np.int64)


def _text(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise _Refused(f"the codec {encoding!r:.40}")
    return text.encode(encoding)


class _Refused(pickle.UnpicklingError):
    pass


class _ArrayUnpickler(pickle.Unpickler):
    """Knows the names that a pickled array needs, in either module path that NumPy has had, and no other."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return _latin1
        raise _Refused(f"{module}.{name}")
