"""Language models: published counts, decoding, pads and packing, saving, and transformers' own with copied weights."""

import copy

import pytest
import torch

from seqzoo.zoo import create_model, list_models, load_model, save_model
from seqzoo.zoo._language import LanguageModel

MAMBAS = ("mamba_tiny", "mamba2_tiny")


def tokens(batch, length, vocab=256, seed=1):
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "count"), [("mamba_base", 129_135_360), ("mamba2_base", 128_989_632)])
def test_published_parameter_counts(name, count):
    """mamba-130m and mamba2-130m, whose tied head counts once."""
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("name", [n for n in list_models(task="text") if n.endswith("_tiny")])
def test_a_text_model(name):
    """Logits, a gradient in every parameter, and, where there is a state, a stream that equals the whole."""
    model, x = create_model(name), tokens(2, 13)
    out = model(x)
    assert out.y.shape == (2, 13, 256) and out.state is None
    torch.nn.functional.cross_entropy(out.y[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not bool((p.grad != 0).any())] == []
    model, parts = model.eval().double(), []
    if not model.backbone.streaming:
        with pytest.raises(ValueError, match="carries no state"):
            model.init_state(2)
        return
    state = model.init_state(2, dtype=torch.float64)
    for part in x.split([6, 1, 1, 5], 1):
        y, state, _ = model(part, state=state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), model(x).y, atol=1e-10, rtol=0)
    assert bool((state.position == 13).all())
    assert model.state_size(13) == model.backbone.state_size(13) > 0


@pytest.mark.parametrize("name", MAMBAS)
def test_pads_and_packing(name):
    model = create_model(name, dim=32, depth=2).eval().double()
    rows = [tokens(1, 9)[0], tokens(1, 4, seed=2)[0]]
    alone = [model(row[None]).y[0] for row in rows]
    padded, mask = torch.zeros(2, 9, dtype=torch.int64), torch.zeros(2, 9, dtype=torch.bool)
    for i, row in enumerate(rows):
        padded[i, 9 - len(row) :], mask[i, 9 - len(row) :] = row, True
    y = model(padded, mask=mask).y
    packed = model(torch.cat(rows)[None], cu_seqlens=torch.tensor([0, 9, 13], dtype=torch.int32)).y[0]
    for i, (row, want) in enumerate(zip(rows, alone, strict=True)):
        torch.testing.assert_close(y[i, mask[i]], want, atol=1e-10, rtol=0)
        torch.testing.assert_close(packed[9 * i : 9 * i + len(row)], want, atol=1e-10, rtol=0)


def test_the_head_is_tied_or_not():
    tied, loose = (create_model("mamba_tiny", tie_embeddings=t) for t in (True, False))
    extra = set(loose.state_dict()) - set(tied.state_dict())
    assert extra == {"model.head.proj.weight"}
    x = tokens(1, 5)
    with torch.no_grad():
        before = tied(x).y
        tied.model.embedding.weight.mul_(2)
    features = tied.model.forward_features(x).y
    torch.testing.assert_close(tied(x).y, features @ tied.model.embedding.weight.T)
    assert not torch.equal(tied(x).y, before)
    again = copy.deepcopy(tied)  # the copy's head reads the copy's table
    with torch.no_grad():
        again.model.embedding.weight.zero_()
    assert bool((again(x).y == 0).all()) and not bool((tied(x).y == 0).any())


def test_residual_branches_start_smaller():
    """By the root of their number: 4 here, 8 with feed-forwards."""
    for ffn, branches in (("none", 4), ("swiglu", 8)):
        plain, scaled = [], []
        for rescale, found in ((False, plain), (True, scaled)):
            torch.manual_seed(3)
            model = create_model("mamba_tiny", ffn=ffn, rescale_residual=rescale)
            for block in model.backbone.blocks:
                found += [block.mixer.out_proj.weight, block.mixer.in_proj.weight]
                found += [] if block.ffn is None else [block.ffn.down_proj.weight]
        ratio = [(a / b).mean().item() for a, b in zip(plain, scaled, strict=True)]
        per_block = [branches**0.5, 1.0, *([branches**0.5] if ffn != "none" else [])]
        assert ratio == pytest.approx(per_block * 4, rel=1e-5)


def test_saving_and_loading(tmp_path):
    hybrid = ["mamba", {"name": "softmax", "num_heads": 4}]
    model, x = create_model("mamba_tiny", mixer=hybrid, ffn="swiglu").eval(), tokens(2, 7)
    again = load_model(save_model(model, tmp_path / "model"))
    assert torch.equal(again(x).y, model(x).y)
    state = again.init_state(2)
    parts = [again(x[:, :3], state=state)]
    parts.append(again(x[:, 3:], state=parts[0].state))
    torch.testing.assert_close(torch.cat([p.y for p in parts], 1), model(x).y, atol=1e-5, rtol=0)


def test_masked_language_models_see_both_sides():
    model, x = create_model("mamba_tiny", causal=False).eval(), tokens(1, 9)
    changed = x.clone()
    changed[0, -1] = (x[0, -1] + 1) % 256
    assert not torch.equal(model(changed).y[0, 0], model(x).y[0, 0])
    with pytest.raises(ValueError, match="carries no state"):
        model.init_state(1)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(2, 5), r"tokens are torch.float32 \(2, 5\), expected int64"),
        (torch.zeros(5, dtype=torch.int64), r"tokens are torch.int64 \(5,\)"),
    ],
)
def test_what_is_no_tokens_is_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        create_model("mamba_tiny")(bad)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="vocab_size=0 must be a positive integer"):
        LanguageModel(vocab_size=0)
    with pytest.raises(ValueError, match=r"unknown mixer 'mambo'\. Did you mean mamba"):
        create_model("mamba_tiny", mixer="mambo")


def renamed(theirs):
    """The state dict of transformers' Mamba and Mamba-2 language models under our names."""
    names = {"conv1d.weight": "scan.conv.weight", "conv1d.bias": "scan.conv.bias", "A_log": "scan.a_log"}
    names |= {"D": "scan.d", "dt_bias": "scan.dt_bias", "x_proj.weight": "scan.x_proj.weight"}
    names |= {f"dt_proj.{k}": f"scan.dt_proj.{k}" for k in ("weight", "bias")}
    ours = {}
    for key, value in theirs.items():
        _, _, key = key.partition("backbone.")
        if key.startswith("layers."):
            _, layer, part, rest = key.split(".", 3)
            rest = f"norm_mixer.{rest}" if part == "norm" else f"mixer.{names.get(rest, rest)}"
            ours[f"model.backbone.blocks.{layer}.{rest}"] = value
        elif key:  # lm_head is the embedding
            new = {"embeddings.weight": "embedding.weight", "norm_f.weight": "backbone.norm.weight"}[key]
            ours[f"model.{new}"] = value
    return ours


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_transformers_language_model(family):
    """Logits of the whole and, decoding one token after another, of every step."""
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 16, "tie_word_embeddings": True}
    if family == "mamba":
        theirs, mixer = transformers.MambaForCausalLM(transformers.MambaConfig(**shape)), "mamba"
    else:
        config = transformers.Mamba2Config(**shape, num_heads=4, head_dim=16, n_groups=2, chunk_size=8)
        theirs = transformers.Mamba2ForCausalLM(config)
        mixer = {"name": "mamba2", "head_dim": 16, "num_groups": 2, "d_state": 16}
    ours = create_model(f"{family}_tiny", dim=32, depth=2, vocab_size=64, mixer=mixer).eval()
    x = tokens(2, 20, 64)
    with torch.no_grad():
        for parameter in theirs.parameters():  # away from a start at which the layers hardly matter
            parameter.add_(0.1 * torch.randn_like(parameter))
        ours.load_state_dict(renamed(theirs.eval().state_dict()))
        want = theirs(x).logits
        torch.testing.assert_close(ours(x).y, want, atol=1e-5, rtol=1e-5)
        cache, state = None, ours.init_state(2)
        for t in range(6):
            step = theirs(x[:, t : t + 1], cache_params=cache, use_cache=True)
            cache = step.cache_params
            got, state, _ = ours(x[:, t : t + 1], state=state)
            torch.testing.assert_close(got, step.logits, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(got[:, 0], want[:, t], atol=1e-5, rtol=1e-5)
