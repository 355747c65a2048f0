"""Properties of the kernels that take masks or packed rows: what is masked out is as if it were not there.

Every backend that runs here, over drawn sizes, masks, strides and values at what is masked; see `mixer_strategies`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from mixer_strategies import LAYOUTS, LENGTHS, close, laid_out, mask_of, masks, tensor, usable_backends
from torch import Tensor

from examples import forall
from seqzoo.kernels.agent_attention import agent_attention
from seqzoo.kernels.block_sparse import block_means, block_sparse_attention, route
from seqzoo.kernels.linear_attention import LinearState, linear_attention
from seqzoo.kernels.prob_sparse import prob_sparse_attention
from seqzoo.kernels.softmax import softmax_attention

SIZES = st.one_of(st.integers(0, 12), st.sampled_from(LENGTHS))


@dataclass(frozen=True)
class Heads:
    """Queries, keys and values; masks: a word per row, of the queries and of the keys."""

    batch: int
    length: int
    source: int
    heads: int
    key: int
    value: int
    seen: tuple[str, ...]
    asked: tuple[str, ...]
    backend: str
    option: int
    layout: str
    filler: float
    seed: int

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        q = tensor(self.batch, self.length, self.heads, self.key, seed=self.seed)
        k = tensor(self.batch, self.source, self.heads, self.key, seed=self.seed + 1)
        return q, k, tensor(self.batch, self.source, self.heads, self.value, seed=self.seed + 2)

    @property
    def key_mask(self) -> Tensor:
        mask = mask_of(self.seen, self.source)
        assert mask is not None
        return mask

    def filled(self, x: Tensor) -> Tensor:
        return laid_out(x.masked_fill(~self.key_mask[:, :, None, None], self.filler), self.layout)


@st.composite
def heads(draw: st.DrawFn, op: str, *, square: bool = False) -> Heads:
    batch, length = draw(st.integers(1, 3)), draw(SIZES)
    source, key = length if square else draw(SIZES), draw(st.integers(1, 4))
    return Heads(
        batch,
        length,
        source,
        draw(st.integers(1, 3)),
        key,
        draw(st.integers(1, key)),
        draw(masks(batch, source)),
        draw(masks(batch, length)),
        draw(st.sampled_from(usable_backends(op))),
        draw(st.integers(0, 7)),
        draw(st.sampled_from(LAYOUTS)),
        draw(st.sampled_from((0.0, 7.0, -1e6))),
        draw(st.integers(0, 99)),
    )


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Softmax attention of one row, (L, H, K), over the keys that each query sees, bool (H or 1, L, S); else 0."""
    score = torch.einsum("lhk,shk->hls", q, k) * scale
    score = score.masked_fill(~seen, float("-inf"))
    weight = score.softmax(-1).nan_to_num(0.0)
    return torch.einsum("hls,shv->lhv", weight, v)


def test_masked_keys_of_softmax_attention_are_not_there() -> None:
    """Also of a causal or windowed one, where keys keep their places; groups of heads share keys."""

    def holds(case: Heads) -> None:
        q, k, v = case.tensors()
        group = 1 + case.option % 2
        q = q.repeat_interleave(group, 2) * torch.arange(1, group * case.heads + 1).view(-1, 1)
        causal, window = case.option in (2, 3), (case.option, 2) if case.option > 4 else None
        mask = case.key_mask[:, None, None]
        y = softmax_attention(
            q, case.filled(k), case.filled(v), mask=mask, causal=causal, window=window, scale=0.6, backend=case.backend
        )
        place = torch.arange(case.length).unsqueeze(1) + case.source - case.length
        ahead = torch.arange(case.source) - place
        seen = ahead <= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
        if window is not None:
            seen = seen & (-ahead <= window[0]) & (ahead <= window[1])
        k, v = (t.repeat_interleave(group, 2) for t in (k, v))
        for row in range(case.batch):
            close(y[row], dense(q[row], k[row], v[row], seen & case.key_mask[row], 0.6), f"row {row}")

    # Blocks of a window that begin before the first key.
    late = Heads(1, 140, 90, 1, 2, 2, ("1" * 90,), ("1" * 140,), "sdpa", 7, "contiguous", 0.0, 1)
    forall(heads("softmax"), holds, few=30, also=[late])


def test_masked_keys_and_agents_of_agent_attention_are_not_there() -> None:
    def holds(case: Heads) -> None:
        q, k, v = case.tensors()
        agents = tensor(case.batch, 1 + case.option, case.heads, case.key, seed=case.seed + 5)
        there = torch.rand(case.batch, 1 + case.option, generator=torch.Generator().manual_seed(case.seed)) < 0.7
        y = agent_attention(
            q,
            agents,
            case.filled(k),
            case.filled(v),
            key_mask=case.key_mask,
            agent_mask=there,
            scale=0.6,
            backend=case.backend,
        )
        for row in range(case.batch):
            real, kept = case.key_mask[row], there[row]
            one = agent_attention(
                q[row][None],
                agents[row, kept][None],
                k[row, real][None],
                v[row, real][None],
                scale=0.6,
                backend="naive",
            )
            close(y[row], one[0], f"row {row}")

    forall(heads("agent_attention_plain"), holds, few=30)


def test_pads_of_prob_sparse_attention_are_not_there() -> None:
    """Neither sampled nor selected nor averaged: each row as if its real queries and keys were all."""

    def holds(case: Heads) -> None:
        q, k, v = case.tensors()
        asked = mask_of(case.asked, case.length)
        masked = case.option > 5 and case.length == case.source
        options: dict[str, Any] = {
            "factor": 1 + case.option % 3,
            "measure_divisor": "keys" if case.option % 2 else "samples",
            "sampling": "block" if case.option == 4 else "query",
            "masked": masked,
            "seed": 3,
        }
        seen = asked if masked else case.key_mask
        assert asked is not None and seen is not None
        filled = [x.masked_fill(~seen[:, :, None, None], case.filler) for x in (k, v)]
        y = prob_sparse_attention(
            q.masked_fill(~asked[:, :, None, None], case.filler),
            *(laid_out(x, case.layout) for x in filled),
            query_mask=asked,
            key_mask=seen,
            backend=case.backend,
            **options,
        )
        for row in range(case.batch):
            one = prob_sparse_attention(
                q[row, asked[row]][None], k[row, seen[row]][None], v[row, seen[row]][None], backend="naive", **options
            )
            want = torch.zeros_like(y[row]).index_put((asked[row],), one[0])
            close(y[row], want, f"row {row}")

    forall(heads("prob_sparse"), holds, few=30)


def test_block_sparse_attention_sees_the_chosen_blocks_only() -> None:
    def holds(case: Heads) -> None:
        q, k, v = case.tensors()
        q_block, k_block = 1 + case.option % 4, 1 + case.option // 2
        generator = torch.Generator().manual_seed(case.seed)
        groups, blocks = -(-case.length // q_block), -(-case.source // k_block)
        routing = case.heads if case.option % 2 else 1
        number = min(blocks, 1 + case.option % 3)
        order = torch.rand(case.batch, routing, groups, max(blocks, 1), generator=generator).argsort(-1)[..., :number]
        index = torch.where(torch.rand(order.shape, generator=generator) < 0.8, order, -1)
        position = None
        if case.option > 3 and case.source:
            position = torch.randint(0, case.source, (case.batch, case.length), generator=generator)
        y = block_sparse_attention(
            q,
            case.filled(k),
            case.filled(v),
            index,
            q_block=q_block,
            k_block=k_block,
            q_position=position,
            key_mask=case.key_mask,
            scale=0.6,
            backend=case.backend,
        )
        of_query, of_key = torch.arange(case.length) // q_block, torch.arange(case.source) // k_block
        for row in range(case.batch):
            seen = (index[row][:, of_query].unsqueeze(-1) == of_key).any(2) & case.key_mask[row]
            if position is not None:
                seen = seen & (torch.arange(case.source) <= position[row].unsqueeze(1))
            close(y[row], dense(q[row], k[row], v[row], seen, 0.6), f"row {row}")

    forall(heads("block_sparse"), holds, few=30)


def test_routing_takes_the_largest_of_what_exists() -> None:
    def holds(case: Heads) -> None:
        q, k, _ = case.tensors()
        number, size = 1 + case.option % 4, 1 + case.option // 2
        means, counts = block_means(case.filled(k).flatten(2), size, case.key_mask)
        blocks = means.shape[1]
        assert blocks == -(-case.source // size)
        before = None
        if case.option > 4:
            before = torch.randint(0, blocks + 1, (case.batch, case.length), generator=torch.Generator().manual_seed(1))
        index = route(q, means.unflatten(2, k.shape[2:]), number, exists=counts > 0, before=before)
        assert index.shape == (case.batch, case.heads, case.length, min(number, blocks))
        for row in range(case.batch):
            pieces = list(zip(k[row].split(size), case.key_mask[row].split(size), strict=True)) if case.source else []
            centres = [part[real].mean(0) if bool(real.any()) else None for part, real in pieces]
            for token in range(case.length):
                able = [b for b, c in enumerate(centres) if c is not None]
                if before is not None:
                    able = [b for b in able if b < int(before[row, token])]
                for head in range(case.heads):
                    score = {b: float(q[row, token, head] @ centres[b][head]) for b in able}
                    best = sorted(able, key=lambda b: -score[b])[:number]
                    got = index[row, head, token].tolist()
                    assert got[: len(best)] == best, f"blocks {got} instead of {best}"
                    assert all(b == -1 for b in got[len(best) :])

    forall(heads("block_sparse"), holds, few=10)


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_masked_keys_of_linear_attention_are_not_there(causal: bool) -> None:
    """The sums of the state neither; what came before comes in by a state."""

    def holds(case: Heads) -> None:
        q, k, v = (t.abs() if i < 2 else t for i, t in enumerate(case.tensors()))
        options: dict[str, Any] = {"causal": causal, "normalize": case.option < 5, "scale": 0.8, "return_state": True}
        first = None
        if case.option % 2:
            s = tensor(case.batch, case.heads, case.key, case.value, seed=case.seed + 6)
            first = LinearState(s, s[..., 0].abs() if options["normalize"] else None)
        y, state = linear_attention(
            q,
            case.filled(k),
            case.filled(v),
            key_mask=case.key_mask,
            initial_state=first,
            backend=case.backend,
            **options,
        )
        assert state is not None
        for row in range(case.batch):
            real = case.key_mask[row]
            before = None if first is None else LinearState(*(None if p is None else p[row : row + 1] for p in first))
            # A query that is dropped with its key: the others keep theirs.
            one, last = linear_attention(
                q[row, real][None] if causal else q[row][None],
                k[row, real][None],
                v[row, real][None],
                initial_state=before,
                backend="naive",
                **options,
            )
            close(y[row, real] if causal else y[row], one[0], f"row {row}")
            assert last is not None
            close(state.s[row], last.s[0], f"state of row {row}")
            if last.z is not None and state.z is not None:
                close(state.z[row], last.z[0], f"normaliser of row {row}")

    strategy = heads("linear_attention", square=causal)
    forall(strategy, holds, few=30)
