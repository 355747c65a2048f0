"""Series as rows: the last window of each, or all of them, one row for what the mixers see apart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ...zoo.patch import PatchForecaster
from ..audio.sources import KIND as SOUND
from ..errors import UserError
from ..forecasting.data import ForecastData
from ..forecasting.windows import WindowDataset
from ..video.sources import KIND as VIDEO
from .reading import Rows, check_window, data_options, groups
from .trained import Trained

# What may be said of a file of one's own; the rest is the model's.
_KEYS = ("time_column", "id_column", "gaps", "cache_dir")
_ANY = ("targets", "freq")


class SeriesReader:
    """Windows of a CSV or Parquet file for a forecaster, scaled as in training.

    A model that reads channels apart has a row for each. stride: steps between windows, of which the last one ends with
    the series; None: that one alone. Start and end are the times of the first and of the last step that are read; the
    time of a token is that of its first step. Raises UserError as `ForecastData.for_prediction`.
    """

    def __init__(self, trained: Trained, cfg: dict[str, Any]) -> None:
        net: Any = trained.net
        given = data_options(cfg, trained, ForecastData)
        window, stride = check_window(cfg["task"], whole=True, what="steps")
        schema = trained.schema
        if "seq_len" not in schema or "scaler" not in schema:
            raise UserError(f"{trained.source} was saved without the columns and the scaling of its series")
        if window not in (None, schema["seq_len"]):
            raise UserError(f"task.window={window}: {trained.model} reads {schema['seq_len']} steps, leave it null")
        path = Path(str(given["path"]))
        if path.suffix.lower() in {*SOUND.suffixes, *VIDEO.suffixes}:
            raise UserError(f"{path} is no table of series, and {trained.model} reads series")
        keys = (*_KEYS, *_ANY) if schema.get("any_series") else _KEYS
        data = ForecastData.for_prediction(given["path"], schema, **{k: given[k] for k in keys if k in given})
        data.calendar = bool(net.reads_calendar)
        self.data = data
        self.dataset: WindowDataset = data.dataset("predict")
        if stride is not None:
            last = self.dataset.ranges
            first = (last[:, 1] - schema["seq_len"]) % stride
            ranges = np.stack((np.where(last[:, 1] > last[:, 0], first, last[:, 0]), last[:, 1]), axis=1)
            self.dataset = WindowDataset(
                data.table,
                seq_len=schema["seq_len"],
                pred_len=schema["pred_len"],
                ranges=ranges,
                scaler=data.scaler,
                stride=stride,
                future=False,
                calendar=data.calendar,
            )
        self.step = int(net.feature_info.reduction()[cfg["task"]["layer"]])
        apart = isinstance(net, PatchForecaster) and not net.channel_mixing
        self.channels: list[str | None] = list(data.table.targets) if apart else [None]
        time = pa.timestamp("ns")
        self.columns = {"name": pa.string(), "channel": pa.string(), "start": time, "end": time}
        self.time, self.unit = time, "times"
        self.failed: list[str] = []

    def batches(self, size: int) -> Iterator[Rows]:
        for group in groups(range(len(self.dataset)), max(size // len(self.channels), 1)):
            yield self._batch(self.dataset[np.array(group)])

    def _batch(self, batch: dict[str, torch.Tensor]) -> Rows:
        table, past = self.data.table, self.data.seq_len
        series, origin = batch["series"].numpy(), batch["origin"].numpy()
        first = table.offsets[series] + origin - past
        times = np.stack([np.asarray(table.times[i : i + past]) for i in first])
        ids = [
            {"name": table.unique_ids[number], "channel": channel, "start": int(when[0]), "end": int(when[-1])}
            for number, when in zip(series, times, strict=True)
            for channel in self.channels
        ]

        def of_tokens(length: int) -> list[np.ndarray]:
            places = np.minimum(np.arange(length) * self.step, past - 1)
            return [when[places] for when in times for _ in self.channels]

        return Rows(ids, (batch,), {}, of_tokens)
