"""The forecasting data module: one file (or sample) in, batches for every stage out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from torch.utils.data import DataLoader

from ..errors import UserError, check_whole
from ..loading import EvaluationLoader, IndexSampler, ResumableLoader, loader_options
from .calendar import calendar_fields, same_frequency
from .frequency import parse_frequency
from .ingest import show_time
from .readers import near, open_source
from .samples import SAMPLES, sample_path
from .scaling import SCOPES, StandardScaler
from .separate import separate_columns
from .splits import PROTOCOLS, SHORT_SERIES, predict_ranges, split_ranges
from .tables import GAPS, SeriesTable, load_table
from .windows import WindowDataset

ROLES = ("targets", "past_covariates", "future_covariates", "static_covariates")


class ForecastData(L.LightningDataModule):
    """Windows of a CSV or Parquet file, or of the sample "weather", for fit, validate, test and predict.

    path: file or sample name. targets, *_covariates, time_column, id_column, freq, gaps, cache_dir: see `load_table`.
    any_series: each target is a series of its own (`separate_columns`), and the model forecasts files with other names
    and steps too, scaled by their own history. seq_len, pred_len: rows of past and future in a window. split,
    split_ratio, short_series: see `split_ranges`. scope: scaling statistics per "series" or "global", always of the
    training rows only. batch_size, eval_batch_size: windows. stride: rows between the starts of training windows
    (evaluation takes every window). steps: training batches in an epoch (default: all windows once). seed: of the
    shuffling. num_workers: loader processes.

    `calendar` (True) may be set to False before the loaders are made, for a model that reads no calendar features;
    `ForecastModule` does so. Evaluation loaders take every window exactly once whatever the batch size or number of
    processes. Raises UserError in the constructor for arguments that make no sense, in `setup` for a file that does
    not fit them.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        targets: str | Sequence[str] | None = None,
        past_covariates: Sequence[str] = (),
        future_covariates: Sequence[str] = (),
        static_covariates: Sequence[str] = (),
        time_column: str | None = None,
        id_column: str | None = None,
        freq: str | None = None,
        gaps: str = "error",
        any_series: bool = False,
        seq_len: int = 96,
        pred_len: int = 24,
        split: str = "ratio",
        split_ratio: Sequence[float] = (0.7, 0.1, 0.2),
        short_series: str = "error",
        scope: str = "series",
        stride: int = 1,
        batch_size: int = 32,
        eval_batch_size: int = 256,
        steps: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("seq_len", seq_len, 1),
            ("pred_len", pred_len, 1),
            ("stride", stride, 1),
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("steps", 1 if steps is None else steps, 1),
            ("num_workers", num_workers, 0),
        ):
            check_whole(f"data.{name}", value, least)
        for name, choice, choices in (
            ("gaps", gaps, GAPS),
            ("split", split, PROTOCOLS),
            ("short_series", short_series, SHORT_SERIES),
            ("scope", scope, SCOPES),
        ):
            if choice not in choices:
                raise UserError(f"data.{name}={choice!r} is unknown.{near(choice, choices)}")
        if freq is not None:
            parse_frequency(freq)
        self.path = path
        self.columns: dict[str, Any] = {
            "targets": [targets] if isinstance(targets, str) else None if targets is None else list(targets),
            "past_covariates": list(past_covariates),
            "future_covariates": list(future_covariates),
            "static_covariates": list(static_covariates),
            "time_column": time_column,
            "id_column": id_column,
        }
        covariates = [name for role in ROLES[1:] for name in self.columns[role]]
        if any_series and covariates:
            raise UserError(f"data.any_series=true leaves no covariates, but there is {covariates[0]!r}")
        self.freq, self.gaps, self.any_series, self.cache_dir = freq, gaps, bool(any_series), cache_dir
        self.seq_len, self.pred_len, self.stride = seq_len, pred_len, stride
        self.split, self.split_ratio, self.short_series, self.scope = (
            split,
            list(split_ratio),
            short_series,
            scope,
        )
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.steps, self.num_workers, self.seed = steps, num_workers, seed
        self.calendar = True
        self.ranges: dict[str, np.ndarray] = {}
        self._table: SeriesTable | None = None
        self._scaler: StandardScaler | None = None
        self._schema: dict[str, Any] | None = None  # of the training data, when made by for_prediction

    @classmethod
    def for_prediction(cls, path: str | Path, schema: dict[str, Any], **overrides: Any) -> ForecastData:
        """Data of another file for a trained model: columns, lengths, frequency and scaling come from its
        `schema()`.

        Only `predict_dataloader` works (and `.table`, `.scaler`, `.ranges["predict"]`). overrides: further
        arguments of the constructor, such as time_column, gaps, num_workers, cache_dir. Raises UserError,
        there or in `setup`, when the file lacks a column, has another frequency, too little history, or no
        future rows for known covariates. With `any_series` columns and frequency are the file's, and may be among the
        overrides.
        """
        fixed = {key: schema[key] for key in ("seq_len", "pred_len")}
        if not schema.get("any_series"):
            fixed |= {key: schema[key] for key in ROLES}
        for key, value in overrides.items():
            if key in fixed and (list(value) if isinstance(value, (list, tuple)) else value) != fixed[key]:
                raise UserError(f"data.{key}={value!r} differs from {fixed[key]!r}, with which the model was trained")
        data = cls(path, **{**overrides, **fixed}, any_series=bool(schema.get("any_series")))
        data._schema = schema
        return data

    @property
    def table(self) -> SeriesTable:
        """The series; after `setup`."""
        if self._table is None:
            self.setup()
        if self._table is None:
            raise RuntimeError("setup() did not load a table")
        return self._table

    @property
    def scaler(self) -> StandardScaler:
        """The scaler, in the table's order of series; after `setup`."""
        if self._scaler is None:
            self.setup()
        if self._scaler is None:
            raise RuntimeError("setup() did not fit a scaler")
        return self._scaler

    def prepare_data(self) -> None:
        """Fill the cache once, before several processes read it."""
        self._load()

    def setup(self, stage: str | None = None) -> None:
        """Load the table, cut the ranges, fit (or take over) the scaler; the second call does nothing."""
        if self._scaler is not None:
            return
        table = self._load()
        if self._schema is not None:
            if self.any_series:
                scaler = StandardScaler.fit(table, np.stack([np.zeros_like(table.history), table.history], axis=1))
            else:
                scaler = StandardScaler.from_dict(self._schema["scaler"]).for_table(table)
            self.ranges = {}
        else:
            self.ranges = split_ranges(
                table,
                seq_len=self.seq_len,
                pred_len=self.pred_len,
                protocol=self.split,
                ratio=self.split_ratio,
                short_series=self.short_series,
            )
            scaler = StandardScaler.fit(table, self.ranges["train"], self.scope)
        self._table, self._scaler = table, scaler

    def schema(self) -> dict[str, Any]:
        """What a model needs to know of its data, and a later process to predict: plain containers only."""
        table = self.table
        return {
            "targets": list(table.targets),
            "past_covariates": list(table.past_covariates),
            "future_covariates": list(table.future_covariates),
            "static_covariates": list(table.static_names),
            "time_column": table.time_column,
            "id_column": table.id_column,
            "freq": table.freq,
            "num_time_features": len(calendar_fields(table.freq)),
            "seq_len": self.seq_len,
            "pred_len": self.pred_len,
            "any_series": self.any_series,
            "scaler": self.scaler.to_dict(),
        }

    def dataset(self, stage: str, *, stride: int | None = None) -> WindowDataset:
        """The windows of "train", "val", "test" or "predict" (the last window of each series)."""
        if stage == "predict":
            return self._predict_dataset()
        table, scaler = self.table, self.scaler
        if stage not in self.ranges:
            raise UserError(f"there are no {stage!r} windows: this data is for prediction only")
        return WindowDataset(
            table,
            seq_len=self.seq_len,
            pred_len=self.pred_len,
            ranges=self.ranges[stage],
            scaler=scaler,
            stride=stride or (self.stride if stage == "train" else 1),
            calendar=self.calendar,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        dataset = self.dataset("train")
        sampler = IndexSampler(len(dataset), self.batch_size, shuffle=True, seed=self.seed, steps=self.steps)
        return ResumableLoader(dataset, sampler=sampler, **loader_options(self.num_workers))

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self._evaluation("val")

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self._evaluation("test")

    def predict_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self._evaluation("predict")

    def _evaluation(self, stage: str) -> DataLoader[Any] | list[Any]:
        dataset = self.dataset(stage)
        if not len(dataset):
            return []
        return EvaluationLoader(
            dataset, sampler=IndexSampler(len(dataset), self.eval_batch_size), **loader_options(self.num_workers)
        )

    def _load(self) -> SeriesTable:
        if self._table is not None:
            return self._table
        path = Path(self.path).expanduser()
        if str(self.path) in SAMPLES and not path.exists():
            path = sample_path(str(self.path), self.cache_dir)
        if self._schema is not None and not self.any_series:
            return self._load_for_prediction(path, self._schema)
        table = load_table(path, freq=self.freq, gaps=self.gaps, cache_dir=self.cache_dir, **self.columns)
        return separate_columns(table, self.cache_dir) if self.any_series else table

    def _load_for_prediction(self, path: Path, schema: dict[str, Any]) -> SeriesTable:
        """Load with the trained roles, and make sure that the step is the trained one, not one forced onto
        the file.
        """
        names = open_source(path).names
        columns = dict(self.columns)
        for key in ("time_column", "id_column"):
            if columns[key] is None and schema.get(key) in names:
                columns[key] = schema[key]
        options = {"cache_dir": self.cache_dir, **columns}
        try:
            table = load_table(path, freq=self.freq, gaps=self.gaps, **options)
        except UserError as error:
            if "data.freq" not in str(error):
                raise
            # Too few or too special rows to infer a step from; the trained one may still fit them.
            table = load_table(path, freq=schema["freq"], gaps=self.gaps, **options)
        if not same_frequency(table.freq, schema["freq"]):
            try:
                table = load_table(path, freq=schema["freq"], gaps="error", **options)
            except UserError:
                raise UserError(
                    f"{path} has steps of {table.freq}, the model was trained on steps of "
                    f"{schema['freq']}; resample the file"
                ) from None
        return table

    def _predict_dataset(self) -> WindowDataset:
        table, scaler = self.table, self.scaler
        ranges = predict_ranges(table, seq_len=self.seq_len, short_series=self.short_series)
        _check_last_windows(table, ranges, self.pred_len)
        self.ranges["predict"] = ranges
        return WindowDataset(
            table,
            seq_len=self.seq_len,
            pred_len=self.pred_len,
            ranges=ranges,
            scaler=scaler,
            future=False,
            calendar=self.calendar,
        )


def _check_last_windows(table: SeriesTable, ranges: np.ndarray, pred_len: int) -> None:
    """Raise UserError where a last window has no observed target or lacks covariates over the horizon."""
    num_targets = len(table.targets)
    first_known = num_targets + len(table.past_covariates)
    for index, (begin, end) in enumerate(ranges):
        if begin == end:
            continue
        name, offset = table.unique_ids[index], int(table.offsets[index])
        past = table.values[offset + begin : offset + end, :num_targets]
        empty = np.isnan(past).all(axis=0)
        if empty.any():
            raise UserError(
                f"series {name!r} of {table.source} has no value of "
                f"{table.targets[int(empty.argmax())]!r} in its last "
                f"{end - begin} rows; a forecast needs at least one"
            )
        if not table.future_covariates:
            continue
        rows = int(table.lengths[index]) - int(end)
        if rows < pred_len:
            raise UserError(
                f"series {name!r} of {table.source} has {rows} row(s) after "
                f"{show_time(table.times[offset + end - 1])}, the "
                f"forecast needs {pred_len}: add rows with {', '.join(table.future_covariates)} known and "
                "the target empty"
            )
        ahead = table.values[offset + end : offset + end + pred_len, first_known:]
        if np.isnan(ahead).any():
            row, column = np.argwhere(np.isnan(ahead))[0]
            raise UserError(
                f"series {name!r} of {table.source}: {table.future_covariates[column]!r} is missing at "
                f"{show_time(table.times[offset + end + row])}, inside the horizon of the forecast"
            )
