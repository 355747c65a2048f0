"""Rows of documents: every prediction once, from its own document alone, at its own position."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import seqzoo
from seqzoo.pipelines.text.corpus import Corpus
from seqzoo.pipelines.text.masking import mask_tokens
from seqzoo.pipelines.text.rows import IGNORED, CarriedRows, PackedRows, SlidingRows
from seqzoo.pipelines.text.scores import LossSums, positions, token_losses

SIZES = (40, 3, 17, 1, 8, 64, 5)  # predictions of the documents
ALL = np.arange(len(SIZES))


@pytest.fixture
def corpus() -> Corpus:
    """Every token is its place in the row, so that a wrong one shows where it came from."""
    bounds = np.concatenate([[0], np.cumsum(np.array(SIZES) + 1)])
    tokens = np.arange(bounds[-1], dtype=np.uint16)
    return Corpus(tokens, bounds, np.array(SIZES) - 1, [f"d{i}" for i in ALL], np.zeros(len(SIZES), np.uint8))


def asked(batch: dict[str, Tensor]) -> list[tuple[int, int, int]]:
    """(token, target, position) of every prediction."""
    keep = batch["targets"] != IGNORED
    parts = (batch["tokens"], batch["targets"], positions(batch).expand_as(batch["tokens"]))
    return list(zip(*(p[keep].tolist() for p in parts), strict=True))


def expected(corpus: Corpus, documents: np.ndarray) -> list[tuple[int, int, int]]:
    found = []
    for d in documents:
        first = int(corpus.bounds[d])
        found += [(first + i, first + i + 1, i) for i in range(SIZES[d])]
    return sorted(found)


@pytest.mark.parametrize("seq_len", [1, 8, 16, 100])
@pytest.mark.parametrize("kind", ["packed", "filled", "sliding", "carried", "carried shuffled"])
@pytest.mark.parametrize("documents", [ALL, np.array([5]), np.array([3, 1])], ids=["all", "one", "short"])
def test_every_prediction_comes_once(corpus: Corpus, seq_len: int, kind: str, documents: np.ndarray) -> None:
    for size in (1, 3, 50):
        if kind in ("packed", "filled"):
            rows = PackedRows(corpus, documents, seq_len, seed=size, fill=kind == "filled")
        elif kind == "sliding":
            rows = SlidingRows(corpus, documents, seq_len, max(1, seq_len // size))
        else:
            rows = CarriedRows(corpus, documents, seq_len, size, shuffle=kind != "carried", seed=size)
        step = 1 if "carried" in kind else size
        batches = [rows[np.arange(i, min(i + step, len(rows)))] for i in range(0, len(rows), step)]
        assert sorted(p for b in batches for p in asked(b)) == expected(corpus, documents)
        assert all(b["tokens"].dtype == torch.int64 for b in batches)


def test_packed_rows_are_nearly_full_and_never_padded(corpus: Corpus) -> None:
    rows = PackedRows(corpus, ALL, 16)
    batch = rows[np.arange(len(rows))]
    assert batch["tokens"].shape == (1, sum(SIZES)) and "mask" not in batch
    assert batch["cu_seqlens"].diff().max() <= 16 and len(batch["start"]) == len(batch["cu_seqlens"]) - 1
    assert len(rows) <= sum(SIZES) / 16 + 2
    full = rows[np.arange(6)]  # 2 of document 0, 1 of 2, 4 of 5: whole rows first
    assert full["tokens"].shape == (6, 16) and "cu_seqlens" not in full


@pytest.mark.parametrize("seq_len", [4, 16, 50])
def test_filled_rows_are_full(corpus: Corpus, seq_len: int) -> None:
    rows = PackedRows(corpus, ALL, seq_len, fill=True)
    sizes = [rows[i]["tokens"].numel() for i in range(len(rows))]
    assert sizes[:-1] == [seq_len] * (len(rows) - 1) and sum(sizes) == sum(SIZES)


def test_sliding_windows_have_their_context(corpus: Corpus) -> None:
    rows = SlidingRows(corpus, np.array([5]), 16, 4)
    batch = rows[np.arange(len(rows))]
    for row in range(1, len(rows)):
        first = int((batch["targets"][row] != IGNORED).long().argmax())
        assert first == 12  # 16 - 4 tokens of context
    with pytest.raises(ValueError, match="stride=17"):
        SlidingRows(corpus, ALL, 16, 17)


def test_carried_rows_go_on_where_they_were(corpus: Corpus) -> None:
    rows = CarriedRows(corpus, ALL, 8, 3)
    last: list[int | None] = [None] * 3
    for step in range(len(rows)):
        batch = rows[step]
        for row in range(3):
            real = batch["mask"][row] if "mask" in batch else torch.ones(8, dtype=torch.bool)
            tokens = batch["tokens"][row][real].tolist()
            if not tokens:
                continue
            assert bool(batch["fresh"][row]) == (tokens[0] in corpus.bounds)
            assert batch["fresh"][row] or tokens[0] == last[row] + 1
            last[row] = tokens[-1]
    assert len(rows) == 8  # 20 windows of 8 over 3 rows, of which document 5 has 8
    with pytest.raises(IndexError):
        rows[len(rows)]


@pytest.mark.parametrize("mixer", list(seqzoo.list_mixers(pattern="causal", streaming=True)))
def test_packed_equals_separate_and_carried_equals_whole(mixer: str) -> None:
    """Losses and gradients of short documents in shared rows are those of each alone; a state carried over windows
    gives what one long row gives."""
    torch.manual_seed(0)
    options = {
        "bi_level_routing": {"region_size": 4, "num_heads": 2},
        "mamba2": {"head_dim": 8, "d_state": 8},
        "softmax": {"window_size": 6, "num_heads": 2},
    }
    net = seqzoo.create_model(
        "language_tiny", dim=16, depth=2, vocab_size=64, mixer={"name": mixer, **options.get(mixer, {})}
    ).eval()
    sizes = np.array([5, 9, 2, 12])
    bounds = np.concatenate([[0], np.cumsum(sizes + 1)])
    tokens = np.random.default_rng(0).integers(1, 64, bounds[-1]).astype(np.uint8)
    corpus = Corpus(tokens, bounds, sizes, list("abcd"), np.zeros(4, np.uint8))
    packed = PackedRows(corpus, np.arange(4), 16)
    batch = packed[np.arange(len(packed))]
    total = token_losses(net(batch["tokens"], cu_seqlens=batch["cu_seqlens"]).y, batch["targets"]).sum()
    total.backward()
    together = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    alone = torch.zeros(())
    for d in range(4):
        row = torch.from_numpy(tokens[bounds[d] : bounds[d + 1]].astype(np.int64))[None]
        alone = alone + token_losses(net(row[:, :-1]).y, row[:, 1:]).sum()
    alone.backward()
    torch.testing.assert_close(total, alone, rtol=1e-5, atol=1e-4)
    for name, parameter in net.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(together[name], parameter.grad, rtol=1e-3, atol=1e-4)
    if len({net.state_size(n) for n in (1 << 20, 1 << 21)}) > 1:
        return  # its state grows: rows of several ages have no common shape
    carried, state = torch.zeros(()), None
    rows = CarriedRows(corpus, np.arange(4), 4, 2)
    with torch.no_grad():
        for step in range(len(rows)):
            batch = rows[step]
            fresh = net.init_state(2)
            state = fresh if state is None else seqzoo.blocks.protocol.reset_rows(state, batch["fresh"], fresh)
            out = net(batch["tokens"], mask=batch.get("mask"), state=state)
            state = out.state
            carried += token_losses(out.y, batch["targets"]).sum()
    torch.testing.assert_close(carried, alone.detach(), rtol=1e-4, atol=1e-3)


def test_sums_by_hand() -> None:
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [1 / 3, 1 / 3, 1 / 3]]]))
    batch = {"tokens": torch.zeros(1, 3, dtype=torch.long), "targets": torch.tensor([[0, IGNORED, 2]])}
    batch["start"] = torch.tensor([3])
    sums = LossSums()
    sums.update(token_losses(logits, batch["targets"]), batch)
    found = sums.compute(num_bytes=1, predictions=2)
    assert found["bits_per_byte"] == pytest.approx(1 + np.log2(3), rel=1e-6)
    assert found["perplexity"] == pytest.approx(6**0.5, rel=1e-6)
    assert [(r["from"], r["to"], r["tokens"]) for r in found["by_position"]] == [(2, 3, 1), (4, 7, 1)]
    other = LossSums()
    other.flat = sums.flat * 2
    assert other.compute(num_bytes=2, predictions=4) == {
        **found,
        "by_position": [{**r, "tokens": 2} for r in found["by_position"]],
    }


@pytest.mark.parametrize("placed", [False, True])
def test_masks_follow_the_published_shares(placed: bool) -> None:
    tokens = torch.randint(0, 50, (100, 500), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(tokens, dtype=torch.bool)
    real[:, 400:] = False
    made = torch.Generator().manual_seed(1)
    place = torch.arange(tokens.numel()).view_as(tokens) + 10**9 if placed else None
    options: dict[str, Any] = {"share": 0.15, "mask_token": 50, "vocab_size": 50, "generator": made, "place": place}
    inputs, targets = mask_tokens(tokens, real=real, **options)
    chosen = targets != IGNORED
    assert not chosen[:, 400:].any() and (inputs[~chosen] == tokens[~chosen]).all()
    assert (targets[chosen] == tokens[chosen]).all()
    assert abs(chosen[:, :400].float().mean() - 0.15) < 0.005
    assert abs((inputs[chosen] == 50).float().mean() - 0.8) < 0.02
    assert abs((inputs[chosen] == tokens[chosen]).float().mean() - 0.102) < 0.02
    replaced = inputs[chosen & (inputs != 50) & (inputs != tokens)]
    assert replaced.min() == 0 and replaced.max() == 49 and abs(replaced.float().mean() - 24.5) < 2
    if place is not None:  # the same for the same tokens in another batch
        again, _ = mask_tokens(tokens[40:50, 100:200], **{**options, "place": place[40:50, 100:200]})
        assert torch.equal(again, inputs[40:50, 100:200])
