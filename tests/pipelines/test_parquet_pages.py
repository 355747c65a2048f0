"""Sizes of Parquet pages, told before they are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.forecasting import parquet_pages
from seqzoo.pipelines.forecasting.readers import open_source

FOUND = Path(__file__).parents[1] / "data" / "fuzz" / "parquet-0f908429.parquet"


def test_a_page_of_two_gigabytes_in_three_kilobytes_is_refused() -> None:
    with pytest.raises(UserError, match=r"is damaged: a page of the column .* claims 2,147,483,608 bytes"):
        open_source(FOUND)


@pytest.mark.parametrize("compression", ["NONE", "SNAPPY", "GZIP", "ZSTD", "BROTLI"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_every_page_is_walked_over(
    compression: str, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sizes that are read of all pages of a column sum up to what its footer says."""
    table = pa.table({"a": np.arange(5000.0), "b": [str(i % 7) for i in range(5000)], "c": [None] * 5000})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, compression=compression, data_page_version=version, data_page_size=2000)
    seen: list[tuple[int, int, int]] = []
    real = parquet_pages._sizes
    monkeypatch.setattr(parquet_pages, "_sizes", lambda head: seen.append(real(head)) or seen[-1])
    metadata = pq.read_metadata(path)
    assert parquet_pages.oversized(path, metadata) is None
    chunks = [metadata.row_group(0).column(i) for i in range(3)]
    assert len(seen) > 10
    assert sum(whole + head for whole, _, head in seen) == sum(c.total_uncompressed_size for c in chunks)
    assert sum(stored + head for _, stored, head in seen) == sum(c.total_compressed_size for c in chunks)
    monkeypatch.setattr(parquet_pages, "_ALLOWED", 0)
    assert parquet_pages.oversized(path, metadata) is None
