"""What a module is at, so that a failure can be looked into: the batch, and how to run it once more."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

_CARRIED = ("_state", "_resumed")  # what a module takes from one training batch to the next
# Keys of batches that say which item each row is.
_IDS = ("clip", "series", "document", "recording", "video", "row", "index", "start", "first")


class Step(NamedTuple):
    """A batch under way. cpu, cuda: random states before it, of training steps only. carried: what came from before."""

    stage: str
    batch: Any
    number: int
    cpu: Tensor | None = None
    cuda: Tensor | None = None
    carried: Mapping[str, Any] = {}


class WatchedModule(L.LightningModule):
    """A LightningModule that knows the batch it is at. That costs a copy of the random state, 5 kB, a training step."""

    at: Step | None = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        carried = {name: vars(self)[name] for name in _CARRIED if name in vars(self)}
        self.at = Step("training", batch, batch_idx, torch.get_rng_state(), cuda, carried)

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.at = Step("validation", batch, batch_idx)

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.at = Step("test", batch, batch_idx)

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.at = Step("prediction", batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.at = None

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.at = None

    def on_test_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.at = None

    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.at = None


@contextlib.contextmanager
def quiet(module: L.LightningModule) -> Iterator[None]:
    """Within the block training steps of the module log nothing, refuse no loss, and nothing of it is compiled."""

    def nothing(*_: Any, **__: Any) -> None: ...

    def same(loss: Tensor, *_: Any) -> Tensor:
        return loss

    own = vars(module)
    replaced = {"log": nothing, "log_dict": nothing, "check_loss": same}
    before = {name: own[name] for name in replaced if name in own}
    own.update(replaced)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for name in replaced:
            del own[name]
        own.update(before)


def run_again(module: Any, step: Step) -> Any:
    """The training step of a batch once more, with the random numbers and the carried state of the first time.

    The random states and the carried state of now come back after it.
    """
    devices = [module.device] if module.device.type == "cuda" else []
    carried = {name: vars(module)[name] for name in step.carried}
    with torch.random.fork_rng(devices=devices), quiet(module):
        if step.cpu is not None:
            torch.set_rng_state(step.cpu)
        if step.cuda is not None:
            torch.cuda.set_rng_state(step.cuda, module.device)
        vars(module).update(step.carried)
        try:
            return module.training_step(step.batch, step.number)
        finally:
            vars(module).update(carried)


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all floating-point tensors in nested containers; states and masks are left out, in which
    infinities have a meaning."""
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _named(str(key), inner, name)
    elif hasattr(value, "_fields"):
        for key in value._fields:
            yield from _named(key, getattr(value, key), name)
    elif isinstance(value, (list, tuple)):
        for place, inner in enumerate(value):
            yield from tensors(inner, f"{name}[{place}]" if name else f"[{place}]")


def _named(key: str, value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if not any(word in key for word in ("state", "mask", "bias")):
        yield from tensors(value, f"{name}.{key}" if name else key)


def shapes(batch: Any) -> str:
    """The shapes of a batch's tensors of more than one axis, or of all where none has: "tokens (16, 512)"."""
    found = [(key, tuple(v.shape)) for key, v in _leaves(batch)]
    wide = [(key, shape) for key, shape in found if len(shape) > 1] or found
    return ", ".join(f"{key} {shape}".strip() for key, shape in wide) or type(batch).__name__


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for place, inner in enumerate(value):
            yield from _leaves(inner, f"{name}[{place}]")


def rows_of(batch: Any) -> int | None:
    """The number of rows: what most of the batch's tensors have as their first axis."""
    sizes = [v.shape[0] for _, v in _leaves(batch) if v.dim()]
    return max(set(sizes), key=sizes.count) if sizes else None


def which(module: L.LightningModule, step: Step, rows: list[int] | None = None, most: int = 4) -> str:
    """What a batch is of, where it says so: 'batch 12 (clip 3 "a.wav", 8 "b.wav", ...)'. rows: only these of it."""
    batch, text = step.batch, f"batch {step.number}"
    if not isinstance(batch, Mapping):
        return text
    rows = list(range(rows_of(batch) or 0)) if rows is None else rows
    parts = []
    for key in _IDS:
        ids = batch.get(key)
        if not isinstance(ids, Tensor) or ids.dim() != 1 or ids.is_floating_point():
            continue
        if len(ids) > max(rows, default=0):
            named = [_item(module, key, int(ids[row])) for row in rows[:most]]
            parts.append(f"{key} {', '.join(named)}{', ...' if len(rows) > most else ''}")
    return f"{text} ({'; '.join(parts)})" if parts else text


def _item(module: L.LightningModule, key: str, number: int) -> str:
    """An item's number and, where the training data know it, its name."""
    trainer = module._trainer
    dataset = getattr(getattr(trainer, "train_dataloader", None), "dataset", None)
    items = getattr(dataset, {"clip": "clips"}.get(key, ""), None)
    if key == "series":
        items = getattr(getattr(dataset, "table", None), "unique_ids", None)
    try:
        found = items[number] if items is not None else None
    except (IndexError, KeyError, TypeError):
        found = None
    name = found if isinstance(found, str) else getattr(found, "name", None)
    return f"{number} {str(name)!r}" if name else str(number)
