"""Classifiers of documents: pads and other rows change nothing, pooling by hand, two towers, pixels as numbers."""

import pytest
import torch

from seqzoo.blocks.registry import list_mixers
from seqzoo.zoo import create_model, list_models, load_model, save_model
from seqzoo.zoo.classifier import POOLINGS, SequenceClassifier, ValueEmbedding, pool

OPTIONS = {
    "long_vq": {"codebook_size": 8, "chunk_size": 4},
    "mega": {"chunk_size": 4},
    "tcnca": {"chunk_size": 4, "kernel_size": 3, "dilation_factor": 2},
    "mamba2": {"head_dim": 8, "d_state": 8},
}


def tokens(*shape, seed=1, vocab=20):
    return torch.randint(1, vocab, shape, generator=torch.Generator().manual_seed(seed))


def small(mixer, **options):
    torch.manual_seed(0)
    choice = {"name": mixer, **OPTIONS.get(mixer, {})} if isinstance(mixer, str) else mixer
    model = create_model("classifier_tiny", num_classes=3, vocab_size=20, mixer=choice, dim=16, depth=2, **options)
    return model.eval().double()


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("mixer", list_mixers(pattern="self"))
def test_pads_and_other_rows_change_nothing(mixer, pooling):
    """Each row alone and unpadded, against all in one batch: pads left or right, filled with any token."""
    model = small(mixer, pooling=pooling)
    rows = [tokens(1, length, seed=length)[0] for length in (11, 5, 1)]
    with torch.no_grad():
        alone = torch.cat([model(row[None]).y for row in rows])
        for side in ("left", "right"):
            padded, mask = tokens(3, 13, seed=9), torch.zeros(3, 13, dtype=torch.bool)
            for i, row in enumerate(rows):
                part = slice(13 - len(row), 13) if side == "left" else slice(0, len(row))
                padded[i, part], mask[i, part] = row, True
            torch.testing.assert_close(model(padded, mask=mask).y, alone, atol=1e-10, rtol=0, msg=f"{mixer} {side}")


def test_pooling_by_hand():
    x = torch.tensor([[[1.0], [5.0], [3.0], [99.0]], [[-2.0], [99.0], [99.0], [99.0]], [[99.0]] * 4])
    mask = torch.tensor([[True, True, True, False], [True, False, False, False], [False] * 4])
    assert pool(x, mask, "mean").tolist() == [[3.0], [-2.0], [0.0]]
    assert pool(x, mask, "last").tolist() == [[3.0], [-2.0], [0.0]]
    assert pool(x, mask, "max").tolist() == [[5.0], [-2.0], [0.0]]
    left = torch.tensor([[False, True, True, False]] * 3)
    assert pool(x, left, "last")[0].tolist() == [3.0]
    full = torch.ones(3, 4, dtype=torch.bool)
    for how in POOLINGS:
        assert torch.equal(pool(x, None, how), pool(x, full, how))


def test_two_towers_read_each_document_with_one_encoder():
    """The head's input from two single towers of the same weights; the order of a pair counts."""
    pair, single = small("s4d", towers=2), small("s4d")
    single.embedding, single.backbone = pair.embedding, pair.backbone
    x = tokens(2, 2, 9)
    mask = torch.ones(2, 2, 9, dtype=torch.bool)
    mask[0, 1, 6:] = False
    with torch.no_grad():
        first, second = (single.embed(x[:, i], mask=mask[:, i]).y for i in (0, 1))
        joined = torch.cat((first, second, first * second, first - second), 1)
        torch.testing.assert_close(pair(x, mask=mask).y, pair.head(joined), atol=1e-12, rtol=0)
        assert not torch.allclose(pair(x.flip(1)).y, pair(x).y)
    assert [layer.in_features for layer in pair.head if isinstance(layer, torch.nn.Linear)] == [64, 16]


def test_values_are_normalised_numbers():
    embedding = ValueEmbedding(2, mean=0.48, std=0.24).double()
    with torch.no_grad():
        embedding.proj.weight.copy_(torch.tensor([[1.0], [2.0]]))
        embedding.proj.bias.copy_(torch.tensor([0.0, 1.0]))
    got = embedding(torch.tensor([[0, 255]]))
    want = torch.tensor([[[-2.0, -3.0], [0.52 / 0.24, 1 + 1.04 / 0.24]]], dtype=torch.float64)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    model = small("s4d", inputs="values")
    assert not any(isinstance(part, torch.nn.Embedding) for part in model.modules())
    assert model(tokens(2, 7)).y.shape == (2, 3)


def test_a_causal_classifier_reads_its_last_token():
    """The vector of a beginning is the whole sequence's at that place: nothing behind it has counted."""
    model = small("gla", causal=True, pooling="last")
    x = tokens(1, 9)
    with torch.no_grad():
        whole = model.backbone(model.embedding(x)).y
        torch.testing.assert_close(model.embed(x[:, :6]).y, whole[:, 5], atol=1e-10, rtol=0)
        assert not torch.allclose(whole[:, 5], whole[:, 4])


@pytest.mark.parametrize("name", [n for n in list_models(task="documents") if n.endswith("_tiny")])
def test_the_zoo_trains_saves_and_loads(name, tmp_path):
    model = create_model(name, num_classes=4, head_dim=8)
    x = tokens(3, 21)
    torch.nn.functional.cross_entropy(model(x).y, torch.tensor([0, 1, 3])).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not bool((p.grad != 0).any())] == []
    again = load_model(save_model(model, tmp_path / "model"))
    assert torch.equal(again.eval()(x).y, model.eval()(x).y)


def test_auxiliary_losses_come_out():
    assert "commitment" in " ".join(small("long_vq").train()(tokens(2, 8)).aux)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "average"}, "pooling='average' is not a choice"),
        ({"inputs": "value"}, "inputs='value' is not a choice. Did you mean values"),
        ({"towers": 3}, "towers=3 must be 1"),
        ({"num_classes": 0}, "num_classes=0 must be a positive integer"),
        ({"inputs": "values", "value_std": 0.0}, "value_std=0.0 must be positive"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SequenceClassifier(**options)


def test_bad_inputs_are_refused():
    with pytest.raises(ValueError, match=r"tokens have shape \(2, 5\), expected \(B, 2, L\)"):
        small("s4d", towers=2)(tokens(2, 5))
    with pytest.raises(ValueError, match=r"mask has shape \(2, 4\), tokens \(2, 5\)"):
        small("s4d")(tokens(2, 5), mask=torch.ones(2, 4, dtype=torch.bool))
