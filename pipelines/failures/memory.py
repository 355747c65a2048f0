"""Out of memory: how large the batch is, what the memory goes to, and three ways out that fit the run."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .steps import Step, rows_of, run_again, shapes

_SAYS = ("can't allocate memory", "not enough memory", "CUDA out of memory", "std::bad_alloc", "Cannot allocate memory")
# Values that an optimiser keeps for each that it trains.
_KEPT = {"adam": 2, "adamw": 2, "muon": 1, "sgd": 1}


class OutOfMemory(RuntimeError):
    """The message: the shape of the batch, an estimate of the memory, three ways out."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, on a GPU or a CPU, or Python had no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(text in str(error) for text in _SAYS)


@contextlib.contextmanager
def memory_errors(module: nn.Module, batch: Any, cfg: Mapping[str, Any] | None = None) -> Iterator[None]:
    """For one's own loops: running out of memory in the block raises OutOfMemory with an explanation.

    module: what is trained or run. batch: what it is given, for its shapes. cfg: as `explain_memory` has it.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(explain_memory(error, module, Step("own", batch, 0), cfg)) from error


def explain_memory(
    error: BaseException,
    module: nn.Module | None = None,
    step: Step | None = None,
    cfg: Mapping[str, Any] | None = None,
    *,
    optimizers: Any = (),
) -> str:
    """The message for an error of which `is_out_of_memory` is true.

    module: the LightningModule or model at work. step: the batch it was at. cfg: the run's config, of which the ways
    out are taken; without one they are told in general. optimizers: whose state is measured; else it is estimated.
    """
    training = step is None or step.stage in ("training", "own")
    parts = [f"out of memory{_where(error, step)}"]
    if module is not None:
        parts.append(_estimate(module, step, cfg or {}, optimizers, training=training))
    if cfg is None:
        ways = ["a smaller batch", "shorter sequences", "set_grad_checkpointing() or bf16 autocast"]
    else:
        ways = _ways_out(cfg, step, training=training)
    return f"{'. '.join(parts)}. Ways out: {'; '.join(f'({n}) {way}' for n, way in enumerate(ways[:3], 1))}"


def _where(error: BaseException, step: Step | None) -> str:
    asked = re.search(r"[Tt]r(?:ied|ying) to allocate ([\d.]+ ?\w+)", str(error))
    size = f" (asked for {asked[1]} more)" if asked else ""
    if step is None:
        return f"{size} outside of a batch"
    return f"{size} in {'a' if step.stage == 'own' else step.stage} batch of {shapes(step.batch)}"


# The estimate -------------------------------------------------------------------------------------------------------


def _estimate(module: nn.Module, step: Step | None, cfg: Mapping[str, Any], optimizers: Any, *, training: bool) -> str:
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    parts = [f"parameters {_size(weights)}"]
    if training:
        trained = [p for p in module.parameters() if p.requires_grad]
        gradients = sum(p.numel() * p.element_size() for p in trained)
        parts.append(f"gradients {_size(gradients)}")
        kept = _kept(optimizers)
        if kept:
            parts.append(f"optimiser state {_size(kept)}")
        elif cfg:
            name = str((cfg.get("optimizer") or {}).get("name"))
            parts.append(f"optimiser state {_size(_KEPT.get(name, 2) * gradients)} (for {name})")
        parts.append(_activations(module, step))
    free = _memory(module)
    return f"Estimate: {', '.join(parts)}{f'; the device has {free}' if free else ''}"


def _kept(optimizers: Any) -> int:
    states = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    return sum(value.numel() * value.element_size() for value in states if isinstance(value, Tensor))


def _activations(module: nn.Module, step: Step | None) -> str:
    """Of the whole batch, from one row that is run alone: what autograd keeps of it, times the rows."""
    rows = None if step is None else rows_of(step.batch)
    if step is None or step.stage != "training" or not rows or not hasattr(module, "training_step"):
        return "activations not measured"
    alone = getattr(module, "_trainer", None) is None or module._trainer.world_size == 1  # type: ignore[union-attr]
    if not alone:
        return "activations not measured, of several processes"
    try:
        one = saved_bytes(module, step._replace(batch=_first_row(step.batch, rows), cpu=None, cuda=None))
    except Exception as error:
        why = "one row alone does not fit either" if is_out_of_memory(error) else "one row alone cannot be run"
        return f"activations not measured: {why}"
    return f"activations about {_size(one * rows)} ({rows} rows of {_size(one)}, measured on one)"


def saved_bytes(module: Any, step: Step) -> int:
    """What autograd keeps for the backward pass of a training step, parameters left out, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    found: dict[int, int] = {}
    kept: list[Tensor] = []  # while they are, no two have one address

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    trainer = getattr(module, "_trainer", None)
    context = contextlib.nullcontext() if trainer is None else trainer.precision_plugin.forward_context()
    with context, torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run_again(module, step)
        del loss
    return sum(found.values())


def _first_row(value: Any, rows: int) -> Any:
    if isinstance(value, Tensor):
        return value[:1] if value.dim() and len(value) == rows else value
    if isinstance(value, Mapping):
        return {key: _first_row(inner, rows) for key, inner in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_first_row(inner, rows) for inner in value)
    return value


def _memory(module: nn.Module) -> str:
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info(device if device.type == "cuda" else None)
        return f"{_size(total)}, {_size(free)} of it free now"
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = dict(re.findall(r"^(\w+):\s+(\d+) kB", file.read(), re.MULTILINE))
        total, free = 1024 * int(found["MemTotal"]), 1024 * int(found["MemAvailable"])
    except (OSError, KeyError, ValueError):
        return ""
    limit = _limit()
    allowed = f"; this process may have {_size(limit)}" if limit is not None and limit < total else ""
    return f"{_size(total)}, {_size(free)} of it free now{allowed}"


def _limit() -> int | None:
    try:
        import resource

        soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    except (ImportError, OSError):
        return None
    return None if soft == resource.RLIM_INFINITY else soft


def _size(number: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.1f} GB"


# Ways out -----------------------------------------------------------------------------------------------------------


def _ways_out(cfg: Mapping[str, Any], step: Step | None, *, training: bool) -> list[str]:
    """Those that this run has not taken yet, the ones that change least first."""
    data, task, trainer = (cfg.get(key) or {} for key in ("data", "task", "trainer"))
    key = "batch_size" if training else "eval_batch_size"
    ways = []
    rows = data.get(key)
    if isinstance(rows, int) and rows > 1:
        again = f" with trainer.accumulate_grad_batches={2 * (trainer.get('accumulate_grad_batches') or 1)}"
        same = ": the same step in two parts" if training and rows % 2 == 0 else ""
        ways.append(f"data.{key}={rows // 2}{again if training else ''}{same}")
    if training and task.get("grad_checkpointing") is False:
        ways.append("task.grad_checkpointing=true: blocks are computed again in the backward pass")
    if str(trainer.get("precision", "32-true")) in ("32", "32-true", "None"):
        ways.append("trainer.precision=bf16-mixed: activations of half the size")
    length = next((k for k in ("seq_len", "max_len", "window", "frames", "seconds") if _number(data.get(k))), None)
    if length is not None:
        ways.append(f"a shorter data.{length}, {data[length] // 2 or data[length] / 2} say")
        if training and task.get("name") == "text" and trainer.get("strategy") != "context_parallel":
            ways.append("several devices that share each row: trainer=context_parallel data.whole_rows=true")
    mixer = (cfg.get("model") or {}).get("mixer")
    if isinstance(mixer, Mapping) and mixer.get("name") == "softmax":
        ways.append("another mixer, whose memory grows with the length at most: mixer=mamba2 or mixer=gla")
    if len(ways) < 3:
        ways.append("a smaller model: model.dim, model.depth")
    if len(ways) < 3:
        ways.append("a device with more memory, or several with trainer=fsdp")
    if len(ways) < 3:
        ways.append("fewer data.num_workers")
    return ways


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 1
