"""Hashed n-grams: what a token's vector depends on, and that packing, padding and carrying change nothing."""

from __future__ import annotations

import pytest
import torch

import seqzoo
from seqzoo.blocks.layers.embeddings import TokenEmbedding
from seqzoo.blocks.layers.ngrams import NGramEmbedding
from seqzoo.blocks.protocol import select_rows
from seqzoo.blocks.sequence_model import SequenceState


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the rounding of products of other sizes."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def embedding() -> NGramEmbedding:
    torch.manual_seed(0)
    return NGramEmbedding(256, 12, orders=[4, 2, 3], size=1 << 12, width=5)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_by_a_loop_over_tokens(embedding: NGramEmbedding) -> None:
    """The polynomial hash with Python's whole numbers."""
    ids = tokens(2, 9)
    found = embedding(ids)
    for row in range(2):
        for place in range(9):
            parts = []
            for order, table in zip(embedding.orders, embedding.tables, strict=True):
                value = 0
                for back in range(order):
                    symbol = 1 + int(ids[row, place - back]) if place >= back else 0
                    value = (value * 1_000_003 + symbol) % 2**32
                parts.append(table.weight[(value * 0x9E3779B1) % 2**32 >> (32 - 12)])
            expected = embedding.weight[ids[row, place]] + embedding.map(torch.cat(parts))
            torch.testing.assert_close(found[row, place], expected)


def test_a_vector_depends_on_the_last_tokens_only(embedding: NGramEmbedding) -> None:
    ids = tokens(1, 20)
    other = ids.clone()
    other[0, 10] = (other[0, 10] + 1) % 256
    moved = (embedding(ids) != embedding(other)).any(-1)[0]
    assert moved.tolist() == [10 <= i < 14 for i in range(20)]


def test_hashes_spread(embedding: NGramEmbedding) -> None:
    """Neighbouring n-grams fall into slots as random ones would: 4,096 of them fill 1 - 1/e of the slots."""
    ids = torch.arange(4096).view(64, 64) % 256
    ids = torch.stack((torch.arange(4096) // 256, torch.arange(4096) % 256), 1)
    every = torch.cat((embedding.init_state(4096), ids + 1), 1)
    slots = embedding._hashes(every, ids)[0][:, 1]
    assert 0.6 < slots.unique().numel() / 4096 < 1.0 and slots.min() >= 0 and slots.max() < 4096


@pytest.mark.parametrize("cuts", [(1,) * 9, (4, 5), (2, 0, 7)])
def test_chunks_equal_the_whole(embedding: NGramEmbedding, cuts: tuple[int, ...]) -> None:
    ids, state, parts = tokens(3, 9), embedding.init_state(3), []
    for part in ids.split(list(cuts), 1):
        x, state = embedding.read(part, state=state)
        parts.append(x)
    close(torch.cat(parts, 1), embedding(ids))


def test_pads_and_packing_change_nothing(embedding: NGramEmbedding) -> None:
    a, b = tokens(1, 3), tokens(1, 6)
    mask = torch.tensor([[False, True, False, True, True, False], [True] * 6])
    row = torch.zeros(2, 6, dtype=torch.int64)
    row[0, mask[0]], row[1] = a[0], b[0]
    x, state = embedding.read(row, mask=mask, state=embedding.init_state(2))
    close(x[0][mask[0]], embedding(a)[0])
    close(x[1], embedding(b)[0])
    _, alone = embedding.read(a, state=embedding.init_state(1))
    assert torch.equal(state[:1], alone)
    bounds = torch.tensor([0, 3, 9], dtype=torch.int32)
    packed, after = embedding.read(torch.cat((a, b), 1), cu_seqlens=bounds, state=embedding.init_state(2))
    close(packed, torch.cat((embedding(a), embedding(b)), 1))
    assert torch.equal(after, state)


def test_in_a_language_model(tmp_path) -> None:
    torch.manual_seed(0)
    model = seqzoo.create_model("language_tiny", dim=16, depth=2, mixer="gla", ngrams=[2, 3], ngram_size=64).eval()
    ids = tokens(2, 12)
    whole, state = model(ids).y, model.init_state(2)
    first = model(ids[:, :5], state=state)
    assert isinstance(first.state, SequenceState)
    rest = model(ids[:, 5:], state=first.state)
    torch.testing.assert_close(torch.cat((first.y, rest.y), 1), whole, rtol=1e-5, atol=1e-5)
    one = model(ids[1:, 5:], state=select_rows(first.state, torch.tensor([1]))).y
    torch.testing.assert_close(one, rest.y[1:], rtol=1e-5, atol=1e-5)
    prompts = [ids[0, :3], ids[1]]
    together = seqzoo.generate(model, prompts, max_new_tokens=6, temperature=0, prefill_chunk=4)
    for prompt, new in zip(prompts, together, strict=True):
        seen = prompt
        for token in new.tolist():
            assert int(model(seen[None]).y[0, -1].argmax()) == token
            seen = torch.cat((seen, torch.tensor([token])))
    seqzoo.save_model(model, tmp_path / "m")
    assert torch.equal(seqzoo.load_model(tmp_path / "m").eval()(ids).y, whole)
    model(ids).y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"orders": [1]}, "orders"),
        ({"orders": []}, "orders"),
        ({"orders": [2, 2]}, "orders"),
        ({"size": 100}, "size=100"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NGramEmbedding(256, 8, **{"orders": [2], **options})
    assert isinstance(seqzoo.create_model("language_tiny").model.embedding, TokenEmbedding)
