"""Where a loss that is not finite comes from: the first module, in the order of the forward pass, and the batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .steps import Step, rows_of, run_again, tensors, which

_ADVICE = "lower optimizer.lr or set trainer.gradient_clip_val, or train in 32-true precision"


class NonFiniteError(RuntimeError):
    """A loss is not finite. The message: which batch, which module first, whether input, parameter or overflow."""


class _Found(Exception):
    """Ends the second run at the first value that is not finite."""

    def __init__(self, text: str, advice: str = _ADVICE) -> None:
        super().__init__(text)
        self.advice = advice


def explain_loss(module: Any, loss: Tensor, batch_index: int) -> NonFiniteError:
    """What to raise for a loss that is not finite.

    The batch is run once more with the same random numbers and a look at what goes into and out of each module. A
    module of several processes is not: they would wait for each other; its parameters, gradients and batch are told.
    """
    step: Step | None = getattr(module, "at", None)
    place = f"batch {batch_index}" if step is None else which(module, step)
    cause = _cause(module, step)
    head = f"the loss is {float(loss.detach())} at step {module.global_step} ({place})"
    return NonFiniteError(f"{head}: {cause}; {cause.advice}")


def _cause(module: Any, step: Step | None) -> _Found:
    trainer = module._trainer
    alone = trainer is None or trainer.world_size == 1
    if step is None or step.stage != "training" or not alone:
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
    if watch.suspect is not None:
        return watch.suspect
    bad = _bad_batch(module, step)
    if bad is not None:
        return bad
    if isinstance(again, Tensor) and not _bad(again):
        return _Found("a second run of the batch gave a finite loss: it changes from run to run")
    return _Found("all modules give finite values; the loss that is computed from them is not")


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


def _bad(value: Tensor) -> bool:
    return not bool(torch.isfinite(value.detach()).all())


def _only_masked(value: Tensor) -> bool:
    """Whether all that is not finite is -inf: scores that are left out are written so."""
    value = value.detach()
    if value.is_complex():
        return False
    return not bool(torch.isnan(value).any() or (value == torch.inf).any())


def _count(value: Tensor) -> str:
    return f"{int((~torch.isfinite(value.detach())).sum()):,} of {value.numel():,} values"


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
    """Hooks that raise _Found. suspect: the first value with nothing but -inf, which may be meant."""

    def __init__(self, module: Any, step: Step) -> None:
        self.module, self.step = module, step
        self.suspect: _Found | None = None
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
        for _, value in tensors([args, kwargs]):
            if _bad(value):
                self._judge(self._before(part, value), value)
        self._inside.append(part)

    def _leave(self, part: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._inside.pop()
        for key, value in tensors(output):
            if _bad(value):
                self._judge(self._of(part, key, value, [args, kwargs]), value)
        self._last = self._name(part)

    def _judge(self, found: _Found, value: Tensor) -> None:
        if not _only_masked(value):
            raise found
        self.suspect = self.suspect or found

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
