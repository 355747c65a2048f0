"""Which implementation of an operation runs: each kernel folder registers its backends and what they can do.

A backend asked for by name that cannot do the work is refused; nothing is dropped or replaced silently.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .triton_support import interpreted

_LOG = logging.getLogger("seqzoo")

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """One implementation of an operation.

    run: the function. note: one line on why `auto` takes it. dtypes, devices: what it accepts (None: any
    device). features: the optional things it honours, e.g. "state", "mask", "varlen". limits: the largest sizes it
    takes, by name, e.g. {"key": 256}. interpretable: a Triton backend that takes CPU tensors too, where it is asked
    for by name and Triton interprets. probe: returns why it cannot run here (a missing package, no GPU), or None.
    portable: made of torch's own operations, for a length that need not be known.
    """

    name: str
    run: Callable[..., Any]
    note: str
    dtypes: tuple[torch.dtype, ...]
    devices: tuple[str, ...] | None
    features: frozenset[str]
    limits: Mapping[str, int]
    interpretable: bool
    probe: Callable[[], str | None] | None
    portable: bool

    def refusal(
        self,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        needs: Iterable[str],
        sizes: Mapping[str, int],
        forced: bool,
    ) -> str | None:
        """Why this backend cannot do the work, or None when it can."""
        if dtype is not None and dtype not in self.dtypes:
            return f"does not take {dtype}"
        if device is not None and self.devices is not None:
            kind = device.type if isinstance(device, torch.device) else device.split(":")[0]
            steps_in = forced and self.interpretable and kind == "cpu" and interpreted()
            if kind not in self.devices and not steps_in:
                return f"does not run on {kind}"
        missing = [need for need in needs if need not in self.features]
        if missing:
            return f"does not support {', '.join(missing)}"
        for size, limit in self.limits.items():
            if sizes.get(size, 0) > limit:
                return f"takes {size} sizes up to {limit}, not {sizes[size]}"
        return self.probe() if self.probe is not None else None


_BACKENDS: dict[str, dict[str, Backend]] = {}
_LOGGED: set[tuple[str, str]] = set()


def register_backend(
    op: str,
    name: str,
    run: Callable[..., Any],
    *,
    note: str,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    devices: tuple[str, ...] | None = None,
    features: Iterable[str] = (),
    limits: Mapping[str, int] | None = None,
    interpretable: bool = False,
    probe: Callable[[], str | None] | None = None,
    portable: bool = False,
) -> None:
    """Add a backend to an operation; `auto` tries them in the order of registration: fastest first. Where a model is
    exported it takes the first portable one that can.

    Raises ValueError when another function already has that name.
    """
    known = _BACKENDS.setdefault(op, {})
    if name == "auto" or (name in known and known[name].run.__qualname__ != run.__qualname__):
        raise ValueError(f"{op}: the backend name {name!r} is already taken")
    known[name] = Backend(
        name, run, note, tuple(dtypes), devices, frozenset(features), dict(limits or {}), interpretable, probe, portable
    )


def choose_backend(
    op: str,
    requested: str = "auto",
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    sizes: Mapping[str, int] | None = None,
    **needs: bool,
) -> Backend:
    """The backend of `op` that will do the work.

    requested: a backend's name, or "auto" for the first registered that can; the choice is logged once on
    "seqzoo".
    dtype, device: of the tensors. sizes: what a backend may limit, e.g. {"key": 64}. needs: features that this call
    uses, e.g. `state=True, varlen=False`.
    Raises ValueError for an unknown backend, for a forced one that cannot run (saying why, and which can),
    and when none can.
    """
    known = _BACKENDS.get(op, {})
    if requested != "auto" and requested not in known:
        raise ValueError(f"{op}: backend={requested!r} is unknown; choose from auto, {', '.join(known)}")
    wanted = [need for need, used in needs.items() if used]
    refused: dict[str, str] = {}
    able: list[str] = []
    spare: Backend | None = None  # for an export without a portable one
    for name, backend in known.items():
        reason = backend.refusal(dtype, device, wanted, sizes or {}, requested == name)
        if reason is not None:
            refused[name] = reason
            continue
        able.append(name)
        if requested == "auto":
            if torch.compiler.is_exporting() and not backend.portable:
                spare = spare or backend
                continue
            # A compiler traces this function: it keeps the choice and would stop at the logging.
            if not torch.compiler.is_compiling():
                _log_once(op, backend, refused)
            return backend
        if requested == name:
            return backend
    if spare is not None:
        return spare
    if requested == "auto":
        reasons = "; ".join(f"{name} {reason}" for name, reason in refused.items())
        raise ValueError(f"{op}: no backend can run: {reasons or 'none is registered'}")
    able_text = f"backends that can: {', '.join(able)}" if able else "no other backend can"
    raise ValueError(f"{op}: backend={requested!r} {refused[requested]}; {able_text}")


def _log_once(op: str, backend: Backend, refused: dict[str, str]) -> None:
    if (op, backend.name) in _LOGGED:
        return
    _LOGGED.add((op, backend.name))
    passed = "".join(f"; {name} {reason}" for name, reason in refused.items())
    _LOG.info("%s: backend %s (%s%s)", op, backend.name, backend.note, passed)


def backends() -> dict[str, dict[str, str]]:
    """Every operation with its backends: "ok", or why that one cannot run on this machine."""
    package = importlib.import_module(__package__ or "seqzoo.kernels")
    for module in pkgutil.iter_modules(package.__path__):
        if module.ispkg:
            importlib.import_module(f".{module.name}", package.__name__)
    return {
        op: {name: (backend.probe() if backend.probe else None) or "ok" for name, backend in known.items()}
        for op, known in sorted(_BACKENDS.items())
    }
