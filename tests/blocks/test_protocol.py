"""The contract's own pieces: patterns, input checks, and operations on states."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from seqzoo.blocks.protocol import (
    PATTERNS,
    Mixer,
    MixerOutput,
    detach_state,
    map_state,
    pattern_name,
    reset_rows,
    select_rows,
    state_elements,
)


class Inner(NamedTuple):
    wave: Tensor  # complex (B, 2)
    tail: Tensor | None


class Outer(NamedTuple):
    value: Tensor  # (B, 3, 2)
    count: Tensor  # int64 (B,)
    inner: Inner


def outer(batch: int = 3, seed: int = 0) -> Outer:
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(batch, 3, 2, generator=generator)
    wave = torch.randn(batch, 2, dtype=torch.complex64, generator=generator)
    return Outer(value, torch.arange(batch) + 10 * seed, Inner(wave, None))


class Every(Mixer):
    patterns = frozenset(PATTERNS)
    streaming = True

    def forward(self, x, context=None, *, grid=None, **options):
        self.check_inputs(x, context, **options)
        return MixerOutput(x)


def test_pattern_names() -> None:
    names = [pattern_name(causal, cross) for causal in (False, True) for cross in (False, True)]
    assert names == ["self", "cross", "causal", "causal-cross"]
    for causal in (False, True):
        for cross in (False, True):
            assert Every(4, causal=causal, cross=cross).pattern == pattern_name(causal, cross)


@pytest.mark.parametrize("dim", [0, -1, 2.0, "4", None])
def test_dim_must_be_a_positive_integer(dim: object) -> None:
    with pytest.raises(ValueError, match=r"dim=.* must be a positive integer"):
        Every(dim)  # type: ignore[arg-type]


def test_defaults_of_the_base() -> None:
    plain = Mixer(4)
    assert (plain.pattern, plain.streaming, plain.exact, dict(plain.variants)) == (
        "self",
        False,
        True,
        {"default": {}},
    )
    with pytest.raises(ValueError, match=r"Mixer .*'self'.* carries no state"):
        plain.init_state(2)
    with pytest.raises(ValueError, match="carries no state"):
        plain.state_size(5)
    with pytest.raises(NotImplementedError, match="Mixer must define forward"):
        plain(torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match="Mixer does not support the pattern 'causal'"):
        Mixer(4, causal=True)


def test_output_defaults() -> None:
    out = MixerOutput(torch.zeros(1))
    assert out.state is None and out.aux == {}


X, C, YES = torch.zeros(2, 5, 4), torch.zeros(2, 3, 4), torch.ones(2, 5, dtype=torch.bool)
CU = torch.tensor([0, 2, 5], dtype=torch.int32)
SELF, CAUSAL, CROSS = {}, {"causal": True}, {"cross": True}


@pytest.mark.parametrize(
    ("flags", "arguments", "options", "message"),
    [
        (SELF, [X[..., :3]], {}, r"x has shape \(2, 5, 3\), expected \(B, L, 4\)"),
        (SELF, [X[0]], {}, r"x has shape \(5, 4\)"),
        (SELF, [X], {"mask": YES.float()}, r"mask is torch.float32 \(2, 5\), expected bool \(2, 5\)"),
        (SELF, [X], {"mask": YES[:, :4]}, r"mask is torch.bool \(2, 4\)"),
        (SELF, [X, C], {}, "a context was given, but the pattern is 'self'"),
        (SELF, [X], {"context_mask": YES}, "a context was given"),
        (SELF, [X], {"state": (X,)}, "a state was given, but the pattern 'self' carries none"),
        (CAUSAL, [X], {"cu_seqlens": CU}, r"cu_seqlens needs one packed row \(B = 1\), x has B = 2"),
        (CAUSAL, [X[:1]], {"cu_seqlens": CU.float()}, "cu_seqlens must be an int32 vector"),
        (CAUSAL, [X[:1]], {"cu_seqlens": CU[None]}, "cu_seqlens must be an int32 vector"),
        (CAUSAL, [X[:1]], {"cu_seqlens": CU, "mask": YES[:1]}, "give either mask or cu_seqlens"),
        (CROSS, [X], {}, "the pattern 'cross' needs a context"),
        (CROSS, [X, C[:1]], {}, r"context has shape \(1, 3, 4\), expected \(2, S, 4\)"),
        (CROSS, [X, C[..., :2]], {}, r"context has shape \(2, 3, 2\)"),
        (
            CROSS,
            [X, C],
            {"context_mask": YES},
            r"context_mask is torch.bool \(2, 5\).*expected bool \(2, 3\)",
        ),
        (
            CROSS,
            [X[:1], C[:1]],
            {"cu_seqlens": CU},
            "cu_seqlens and state are for self patterns, not 'cross'",
        ),
        (CROSS, [X, C], {"state": (X,)}, "cu_seqlens and state are for self patterns"),
    ],
)
def test_inputs_outside_the_contract(flags: dict, arguments: list, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"Every: {message}"):
        Every(4, **flags)(*arguments, **options)


def test_inputs_inside_the_contract() -> None:
    Every(4)(X, mask=YES)
    Every(4, causal=True)(X, mask=YES, state=(X,))
    Every(4, causal=True)(X[:1], cu_seqlens=CU, state=(X,))
    Every(4, cross=True)(X, C, mask=YES, context_mask=YES[:, :3])


def test_map_keeps_the_structure() -> None:
    doubled = map_state(lambda a, b: a + b, outer(), outer())
    assert type(doubled) is Outer and type(doubled.inner) is Inner and doubled.inner.tail is None
    assert torch.equal(doubled.value, 2 * outer().value) and torch.equal(doubled.inner.wave, 2 * outer().inner.wave)
    assert map_state(lambda t: t + 1, (torch.zeros(1), None))[0].item() == 1
    with pytest.raises(TypeError, match="not dict"):
        map_state(lambda t: t, {"value": torch.zeros(1)})
    with pytest.raises(ValueError):
        map_state(lambda a, b: a, (torch.zeros(1), torch.zeros(1)), (torch.zeros(1),))


def test_select_rows() -> None:
    order = torch.tensor([2, 0, 0, 1])
    picked = select_rows(outer(), order)
    assert torch.equal(picked.value, outer().value[order])
    assert picked.count.tolist() == [2, 0, 0, 1]
    assert torch.equal(picked.inner.wave, outer().inner.wave[order])


def test_reset_rows() -> None:
    rows = torch.tensor([True, False, True])
    old, new = outer(), outer(seed=1)
    got = reset_rows(old, rows, new)
    for i, source in enumerate((new, old, new)):
        assert torch.equal(got.value[i], source.value[i]) and torch.equal(got.inner.wave[i], source.inner.wave[i])
    assert got.count.tolist() == [10, 1, 12]
    assert torch.equal(old.value, outer().value)


def test_detach_state() -> None:
    state = map_state(lambda t: t.requires_grad_() if t.is_floating_point() else t, outer())
    cut = detach_state(state)
    assert state.value.requires_grad and not cut.value.requires_grad and torch.equal(cut.value, state.value)


def test_state_elements_counts_floats_once_and_complex_twice() -> None:
    assert state_elements(outer()) == 3 * 2 + 2 * 2
    assert state_elements((torch.zeros(5, 7), torch.zeros(5, dtype=torch.int64), None)) == 7
