"""What a checkpoint needs beyond Lightning's own, so that a resumed run equals one that never stopped, bit for bit.

Lightning keeps weights, optimizers, schedules, callbacks and counters. It does not keep random states, what the epoch
under way has summed for its metrics, and which rows of the log belong to the state.

The clean moment to save is between two batches, when the loader is asked for the next one: the step is done, its row
logged, its validation over. Lightning knows no hook there, and a state saved elsewhere loses rows (at the end of a
batch or an epoch) or a validation (at the last batch); `between_batches` and `before_validation` turn its counters
into those from which its restart does the right thing.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from .history import MetricsLog

# of a value that was logged in the epoch under way
_FIELDS = (
    *("fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph"),
    *("add_dataloader_idx", "dataloader_idx", "metric_attribute"),
)

RUN_STATE = ("generators", "epoch_sums", "metrics", "validated")  # what `load_run_state` reads of a checkpoint


def random_state() -> dict[str, Any]:
    """The states of torch's, numpy's and Python's global generators, as plain values and tensors."""
    name, keys, place, has_gauss, gauss = np.random.get_state()
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            int(place),
            int(has_gauss),
            float(gauss),
        ],
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Go on with the numbers after `random_state()`; those of a GPU only where there are as many as there were."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    if "numpy" in state:  # not in checkpoints before version 0.2
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))


def save_run_state(trainer: Any, checkpoint: dict[str, Any]) -> None:
    """Add random states, the epoch's sums, the last metrics and the length of the log to a checkpoint."""
    checkpoint.setdefault("generators", random_state())  # within a validation they are those before it
    checkpoint["epoch_sums"] = _epoch_sums(trainer)
    checkpoint["metrics"] = {name: float(value) for name, value in trainer.callback_metrics.items()}
    logs = [logger for logger in trainer.loggers if isinstance(logger, MetricsLog)]
    checkpoint["log_rows"] = logs[0].sync() if logs else 0
    checkpoint.setdefault("log_step", trainer.fit_loop.epoch_loop._batches_that_stepped)


def load_run_state(trainer: Any, checkpoint: dict[str, Any]) -> None:
    """Take up random states, the epoch's sums and the last metrics, when the training is about to begin."""
    if "generators" in checkpoint:
        set_random_state(checkpoint["generators"])
    _set_epoch_sums(trainer, checkpoint.get("epoch_sums") or [])
    if checkpoint.get("validated"):  # the batches of earlier validations in this epoch
        trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.load_state_dict(checkpoint["validated"])
    before = {name: torch.tensor(value, dtype=torch.float64) for name, value in checkpoint.get("metrics", {}).items()}
    trainer._logger_connector._callback_metrics.update(before)


def _epoch_sums(trainer: Any) -> list[dict[str, Any]]:
    """What the epoch's means are made of so far. Of several processes, that of the first."""
    sums = []
    for metric in trainer.fit_loop.epoch_loop._results.values():
        if metric.is_tensor and not metric.has_reset and metric.meta.on_epoch and metric.meta.sync.group is None:
            sums.append(
                {
                    **{field: getattr(metric.meta, field) for field in _FIELDS},
                    "reduce": metric.meta.reduce_fx.__name__,
                    "should_sync": metric.meta.sync.should,
                    "rank_zero_only": metric.meta.sync.rank_zero_only,
                    "value": metric.value.detach().cpu().clone(),
                    "size": int(getattr(metric, "cumulated_batch_size", 0)),
                }
            )
    return sums


def _set_epoch_sums(trainer: Any, sums: list[dict[str, Any]]) -> None:
    from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync

    results = trainer.fit_loop.epoch_loop._results
    for saved in sums:
        meta = _Metadata(**{field: saved[field] for field in _FIELDS}, reduce_fx=getattr(torch, saved["reduce"]))
        meta.sync = _Sync(
            fn=trainer.strategy.reduce, _should=saved["should_sync"], rank_zero_only=saved["rank_zero_only"]
        )
        metric = _ResultMetric(meta, True)
        metric.value = saved["value"]
        if meta.is_mean_reduction:
            metric.cumulated_batch_size = torch.tensor(saved["size"])
        metric._update_count = 1  # a mean over nothing is warned of
        results[f"{saved['fx']}.{saved['name']}"] = metric.to(trainer.strategy.root_device)
    if sums:
        # the first batch of an epoch starts the sums anew; the next one is none
        trainer._logger_connector._first_loop_iter = True


def validation_follows(trainer: Any) -> bool:
    """Whether Lightning, asked now, validates after the batch that was trained last."""
    loop = trainer.fit_loop
    if getattr(trainer, "_val_check_time_interval", None) is not None:
        return False  # by the clock, which begins anew
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def between_batches(trainer: Any, loops: dict[str, Any]) -> None:
    """Fit the counters in a checkpoint that is saved when the next batch is asked for.

    A restart takes them for those of the end of a validation where one was due, and counts that batch once more.
    """
    if validation_follows(trainer) and not trainer.fit_loop.epoch_loop._should_accumulate():
        loops["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1


def before_validation(checkpoint: dict[str, Any]) -> None:
    """Fit the counters in a checkpoint that is saved within a validation: the restart runs all of it."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    checkpoint["validated"] = {key: number - progress["current"][key] for key, number in progress["total"].items()}
    place = {"ready": 1, "completed": 0, "started": 1, "processed": 0}  # by which the restart knows
    progress.update(total=dict(place), current=dict(place), is_last_batch=False)


def after_training(loops: dict[str, Any], batches: float) -> None:
    """Fit the counters in a checkpoint of a finished training: one with more steps begins a new epoch, or goes on in an
    epoch of so many `batches` that was not trained to its end."""
    progress = loops["fit_loop"]["epoch_loop.batch_progress"]
    if 0 < progress["current"]["completed"] < batches:
        for count in loops["fit_loop"]["epoch_progress"].values():
            for key in ("processed", "completed"):
                count[key] -= 1
        return
    progress["current"] = dict.fromkeys(progress["current"], 0)
    progress["is_last_batch"] = False
