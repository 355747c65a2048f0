"""What the property tests draw: a mixer with any of its options, batches with any mask, tensors with any stride."""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from seqzoo.blocks.protocol import Mixer, pattern_name
from seqzoo.blocks.registry import create_mixer, mixer_info
from seqzoo.blocks.testing import find_subjects
from seqzoo.blocks.testing.subject import EQUAL64, error
from seqzoo.kernels.dispatch import backends

# Around what chunks, blocks and windows are usually long, and primes.
LENGTHS = (1, 2, 3, 5, 7, 8, 9, 13, 15, 16, 17, 31, 33, 37, 63, 64, 65, 67)
FILLERS = (math.nan, math.inf, -1e300, 0.0)
LAYOUTS = ("contiguous", "transposed", "every other token", "every other channel", "offset")

# Values for the options whose type does not list them; others keep the value of the variant.
_VALUES: Mapping[str, tuple[Any, ...]] = {
    "num_heads": (1, 2, 4),
    "num_kv_heads": (None, 1, 2),
    "head_dim": (None, 2, 3, 4),
    "chunk_size": (1, 2, 3, 4, 8, 16),
    "window_size": (None, 1, 2, 3, 8),
    "num_sinks": (0, 1, 3),
    "rotary_dim": (None, 2),
    "region_size": (1, 2, 3, 8),
    "num_regions": (1, 2, 3),
    "topk": (1, 2, 5),
    "num_agents": (1, 4, 9),
    "bias_size": (1, 2, 5),
    "conv_kernel": (None, 0, 1, 2, 3, 5),
    "lce_kernel": (0, 1, 3, 5),
    "kernel_size": (1, 2, 3, 5),
    "dilation_factor": (1, 2, 3),
    "tcn_depth": (1, 2, 3),
    "num_convs": (1, 2),
    "groups": (None, 1, 2, 4),
    "num_groups": (1, 2),
    "d_state": (1, 2, 4, 6),
    "d_conv": (1, 2, 4),
    "dt_rank": ("auto", 1, 3),
    "expand": (1, 1.5, 2),
    "z_dim": (None, 2, 4, 8),
    "hidden_dim": (None, 4, 8),
    "codebook_size": (1, 2, 7),
    "truncation": (None, 1, 2, 5, 16),
    "factor": (1, 2, 5),
    "mix": (None, False, True),
    "seed": (0, 3),
    "agents": (None, "pooled", "learned"),
    "agent_bias": (None, False, True),
    "grid_size": (None, (2, 3), (3, 3)),
    "num_prefix_tokens": (0, 1, 2),
    "shortcut": (0.0, 0.5),
    "scale": (None, "dim", "head", 0.7),
    "expand_k": (0.5, 1.0),
    "expand_v": (0.5, 1.0),
    "feature_map": (None, "elu+1", "relu"),
    "clamp_min": (None, -1.0),
    "num_layers": (1, 3),
    "d_ssm": (None, 8),
    "dt_limit_high": (None, 0.05),
    "backend": ("auto", "naive"),
}
_SLOW = {"triton", "compiled"}  # backends that interpret or build


@dataclass(frozen=True)
class Setup:
    """A mixer that can be built: options as pairs, so that it can be a key and be read in a failure."""

    name: str
    dim: int
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def pattern(self) -> str:
        options = dict(self.options)
        return pattern_name(options.get("causal", False), options.get("cross", False))

    @property
    def label(self) -> str:
        return f"{self.name}, dim={self.dim}, {dict(self.options)}"


def _freeze(value: Any) -> Any:
    if isinstance(value, Mapping):
        return ("mapping", *((key, _freeze(v)) for key, v in value.items()))
    return tuple(value) if isinstance(value, list) else value


def _thaw(value: Any) -> Any:
    return dict(value[1:]) if isinstance(value, tuple) and value[:1] == ("mapping",) else value


def create(setup: Setup) -> Mixer:
    return create_mixer(setup.name, setup.dim, **{key: _thaw(value) for key, value in setup.options})


@lru_cache(maxsize=256)
def build(setup: Setup, dtype: torch.dtype = torch.float64) -> Mixer:
    """In eval mode, with parameters moved off their initial values, so that no zero hides anything."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixer = create(setup)
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer.to(dtype).eval()


def usable_backends(op: str) -> list[str]:
    """ "auto" and the backends of an operation of `kernels` that neither interpret nor build."""
    return ["auto", *(name for name in backends()[op] if name not in _SLOW)]


@cache
def _choices(name: str) -> Mapping[str, tuple[Any, ...]]:
    """Values of every option of a mixer that has some to draw."""
    constructor = mixer_info(name).cls.__init__
    hints = typing.get_type_hints(constructor)
    found: dict[str, tuple[Any, ...]] = {}
    for option in inspect.signature(constructor).parameters:
        if option in ("causal", "cross"):
            continue
        listed = typing.get_args(hints.get(option)) if typing.get_origin(hints.get(option)) is typing.Literal else ()
        if hints.get(option) is bool:
            listed = (False, True)
        values = tuple(v for v in listed if v not in _SLOW) or _VALUES.get(option, ())
        if type(None) not in typing.get_args(hints.get(option)):
            values = tuple(v for v in values if v is not None)
        if values:
            found[option] = values
    return found


@st.composite
def setups(draw: st.DrawFn, name: str, patterns: Iterable[str] | None = None) -> Setup:
    """A variant of the mixer as it is, or with up to three options changed where they go together."""
    known = [s for s in find_subjects(name) if patterns is None or s.pattern in set(patterns)]
    subject = draw(st.sampled_from(known))
    options = {key: value for key, value in subject.options.items() if key != "max_len"}  # of no use here
    plain = Setup(name, 16, tuple((key, _freeze(value)) for key, value in options.items()))
    choices = _choices(name)
    changed = draw(st.lists(st.sampled_from(sorted(choices)), max_size=3, unique=True)) if choices else []
    values = {option: draw(st.sampled_from(choices[option])) for option in changed}
    dim = draw(st.sampled_from((16, 8, 12, 24)))
    setup = Setup(name, dim, tuple({**dict(plain.options), **values}.items()))
    try:
        create(setup)
    except ValueError:  # the options do not go together, and it says so
        return plain
    return setup


@st.composite
def lengths(draw: st.DrawFn, setup: Setup | None = None, *, most: int = 67) -> int:
    """Short, or about a multiple of the usual chunks and of the mixer's own."""
    options = {} if setup is None else dict(setup.options)
    own = [options[key] for key in ("chunk_size", "window_size", "region_size") if isinstance(options.get(key), int)]
    near = {n for size in own for n in (size - 1, size, size + 1, 2 * size, 2 * size + 1)} | set(LENGTHS)
    return draw(st.one_of(st.integers(0, 20), st.sampled_from(sorted(n for n in near if 0 <= n <= most))))


@st.composite
def masks(draw: st.DrawFn, batch: int, length: int) -> tuple[str, ...]:
    """One word per row, "1" a real token: all, none, padded right or left, or with holes anywhere."""
    rows = []
    for _ in range(batch):
        kind = draw(st.sampled_from(("holes", "right", "left", "all", "none")))
        if kind == "holes":
            rows.append(draw(st.text("01", min_size=length, max_size=length)))
            continue
        number = {"all": length, "none": 0}.get(kind)
        number = draw(st.integers(0, length)) if number is None else number
        word = "1" * number
        rows.append(word.rjust(length, "0") if kind == "left" else word.ljust(length, "0"))
    return tuple(rows)


def mask_of(rows: tuple[str, ...] | None, length: int) -> Tensor | None:
    if rows is None:
        return None
    return torch.tensor([[c == "1" for c in row] for row in rows], dtype=torch.bool).reshape(len(rows), length)


def tensor(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers that depend on the seed only."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The numbers of x (B, L, ...) with other strides; the sevens between them are to be neither read nor written."""
    batch, length, *rest = x.shape
    if layout == "contiguous":
        return x.contiguous()
    if layout == "transposed":
        view = x.new_full((length, batch, *rest), 7).transpose(0, 1)
    elif layout == "every other token":
        view = x.new_full((batch, 2 * length + 1, *rest), 7)[:, 1::2]
    elif layout == "every other channel":
        view = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), 7)[..., ::2]
    else:
        view = x.new_full((x.numel() + 3,), 7)[3:].view(x.shape)
    return view.copy_(x)


def close(got: Tensor, want: Tensor, what: str, tolerance: float = EQUAL64, floor: float = 1e-3) -> None:
    assert got.shape == want.shape, f"{what}: {tuple(got.shape)} instead of {tuple(want.shape)}"
    value = error(got, want, floor=floor)
    assert value <= tolerance, f"{what}: relative error {value:.3g}"


def gradients(objective: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Of a scalar; zero for what it does not depend on, as with no tokens at all."""
    if not objective.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return list(torch.autograd.grad(objective, leaves, allow_unused=True, materialize_grads=True))
