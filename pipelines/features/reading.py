"""What every kind of file has in common on its way into a model: rows, windows, and the user's choice of files."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import pyarrow as pa

from ..errors import UserError, nearest
from .trained import Trained

T = TypeVar("T")


class Rows(NamedTuple):
    """A batch of the model. ids: the columns of each row of its features beside them. args, kwargs: of `forward`.
    times: (L) -> of each row, when its L tokens are, of which only the real ones count. spare: so many rows of features
    at the end stand for nothing."""

    ids: list[dict[str, Any]]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    times: Callable[[int], list[np.ndarray]]
    spare: int = 0


class Reader(Protocol):
    """Files as batches. columns: names and types of the columns that tell what a row is. time: type of the times of
    tokens. unit: of start and end, for the file's metadata. failed: what could not be read to its end."""

    columns: dict[str, pa.DataType]
    time: pa.DataType
    unit: str
    failed: list[str]

    def batches(self, size: int) -> Iterator[Rows]: ...


def windows(length: Any, window: Any, stride: Any) -> Iterator[tuple[Any, Any]]:
    """Spans (start, stop) of at most `window` whose starts are `stride` apart and that reach to the end; one span where
    window is None. Numbers of any kind, seconds to a millionth. Nothing is left out unless stride is above window."""
    for number in itertools.count():
        start = number * (stride or window or 0)
        if number and start >= length - 1e-6:
            return
        last = window is None or start + window >= length - 1e-6
        yield start, length if last else start + window
        if last:
            return


def groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter; nothing is read ahead."""
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group


def data_options(cfg: Mapping[str, Any], trained: Trained, cls: type) -> dict[str, Any]:
    """The values of the section `data` for the files that a model reads, those of cls's arguments; of the default
    section of another kind of files its path alone.

    Raises UserError for a section of another kind that was chosen, and for a key of it that was set.
    """
    from ..config_files import default_options, find_option

    given = dict(cfg["data"] or {"path": None})
    known = set(inspect.signature(cls.__init__).parameters)  # type: ignore[misc]
    if set(given) <= known:
        return given
    import yaml

    file = find_option("data", default_options()["data"])
    default = {} if file is None else yaml.safe_load(file.read_text(encoding="utf-8"))
    wrong = [key for key in given if key not in known]
    if set(given) != set(default):
        raise UserError(
            f"data.{wrong[0]} is no option of the files that {trained.model} reads (task {trained.task}); leave data= "
            f"out, or choose one of that task.{nearest(wrong[0], known)}"
        )
    changed = [key for key in wrong if given[key] != default[key]]
    if changed:
        raise UserError(f"data.{changed[0]} is no option of the files that {trained.model} reads (task {trained.task})")
    return {"path": None if given["path"] == default["path"] else given["path"]}


def option_arguments(classes: Iterable[type]) -> set[str]:
    """The names of the arguments of the data of all tasks."""
    return {key for cls in classes for key in inspect.signature(cls.__init__).parameters} - {"self", "seed"}  # type: ignore[misc]


def check_window(task: Mapping[str, Any], *, whole: bool, what: str) -> tuple[Any, Any]:
    """task.window and task.stride. whole: they count tokens. Raises UserError for what is no number above 0."""
    found = []
    for key in ("window", "stride"):
        value = task.get(key)
        wrong = value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0)
        if wrong or (whole and value is not None and value != int(value)):
            raise UserError(f"task.{key}={value!r} must be a number above 0 ({what}), or null")
        found.append(int(value) if whole and value is not None else value)
    return found[0], found[1]
