"""Where a loss that is not finite comes from: the first module, in the order of the forward pass, and the batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...blocks.layers.ranks import num_ranks
from .steps import Step, rows_of, run_again, tensors, which

_ADVICE = "lower optimizer.lr or set trainer.gradient_clip_val, or train in 32-true precision"


class NonFiniteError(RuntimeError):
    """A loss is not finite. The message: which batch, which module first, whether input, parameter or overflow."""


class _Found(Exception):
    """Ends the second run at the first value that is not finite. place: in it, 0 at its beginning; infinite where it
    found nothing."""

    def __init__(self, text: str, advice: str = _ADVICE, place: float = math.inf) -> None:
        super().__init__(text)
        self.advice, self.place = advice, place


class _Told(NamedTuple):
    """What a process says of itself to the others."""

    place: float
    rank: int
    loss: float
    batch: str
    cause: str


def is_finite(loss: Tensor) -> bool:
    """Whether the loss of this process, and of every other, is finite: all of them stop, or none. Of several processes
    that is a message of one number."""
    finite = torch.isfinite(loss.detach())
    if num_ranks() > 1:
        finite = finite.to(torch.int32)  # NCCL knows no bool
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    return bool(finite)


def explain_loss(module: Any, loss: Tensor, batch_index: int) -> NonFiniteError:
    """What to raise for a loss that is not finite, here or in another process: each of them must call this.

    The batch is run once more with the same random numbers and a look at what goes into and out of each module. Several
    processes run all of theirs to the end, so that none waits for another; then all say the same, of the one where
    values are not finite first.
    """
    step: Step | None = getattr(module, "at", None)
    found = _cause(module, step)
    value, place = float(loss.detach()), f"batch {batch_index}" if step is None else which(module, step)
    cause = f"{found}; {found.advice}"
    if num_ranks() == 1:
        return NonFiniteError(f"the loss is {value} at step {module.global_step} ({place}): {cause}")
    every: list[Any] = [None] * num_ranks()
    dist.all_gather_object(every, _Told(found.place, dist.get_rank(), value, place, cause))
    first = min(every, key=lambda told: (told.place, math.isfinite(told.loss), told.rank))
    alike = [t for t in every if (t.place, t.cause) == (first.place, first.cause)]
    ranks = [str(t.rank) for t in alike if math.isfinite(t.loss) == math.isfinite(first.loss)]
    where = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)} of {len(every)}, {first.batch}"
    return NonFiniteError(f"the loss is {first.loss} at step {module.global_step} ({where}): {first.cause}")


def _cause(module: Any, step: Step | None) -> _Found:
    if step is None or step.stage != "training":
        return _standing(module, step)
    watch = _Watch(module, step)
    try:
        with torch.no_grad():
            again = run_again(module, step)
    except _Found as found:
        return found
    except Exception as error:  # of the second run only: the first one ended
        return _Found(f"{_standing(module, step)} (a second run of the batch ended with {type(error).__name__})")
    finally:
        watch.remove()
    if watch.found is not None:
        return watch.found
    if watch.suspect is not None:
        return watch.suspect
    bad = _bad_batch(module, step)
    if bad is None:
        if isinstance(again, Tensor) and not _bad(again):
            return _Found("a second run of the batch gave a finite loss: it changes from run to run")
        bad = _Found("all modules give finite values; the loss that is computed from them is not")
    bad.place = watch.place
    return bad


def _standing(module: Any, step: Step | None) -> _Found:
    """What can be said without running anything."""
    if step is not None:
        bad = _bad_batch(module, step)
        if bad is not None:
            return bad
    parameters = list(_bad_parameters(module.net))
    if parameters:
        return _Found(f"the first parameter that is not finite is {parameters[0]}{_gradients(module)}")
    return _Found("all parameters are finite")


# Values -------------------------------------------------------------------------------------------------------------


def _own(value: Tensor) -> Tensor:
    """Of a weight that is shared out the part of this process: to look at the others' it would wait for them."""
    value = value.detach()
    return value.to_local() if hasattr(value, "to_local") else value


def _bad(value: Tensor) -> bool:
    return not bool(torch.isfinite(_own(value)).all())


def _only_masked(value: Tensor) -> bool:
    """Whether all that is not finite is -inf: scores that are left out are written so."""
    value = _own(value)
    if value.is_complex():
        return False
    return not bool(torch.isnan(value).any() or (value == torch.inf).any())


def _count(value: Tensor) -> str:
    value = _own(value)
    return f"{int((~torch.isfinite(value)).sum()):,} of {value.numel():,} values"


def _bad_parameters(part: nn.Module, *, recurse: bool = True) -> Iterator[str]:
    for name, value in part.named_parameters(recurse=recurse):
        if _bad(value):
            yield name


def _bad_batch(module: Any, step: Step) -> _Found | None:
    for key, value in tensors(step.batch):
        if _bad(value):
            return _in_batch(module, step, key, value)
    return None


def _in_batch(module: Any, step: Step, key: str, value: Tensor) -> _Found:
    rows = None
    if value.dim() > 1 and len(value) == rows_of(step.batch):
        rows = (~torch.isfinite(value.detach())).flatten(1).any(1).nonzero().flatten().tolist()
    where = "" if rows is None else f" in row(s) {', '.join(map(str, rows[:4]))}, {which(module, step, rows)}"
    return _Found(f"the input: {key} of the batch has {_count(value)} that are not finite{where}", "mend the data")


def _gradients(module: Any) -> str:
    """What the gradients say that still stand from the step before."""
    named = [(name, p.grad) for name, p in module.net.named_parameters() if p.grad is not None]
    bad = [name for name, gradient in named if _bad(gradient)]
    if not bad:
        return ""
    # the backward pass goes from the end of the model to its beginning
    return (
        f"; the gradients of {len(bad)} of {len(named)} parameters were not finite in the step before, "
        f"first, from the end of the model, that of {bad[-1]}"
    )


# The second run -----------------------------------------------------------------------------------------------------


class _Watch:
    """Hooks that raise _Found, or keep it where other processes wait for the rest of the run: the first one is `found`.
    suspect: the first value with nothing but -inf, which may be meant."""

    def __init__(self, module: Any, step: Step) -> None:
        self.module, self.step, self.alone = module, step, num_ranks() == 1
        self.found: _Found | None = None
        self.suspect: _Found | None = None
        self.place = 0
        self._inside: list[nn.Module] = []
        self._last = ""
        self._names = {part: name for name, part in module.net.named_modules()}
        self._handles: list[Any] = []
        for part in self._names:
            self._handles.append(part.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._handles.append(part.register_forward_hook(self._leave, with_kwargs=True))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _name(self, part: nn.Module) -> str:
        name = self._names[part]
        return f"{name} ({type(part).__name__})" if name else f"the model ({type(part).__name__})"

    def _enter(self, part: nn.Module, args: Any, kwargs: Any) -> None:
        self.place += 1
        for _, value in tensors([args, kwargs]):
            if self.found is None and _bad(value):
                self._judge(self._before(part, value), value)
        self._inside.append(part)

    def _leave(self, part: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._inside.pop()
        self.place += 1
        for key, value in tensors(output):
            if self.found is None and _bad(value):
                self._judge(self._of(part, key, value, [args, kwargs]), value)
        self._last = self._name(part)

    def _judge(self, found: _Found, value: Tensor) -> None:
        found.place = self.place
        if _only_masked(value):
            self.suspect = self.suspect or found
        elif self.alone:
            raise found
        else:
            self.found = found

    def _before(self, part: nn.Module, value: Tensor) -> _Found:
        """A module is given what no module before it returned."""
        outer = self._inside[-1] if self._inside else None
        whole = self.module.net if outer is None else outer
        own = list(_bad_parameters(whole, recurse=False))
        if own:
            return self._parameter(whole, own[0])
        bad = _bad_batch(self.module, self.step) if len(self._inside) < 2 else None
        if bad is not None:
            return bad
        since = f" after {self._last}" if self._last else ""
        return _Found(
            f"the first value that is not finite is what {self._name(part)} is given: {_count(value)}, computed in "
            f"{self._name(whole)}{since}"
        )

    def _of(self, part: nn.Module, key: str, value: Tensor, given: Any) -> _Found:
        names = list(_bad_parameters(part))
        if names:
            return self._parameter(part, names[0])
        buffers = [name for name, buffer in part.named_buffers() if buffer.is_floating_point() and _bad(buffer)]
        # a causal mask may be a buffer of -inf
        what = f"; its buffer {buffers[0]} is not finite" if buffers else ""
        largest = max((float(v.detach().abs().max()) for _, v in tensors(given) if v.numel()), default=0.0)
        output = f"output {key}" if key else "output"
        kind = str(value.dtype).removeprefix("torch.")
        return _Found(
            f"the first module whose {output} is not finite is {self._name(part)}: {_count(value)}, in {kind}, from "
            f"finite parameters and inputs of at most {largest:.3g}{what}"
        )

    def _parameter(self, part: nn.Module, name: str) -> _Found:
        parameter = part.get_parameter(name)
        said = _gradients(self.module)
        advice = _ADVICE if said else "the weights were so before this step: start from others"
        return _Found(
            f"the first module whose output is not finite is {self._name(part)}: its parameter {name} has "
            f"{_count(parameter)} that are not{said}",
            advice,
        )
