"""What is searched: a video, a folder of videos, or a table of them with their own queries."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...labelled_tables import TABLES, table_rows
from ..cache import FeatureCache
from ..reader import VideoReader, open_video
from ..scoring.scorer import check_queries
from ..sources import KIND, videos_in


class SearchData:
    """path: a video, a folder of videos, or a CSV, TSV or JSON-lines table with a column of paths and, where no query
    is given, one of texts. backend, timeout: of `open_video`. cache_dir, cache_gb: of the `FeatureCache`, 0: none."""

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        backend: str = "auto",
        timeout: float = 60.0,
        cache_dir: str | Path | None = None,
        cache_gb: float = 4.0,
    ) -> None:
        if path is None:
            raise UserError("data.path is missing: a video, a folder of videos, or a table of them")
        if isinstance(cache_gb, bool) or not isinstance(cache_gb, (int, float)) or cache_gb < 0:
            raise UserError(f"data.cache_gb={cache_gb!r} must be a number of at least 0")
        self.path, self.backend, self.timeout = Path(path).expanduser(), backend, timeout
        self.cache = FeatureCache(cache_dir, int(cache_gb * 2**30)) if cache_gb else None

    def open(self, file: Path, *, size: tuple[int, int] | None = None, short_side: int | None = None) -> VideoReader:
        return open_video(file, backend=self.backend, size=size, short_side=short_side, timeout=self.timeout)

    def jobs(self, query: Any) -> dict[Path, list[str]]:
        """Of each video what is looked for in it: `query`, one or a list, else the texts of the table's rows.

        Raises UserError where there is nothing to look for, and for a table without paths.
        """
        if self.path.suffix.lower() not in TABLES:
            return dict.fromkeys(videos_in(self.path), check_queries(query))
        asked = None if query is None else check_queries(query)
        found: dict[Path, list[str]] = {}
        for line, row in _rows(self.path):
            where = f"{self.path}, line {line}"
            name = _cell(row, "path")
            if not name:
                raise UserError(f"{where} has no path of a video; columns: {', '.join(KIND.columns['path'])}")
            text = _cell(row, "label")
            if asked is None and not text:
                raise UserError(f"{where} has no text to look for, and there is no query='a taxi cab'")
            texts = found.setdefault(self.path.parent / Path(name).expanduser(), [])
            texts += [own for own in asked or [text] if own not in texts]
        if not found:
            raise UserError(f"{self.path} has no rows")
        return found


def _rows(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    return table_rows(path)


def _cell(row: Mapping[str, Any], key: str) -> str:
    """The first of the usual columns of a key that has something."""
    names = {str(name).strip().lower(): value for name, value in row.items()}
    values = (names.get(name) for name in KIND.columns[key])
    return next((str(value).strip() for value in values if value is not None and str(value).strip()), "")
