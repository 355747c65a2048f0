"""Properties of every registered mixer, over drawn options, shapes, masks, strides and precisions.

The conformance suite fixes these and checks that the contract holds at all; here they vary. See `mixer_strategies`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from mixer_strategies import (
    FILLERS,
    LAYOUTS,
    Setup,
    build,
    close,
    gradients,
    laid_out,
    lengths,
    mask_of,
    masks,
    setups,
    tensor,
)
from torch import Tensor

from examples import forall
from seqzoo.blocks.protocol import Mixer
from seqzoo.blocks.registry import list_mixers, mixer_info
from seqzoo.blocks.testing.subject import CLOSE

SELF = ("self", "causal")
CAUSAL = ("causal", "causal-cross")


@dataclass(frozen=True)
class Batch:
    """A call of a mixer. mask, seen: a word per row, of x and of the context. grid: of the tokens after the prefix."""

    setup: Setup
    batch: int
    length: int
    mask: tuple[str, ...] | None = None
    source: int = 0
    seen: tuple[str, ...] | None = None
    grid: tuple[int, ...] | None = None
    filler: float = 0.0
    layout: str = "contiguous"
    residual: bool = False
    seed: int = 0

    def inputs(self, dtype: torch.dtype = torch.float64, *, filler: float | None = None) -> dict[str, Any]:
        """Arguments by name, pads filled, contiguous."""
        filler = self.filler if filler is None else filler
        mask, seen = mask_of(self.mask, self.length), mask_of(self.seen, self.source)

        def numbers(length: int, real: Tensor | None, seed: int) -> Tensor:
            x = tensor(self.batch, length, self.setup.dim, seed=self.seed + seed, dtype=dtype)
            return x if real is None else x.masked_fill(~real.unsqueeze(2), max(filler, torch.finfo(dtype).min))

        found: dict[str, Any] = {"x": numbers(self.length, mask, 0), "mask": mask}
        if "cross" in self.setup.pattern:
            found |= {"context": numbers(self.source, seen, 1), "context_mask": seen}
        if self.residual:
            found["residual"] = numbers(self.length, mask, 2)
        return found | {"grid": self.grid}


@st.composite
def batches(
    draw: st.DrawFn, name: str, *, patterns: tuple[str, ...] | None = None, grids: bool = True, most: int = 67
) -> Batch:
    setup = draw(setups(name, patterns))
    mixer, grid = build(setup), None
    if grids and draw(st.booleans()):
        grid = draw(st.tuples(st.integers(1, 5), st.integers(1, 7)))
        if dict(setup.options).get("spatial") and draw(st.booleans()):
            grid = (draw(st.integers(1, 3)), *grid)
    length = mixer.num_prefix_tokens + torch.Size(grid).numel() if grid else draw(lengths(setup, most=most))
    rows, crossed = draw(st.integers(1, 4)), "cross" in setup.pattern
    source = draw(lengths(setup, most=33)) if crossed else 0
    return Batch(
        setup,
        rows,
        length,
        draw(st.one_of(masks(rows, length), masks(rows, length), st.none())),
        source,
        draw(st.one_of(masks(rows, source), st.none())) if crossed else None,
        grid,
        draw(st.sampled_from(FILLERS)),
        draw(st.sampled_from(LAYOUTS)),
        mixer.reads_residual and draw(st.booleans()),
        draw(st.integers(0, 99)),
    )


def on_grid(mixer: Mixer) -> bool:
    """Whether tokens stand where the grid has them, so that pads are holes and not left out."""
    return getattr(mixer, "grid_size", None) is not None or getattr(mixer, "spatial", False)


def alone(mixer: Mixer, inputs: dict[str, Any], row: int) -> Tensor:
    """y of one row, (L, D): its real tokens in a batch of one, without masks, zeros at the pads."""
    x, mask, holes = inputs["x"][row], inputs["mask"], inputs["grid"] is not None and on_grid(mixer)
    real = torch.ones(len(x), dtype=torch.bool) if mask is None else mask[row]
    single: dict[str, Any] = {}
    for name in ("x", "residual"):
        if name in inputs:
            single[name] = inputs[name][row : row + 1] if holes else inputs[name][row, real][None]
    if holes:
        single |= {"grid": inputs["grid"], "mask": None if mask is None else mask[row : row + 1]}
    if "context" in inputs:
        seen = inputs["context_mask"]
        single["context"] = (
            inputs["context"][row : row + 1] if seen is None else inputs["context"][row, seen[row]][None]
        )
    y = mixer(single.pop("x"), single.pop("context", None), **single).y[0]
    return y if holes or bool(real.all()) else x.new_zeros(x.shape).index_put((real,), y)


# What such runs found: no context gave the bias where one of pads gave 0, NaN gradients, a tie told by the padding.
FOUND = {
    "agent": [Batch(Setup("agent", 16, (("num_heads", 2), ("num_agents", 3), ("cross", True))), 1, 1, seen=("",))],
    "softmax": [Batch(Setup("softmax", 16, (("cross", True),)), 1, 1, seen=("",))],
    "mega": [Batch(Setup("mega", 16, (("cross", True), ("attention", "laplace"))), 1, 1)],
    "tcnca": [Batch(Setup("tcnca", 16, (("cross", True), ("attention", "relu2"))), 1, 1)],
    "prob_sparse": [
        Batch(Setup("prob_sparse", 16, (("num_heads", 2), ("sampling", "block"), ("factor", 1))), 1, 4, ("1100",))
    ],
}


@pytest.mark.parametrize("name", list_mixers())
def test_a_row_of_a_batch_is_that_row_alone(name: str) -> None:
    """Whatever the mask, the content of pads, the strides, the order of the rows; gradients too; bit by bit again."""

    def holds(case: Batch) -> None:
        mixer, inputs = build(case.setup), case.inputs()
        leaves = {k: v.requires_grad_() for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}
        given = {k: laid_out(v, case.layout) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        kept = {k: v.detach().clone() for k, v in given.items() if isinstance(v, Tensor)}
        y = mixer(**given).y
        assert y.shape == inputs["x"].shape and y.dtype == torch.float64
        assert bool(torch.isfinite(y).all()), f"{int((~torch.isfinite(y)).sum())} outputs are not finite"
        for key, before in kept.items():
            assert torch.equal(given[key].nan_to_num(), before.nan_to_num()), f"{key} was written to"
        assert torch.equal(mixer(**given).y, y), "a second call gives other bits"
        mask, clean = inputs["mask"], case.inputs(filler=0.0)
        if mask is not None:
            assert not bool(y[~mask].any()), "an output at a pad is not zero"
        wanted = {k: clean[k].requires_grad_() for k in leaves}
        want = torch.stack([alone(mixer, clean, row) for row in range(case.batch)])
        close(y, want, "against the rows alone")
        weight = tensor(*y.shape, seed=case.seed + 9)
        got = gradients((y * weight).sum(), list(leaves.values()))
        due = gradients((want * weight).sum(), list(wanted.values()))
        scale = max((g.abs().max().item() for g in due if g.numel()), default=0.0)
        for key, ours, theirs in zip(leaves, got, due, strict=True):
            close(ours, theirs, f"gradient of {key}", floor=max(1e-3 * scale, 1e-3))
        order = [row % case.batch for row in (2, 0, 0, 3)]
        again = mixer(**{k: v[order] if isinstance(v, Tensor) else v for k, v in given.items()}).y
        close(again, y[order], "rows in another order, one twice")

    forall(batches(name), holds, few=7, also=FOUND.get(name, ()))


@dataclass(frozen=True)
class Packed:
    """A row of packed sequences; bounds: the dtype of cu_seqlens."""

    setup: Setup
    lengths: tuple[int, ...]
    bounds: torch.dtype = torch.int32
    layout: str = "contiguous"
    residual: bool = False
    seed: int = 0


@st.composite
def packs(draw: st.DrawFn, name: str) -> Packed:
    setup = draw(setups(name, SELF))
    return Packed(
        setup,
        tuple(draw(st.lists(lengths(setup, most=33), min_size=1, max_size=5))),
        draw(st.sampled_from((torch.int32, torch.int64))),
        draw(st.sampled_from(LAYOUTS)),
        build(setup).reads_residual and draw(st.booleans()),
        draw(st.integers(0, 99)),
    )


def bounds(sizes: tuple[int, ...], dtype: torch.dtype = torch.int32) -> Tensor:
    """cu_seqlens, strided."""
    wide = torch.full((2 * len(sizes) + 2,), 7, dtype=dtype)
    wide[::2] = torch.tensor([0, *sizes]).cumsum(0)
    return wide[::2]


@pytest.mark.parametrize("name", list_mixers())
def test_packed_sequences_are_each_alone(name: str) -> None:
    """Of any length, empty ones too; gradients as well, and no sequence reaches another."""

    def holds(case: Packed) -> None:
        mixer, total = build(case.setup), sum(case.lengths)
        inputs = {"x": tensor(1, total, case.setup.dim, seed=case.seed).requires_grad_()}
        if case.residual:
            inputs["residual"] = tensor(1, total, case.setup.dim, seed=case.seed + 1).requires_grad_()
        given = {k: laid_out(v, case.layout) for k, v in inputs.items()}
        y = mixer(**given, cu_seqlens=bounds(case.lengths, case.bounds)).y
        parts = [
            dict(zip(inputs, p, strict=True))
            for p in zip(*(v.split(case.lengths, 1) for v in inputs.values()), strict=True)
        ]
        want = torch.cat([mixer(**part).y for part in parts], 1)
        close(y, want, "against the sequences alone")
        weight, leaves = tensor(*y.shape, seed=case.seed + 9), list(inputs.values())
        got, due = (gradients((out * weight).sum(), leaves) for out in (y, want))
        for key, ours, theirs in zip(inputs, got, due, strict=True):
            close(ours, theirs, f"gradient of {key}")

    forall(packs(name), holds, few=4)


@dataclass(frozen=True)
class Change:
    """Everything from token `cut` on changes: other numbers, times `size`, and another mask."""

    batch: Batch
    cut: int
    size: float = 1.0
    mask: tuple[str, ...] | None = None


@st.composite
def changes(draw: st.DrawFn, name: str) -> Change:
    batch = draw(batches(name, patterns=CAUSAL, grids=False).filter(lambda b: b.length > 1))
    cut, mask = draw(st.integers(1, batch.length - 1)), batch.mask
    if mask is not None and draw(st.booleans()):
        other = draw(masks(batch.batch, batch.length))
        mask = tuple(a[:cut] + b[cut:] for a, b in zip(mask, other, strict=True))
    return Change(batch, cut, draw(st.sampled_from((1.0, 1e-6, 1e3, 1e8))), mask)


@pytest.mark.parametrize("name", [n for n in list_mixers() if set(CAUSAL) & set(mixer_info(n).patterns)])
def test_the_past_does_not_know_the_future(name: str) -> None:
    """Bit by bit, whatever the later tokens and their mask become; nor does it matter how many follow."""

    def holds(case: Change) -> None:
        mixer, inputs, cut = build(case.batch.setup), case.batch.inputs(), case.cut
        other = dict(inputs, mask=mask_of(case.mask, case.batch.length))
        for key in ("x", "residual"):
            if key in inputs:
                fresh = case.size * tensor(*inputs[key].shape, seed=case.batch.seed + 7)
                other[key] = torch.cat((inputs[key][:, :cut], fresh[:, cut:]), 1)
        shorter = {k: v[:, :cut] if k in ("x", "residual", "mask") and v is not None else v for k, v in inputs.items()}
        with torch.no_grad():
            y, changed, ended = mixer(**inputs).y[:, :cut], mixer(**other).y[:, :cut], mixer(**shorter).y
        if mixer.exact:
            assert torch.equal(y, changed), f"the past moved by {(y - changed).abs().max().item():.3g}"
        else:
            close(changed, y, "the past", 1e-12 * max(case.size, 1e3))
        close(ended, y, "the row cut off there")

    forall(changes(name), holds, few=5)


@dataclass(frozen=True)
class Narrow:
    """A call in another precision; packed: as one row of sequences of the batch's lengths."""

    batch: Batch
    dtype: torch.dtype


@pytest.mark.parametrize("name", list_mixers())
def test_lower_precisions_are_near(name: str) -> None:
    """Finite outputs and gradients in the dtype given, near those of the precision above."""

    def holds(case: Narrow) -> None:
        mixer = copy.deepcopy(build(case.batch.setup)).to(case.dtype)
        above = torch.float64 if case.dtype == torch.float32 else torch.float32
        inputs = case.batch.inputs(case.dtype)
        inputs["x"].requires_grad_()
        y = mixer(**inputs).y
        assert y.dtype == case.dtype and bool(torch.isfinite(y).all())
        (gradient,) = gradients(y.float().sum(), [inputs["x"]])
        assert gradient.dtype == case.dtype and bool(torch.isfinite(gradient).all())
        if not mixer.smooth or not y.numel():
            return
        wide = {k: v.to(above) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
        signs = 1 - 2 * torch.randint(2, wide["x"].shape, generator=torch.Generator().manual_seed(case.batch.seed))
        with torch.no_grad():
            want = mixer.to(above)(**wide).y
            # what all but cancels, before a norm say, no precision gives back: as far as its rounded input moves it
            wide["x"] = wide["x"] * (1 + signs * torch.finfo(case.dtype).eps)
            moved = (mixer(**wide).y - want).norm()
        size = want.norm().clamp(min=1e-3 * want.numel() ** 0.5)
        distance = ((y.to(above) - want).norm() - 2 * moved) / size
        assert distance <= CLOSE.get(case.dtype, 5e-3), f"{distance:.3g} away from {above}"

    dtypes = st.sampled_from((torch.float32, torch.bfloat16, torch.float16))
    forall(st.builds(Narrow, batches(name, most=40), dtypes), holds, few=4)


@pytest.mark.parametrize("name", list_mixers())
def test_training_is_repeatable_and_finite(name: str) -> None:
    """In training mode one seed gives the same bits, and every gradient is finite, beside rows masked out whole."""

    def holds(case: Batch) -> None:
        found = []
        for _ in range(2):
            mixer, inputs = copy.deepcopy(build(case.setup)).train(), case.inputs()
            inputs["x"].requires_grad_()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(case.seed)
                out = mixer(**inputs)
            leaves = {"x": inputs["x"], **dict(mixer.named_parameters())}
            slopes = gradients(out.y.square().sum() + sum(out.aux.values()), list(leaves.values()))
            named = {f"gradient of {n}": slope for n, slope in zip(leaves, slopes, strict=True)}
            found.append({"y": out.y, **named, **out.aux, **dict(mixer.named_buffers())})
        assert found[0].keys() == found[1].keys()
        for key, value in found[0].items():
            assert bool(torch.isfinite(value).all()), f"{key} is not finite"
            assert torch.equal(value, found[1][key]), f"{key} differs under one seed"

    forall(batches(name, most=33), holds, few=4)


@dataclass(frozen=True)
class Nobody:
    """A batch without rows."""

    setup: Setup
    length: int


@pytest.mark.parametrize("name", list_mixers())
def test_no_rows_are_no_rows(name: str) -> None:
    """A batch that has shrunk to nothing, with its states: (0, L, D) back, and gradients."""

    def holds(case: Nobody) -> None:
        mixer = build(case.setup)
        empty = Batch(case.setup, 0, case.length, (), 5, ()).inputs()
        empty["x"].requires_grad_()
        y = mixer(**empty).y
        assert y.shape == (0, case.length, case.setup.dim)
        gradients(y.sum(), [empty["x"], *mixer.parameters()])
        if mixer.streaming and mixer.pattern == "causal":
            out = mixer(empty["x"], state=mixer.init_state(0))
            assert out.y.shape == y.shape and out.state is not None

    forall(st.builds(Nobody, setups(name), st.integers(0, 40)), holds, few=4)
