"""Documents of Hugging Face `datasets`: saved folders, local tables and shards, or a name that a hub knows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import UserError, one_line
from ..hub_datasets import open_dataset
from .sources import Document, from_record


def _records(found: Any, name: str, field: str) -> Iterator[tuple[int, Document | None]]:
    """(records read, the document of the last one or None where it is empty)."""
    number, records = 0, iter(found)
    while True:
        try:
            record = next(records)
        except StopIteration:
            return
        except Exception as error:  # a damaged file, a connection that is gone
            raise UserError(
                f"data.path=hf:{name}: cannot read on after {number} records: {one_line(error)[:300]}"
            ) from None
        document = next(from_record(record, field, f"{name}#{number}", f"{name}, record {number}"), None)
        number += 1
        yield number, document


def dataset_documents(name: str, *, split: str, field: str, streaming: bool, limit: int | None) -> Iterator[Document]:
    """Documents of a dataset: a folder of `save_to_disk`, files or a folder of files that `datasets` reads, or a name.

    streaming: nothing is downloaded or converted as a whole. limit: the first so many records. Raises UserError with
    the cause when it cannot be opened or read to its end.
    """
    for number, document in _records(open_dataset(name, split, streaming), name, field):
        if limit is not None and number > limit:
            return
        if document is not None:
            yield document


@dataclass(frozen=True)
class Shard:
    """A part of a dataset that a process can read alone."""

    name: str
    field: str
    dataset: Any

    def documents(self) -> Iterator[tuple[int, Document | None]]:
        """As `_records`; the numbers are those within the shard."""
        return _records(self.dataset, self.name, self.field)


def dataset_shards(name: str, *, workers: int, split: str, field: str, streaming: bool) -> list[Shard]:
    """The shards of a streamed dataset, for `workers` processes; none where it is not streamed or has only one.

    Says so where there are fewer shards than processes.
    """
    found = open_dataset(name, split, streaming)
    number = getattr(found, "num_shards", 1)
    if isinstance(number, int) and number < workers and streaming:
        reading = f"{number} of the {workers} processes (data.num_workers) read" if number > 1 else "one process reads"
        print(
            f"data.path=hf:{name} has {number} shard(s), so {reading} it; more and smaller files would let all",
            flush=True,
        )
    if not streaming or not isinstance(number, int) or number < 2:
        return []
    return [Shard(name, field, found.shard(num_shards=number, index=i)) for i in range(number)]
