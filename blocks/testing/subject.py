"""What a conformance check is given: a mixer, tiny inputs for it, and comparisons that say what failed."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..protocol import PATTERNS, Mixer, MixerOutput, State, pattern_name
from ..registry import create_mixer, mixer_info

Factory = str | type[Mixer] | Callable[..., Mixer]

# Largest error, relative to the largest magnitude expected. EQUAL64 is for two orders of the same sums in
# fp64: those of a gradient cancel, so it is looser than the 1e-12 of one formula against another.
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}
EQUAL64 = 1e-10


class CheckError(AssertionError):
    """A mixer broke the contract; the message says what was expected and what came."""


@dataclass(frozen=True)
class Subject:
    """A mixer under test: how to build it, and inputs that fit it.

    label: as in messages, `Name[variant]`. first: the first of its class in its pattern, for checks that are
    slow or about the class. declared: it comes from the class's own variants, which ought to cover its
    options.
    """

    label: str
    factory: Factory
    dim: int
    options: Mapping[str, Any] = field(default_factory=dict)
    first: bool = True
    declared: bool = False

    @cached_property
    def cls(self) -> type[Mixer]:
        if isinstance(self.factory, str):
            return mixer_info(self.factory).cls
        if isinstance(self.factory, type) and issubclass(self.factory, Mixer):
            return self.factory
        return type(self.build())

    @cached_property
    def pattern(self) -> str:
        """Read off the options where it can be, so that a variant that cannot be built still has one."""
        if isinstance(self.factory, str) or inspect.isclass(self.factory):
            known = inspect.signature(self.cls.__init__).parameters
            flags = [self.options.get(k, known[k].default) for k in ("causal", "cross") if k in known]
            if len(flags) == 2 and inspect.Parameter.empty not in flags:
                return pattern_name(*flags)
        return self.build().pattern

    def build(self, **more: Any) -> Mixer:
        return create_mixer(self.factory, self.dim, **{**self.options, **more})

    def mixer(self, dtype: torch.dtype = torch.float64, *, seed: int = 0) -> Mixer:
        """A mixer in eval mode, its parameters moved off their initial values.

        A bias that starts at 0 or a gate that starts closed would hide what passes through it.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            mixer = self.build()
            with torch.no_grad():
                for parameter in mixer.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return mixer.to(dtype).eval()

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
        """Standard normal numbers (*shape, D) that depend on the seed only."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, self.dim, generator=generator, dtype=torch.float64).to(dtype)

    def context(
        self, batch: int, length: int = 6, *, dtype: torch.dtype = torch.float64, seed: int = 1
    ) -> Tensor | None:
        """(B, S, D) for the cross patterns, None for the others."""
        return self.tensor(batch, length, dtype=dtype, seed=seed + 1000) if "cross" in self.pattern else None


def fail(message: str) -> None:
    raise CheckError(message)


def expect(condition: bool, message: str) -> None:
    if not condition:
        fail(message)


def error(got: Tensor, want: Tensor, *, floor: float = 1e-8) -> float:
    """Largest difference relative to the largest magnitude of `want` (at least `floor`)."""
    if got.numel() == 0:
        return 0.0
    scale = max(want.detach().abs().max().item(), floor)
    difference = (got.detach().double() - want.detach().double()).abs().max().item()
    return difference / scale if difference == difference else float("inf")


def expect_close(got: Tensor, want: Tensor, tolerance: float, what: str, *, floor: float = 1e-8) -> None:
    expect(got.shape == want.shape, f"{what}: expected the shape {tuple(want.shape)}, got {tuple(got.shape)}")
    value = error(got, want, floor=floor)
    expect(value <= tolerance, f"{what}: expected a relative error of at most {tolerance:g}, got {value:.3g}")


def expect_same(got: Tensor, want: Tensor, what: str) -> None:
    """Bitwise equality."""
    if not torch.equal(got, want):
        difference = (got.detach().double() - want.detach().double()).abs().max().item()
        fail(f"{what}: expected bitwise equality, the largest difference is {difference:.3g}")


def expect_finite(tensor: Tensor, what: str) -> None:
    bad = int((~torch.isfinite(tensor)).sum())
    expect(bad == 0, f"{what}: expected finite numbers, {bad} of {tensor.numel()} are not")


def expect_zero(tensor: Tensor, what: str) -> None:
    if tensor.numel() and not bool((tensor == 0).all()):
        fail(f"{what}: expected exactly zero, the largest magnitude is {tensor.abs().max().item():.3g}")


def expect_gradients(got: Sequence[Tensor], want: Sequence[Tensor], names: Iterable[str], what: str) -> None:
    """Gradients equal up to rounding; one that nearly cancels is measured on the scale of the others."""
    floor = max((w.abs().max().item() for w in want if w.numel()), default=0.0) * 1e-3
    for g, w, name in zip(got, want, names, strict=True):
        expect_close(g, w, EQUAL64, f"{what}, gradient of {name}", floor=max(floor, 1e-8))


def gradients(objective: Tensor, mixer: nn.Module, *inputs: Tensor | None) -> tuple[list[Tensor], list[str]]:
    """Gradients of a scalar for the inputs, then every trainable parameter; zero where it does not reach."""
    named = [(f"input {i}", t) for i, t in enumerate(inputs) if t is not None]
    named += [(name, p) for name, p in mixer.named_parameters() if p.requires_grad]
    tensors = [t for _, t in named]
    if not objective.requires_grad:
        fail("expected an output that depends on the inputs or parameters, got one without a gradient")
    found = torch.autograd.grad(objective, tensors, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, tensors, strict=True)], [
        name for name, _ in named
    ]


def run_chunks(
    mixer: Mixer, x: Tensor, sizes: Sequence[int], state: State, *, mask: Tensor | None = None
) -> tuple[Tensor, State]:
    """The forward over consecutive chunks with a carried state: (y of all chunks, last state)."""
    pieces, start = [], 0
    for size in sizes:
        part = slice(start, start + size)
        out: MixerOutput = mixer(x[:, part], mask=None if mask is None else mask[:, part], state=state)
        expect(out.state is not None, "a state was passed in, so one must be returned; got None")
        pieces.append(out.y)
        state, start = out.state, start + size
    return torch.cat(pieces, dim=1), state


def converted(mixer: Mixer, dtype: torch.dtype) -> Mixer:
    """A copy of the mixer, with the same weights, in another precision."""
    return copy.deepcopy(mixer).to(dtype)


def find_subjects(factory: Factory, *, dim: int = 16, options: Mapping[str, Any] | None = None) -> list[Subject]:
    """All of a mixer that is to be checked: its declared variants, and the patterns that none of them has.

    With `options`, those alone, in each pattern that they allow (or the one that they name). A factory that
    is not a class is checked as it builds.
    """
    if inspect.isclass(factory) and not issubclass(factory, Mixer):
        raise TypeError(f"{factory.__name__} is not a subclass of seqzoo.Mixer")
    named = isinstance(factory, str) or inspect.isclass(factory)
    name = factory if isinstance(factory, str) else getattr(factory, "__name__", type(factory).__name__)
    if not named:
        return [Subject(str(name), factory, dim, dict(options or {}))]
    cls = Subject("", factory, dim).cls
    unknown = set(cls.patterns) - set(PATTERNS)
    if unknown or not cls.patterns:
        fail(f"{name}: patterns: expected some of {', '.join(PATTERNS)}, got {set(cls.patterns)}")
    flags = {pattern_name(causal, cross): (causal, cross) for causal in (False, True) for cross in (False, True)}
    patterns = {p: {"causal": flags[p][0], "cross": flags[p][1]} for p in PATTERNS if p in cls.patterns}
    declared = options is None and cls.variants is not Mixer.variants
    found: list[Subject] = []

    def add(variant: str, chosen: Mapping[str, Any]) -> None:
        subject = Subject(f"{name}[{variant}]", factory, dim, dict(chosen), declared=declared)
        first = subject.pattern not in {other.pattern for other in found}
        found.append(replace(subject, first=first))

    if options is None:
        for variant, chosen in cls.variants.items():
            add(variant, chosen)
        taken = {subject.pattern for subject in found}
        base = next(iter(cls.variants.values()), {})
        for pattern in [p for p in patterns if p not in taken]:
            add(pattern, {**base, **patterns[pattern]})
        return found
    if {"causal", "cross"} & set(options):
        add("options", options)
        return found
    refusals: list[ValueError] = []
    for pattern in patterns:
        try:
            create_mixer(factory, dim, **options, **patterns[pattern])
        except ValueError as refusal:
            refusals.append(refusal)
        else:
            add(pattern, {**options, **patterns[pattern]})
    if not found:
        raise refusals[0]
    return found
