"""Masked tokens with every mixer that sees both sides: it learns, and documents of one row do not see each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from seqzoo.blocks.registry import list_mixers
from seqzoo.pipelines.text.corpus import Corpus
from seqzoo.pipelines.text.module import LanguageModule
from seqzoo.pipelines.text.rows import IGNORED, PackedRows
from seqzoo.pipelines.text.scores import positions, token_losses

OPTIONS: dict[str, dict[str, Any]] = {
    "bi_level_routing": {"region_size": 4, "num_heads": 2},
    "mamba2": {"head_dim": 8, "d_state": 8},
    "long_vq": {"num_heads": 1, "codebook_size": 8, "chunk_size": 8},
}
TASK = {"objective": "masked", "carry_state": False, "grad_checkpointing": False, "mask_share": 0.3}
SCHEMA = {"tokenizer": "bytes", "tokenizer_key": "bytes", "vocab_size": 256, "separator": 0, "seq_len": 24}


def module_of(mixer: str) -> LanguageModule:
    torch.manual_seed(0)
    options = {"name": mixer, **OPTIONS.get(mixer, {"num_heads": 2} if mixer in HEADS else {})}
    model = {"name": "prob_sparse_tiny", "dim": 16, "depth": 1, "mixer": options}
    return LanguageModule(model, TASK, {"name": "adamw", "lr": 1e-2}, {"name": "constant"}, SCHEMA)


HEADS = {"softmax", "agent", "gla", "lightning", "linear", "prob_sparse"}
MIXERS = list_mixers(pattern="self")


def corpus_of(texts: list[bytes]) -> Corpus:
    tokens = np.frombuffer(b"".join(b"\0" + t + b"\0" for t in texts), np.uint8)
    sizes = np.array([len(t) for t in texts])
    bounds = np.concatenate([[0], np.cumsum(sizes + 2)])
    return Corpus(tokens, bounds, sizes, ["x"] * len(texts), np.zeros(len(texts), np.uint8))


@pytest.mark.filterwarnings("ignore:.*self.trainer. reference")
@pytest.mark.parametrize("mixer", MIXERS)
def test_random_text_lowers_the_loss(mixer: str) -> None:
    """A few steps of the module's own training step, on rows with several documents each."""
    module = module_of(mixer)
    rng = np.random.default_rng(0)
    corpus = corpus_of([bytes(rng.choice(list(b"abcd "), int(n)).tolist()) for n in rng.integers(5, 60, 30)])
    rows = PackedRows(corpus, np.arange(30), 24, fill=True)
    optimizer = torch.optim.Adam(module.parameters(), lr=2e-2)
    losses = []
    for step in range(12):
        batch = rows[np.arange(12) if step % 2 else np.arange(len(rows) - 6, len(rows))]
        loss = module.training_step(batch, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 4 and np.mean(losses[-2:]) < losses[0] - 1.5, losses


@pytest.mark.parametrize("mixer", MIXERS)
def test_documents_of_a_row_do_not_see_each_other(mixer: str) -> None:
    """What is asked and the losses of a document are those it has beside others, and the loss is over hidden tokens."""
    module = module_of(mixer).eval()
    texts = [b"the first one", b"second " * 3, b"and the third of them"]
    losses = []
    for others in (b"SECOND " * 3, b"second " * 3):
        corpus = corpus_of([texts[0], others, texts[2]])
        rows = PackedRows(corpus, np.arange(3), 80)
        plain = rows[np.arange(len(rows))]
        batch = module._masked(plain, fixed=True)
        asked = batch["targets"] != IGNORED
        assert torch.equal(batch["targets"][asked], plain["tokens"][asked]) and asked.float().mean() < 0.5
        assert (batch["cu_seqlens"].diff() > 0).all() and len(batch["cu_seqlens"]) == 4
        with torch.no_grad():
            found = token_losses(module.logits(batch).y, batch["targets"])[0]
        assert ((found > 0) == (batch["targets"][0] != IGNORED)).all()
        by_document = dict(zip(batch["first"].tolist(), found.split(batch["cu_seqlens"].diff().tolist()), strict=True))
        losses.append(by_document)
    for first in (0, 15 + 23):
        torch.testing.assert_close(losses[0][first], losses[1][first], rtol=1e-5, atol=1e-5)
        assert (losses[0][first] > 0).any()
    assert not torch.equal(losses[0][15], losses[1][15])


def test_the_hidden_tokens_of_an_evaluation_do_not_depend_on_its_batches() -> None:
    """One by one, all together, or as the second of two processes takes them."""
    module = module_of("linear")
    corpus = corpus_of([bytes([65 + i]) * (7 * i + 3) for i in range(12)])
    rows = PackedRows(corpus, np.arange(12), 24)

    def hidden(indices: np.ndarray) -> set[tuple[int, int]]:
        batch = module._masked(rows[indices], fixed=True)
        place = positions({**batch, "start": batch["first"]}).expand_as(batch["tokens"])
        keep = batch["targets"] != IGNORED
        return set(zip(place[keep].tolist(), batch["tokens"][keep].tolist(), strict=True))

    together = hidden(np.arange(len(rows)))
    assert set.union(*(hidden(np.array([i])) for i in range(len(rows)))) == together
    assert set.union(*(hidden(np.arange(r, len(rows), 2)) for r in range(2))) == together
    assert 0.2 < len(together) / sum(7 * i + 4 for i in range(12)) < 0.4
    assert module._masked(rows[np.arange(3)])["targets"].shape == rows[np.arange(3)]["tokens"].shape
