"""LongVQ: the layer by hand, its limits, gates, losses, codebook in training, states."""

import pytest
import torch
from torch.nn import functional as F

from seqzoo.blocks.backbone import Backbone
from seqzoo.blocks.block import Block
from seqzoo.blocks.mixers.long_vq import LongVQ, LongVQState
from seqzoo.blocks.mixers.s4d import S4D
from seqzoo.blocks.parameters import parameter_groups
from seqzoo.blocks.protocol import state_elements
from seqzoo.blocks.registry import create_mixer, mixer_info

torch.set_num_threads(1)
D, Z, V = 6, 4, 8


def build(**options):
    torch.manual_seed(0)
    small = {"z_dim": Z, "hidden_dim": V, "codebook_size": 5, "chunk_size": 3, "d_state": 2}
    mixer = LongVQ(D, dtype=torch.float64, **{**small, **options}).eval()
    with torch.no_grad():
        for parameter in mixer.parameters():  # a bias that starts at 0 would hide what passes through it
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer


def sequence(batch, length, seed=1):
    return torch.randn(batch, length, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(got, want, atol=1e-12):
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


def average(ema, x, direction):
    """The damped moving average of one direction, step after step."""
    p, a = (getattr(ema, name)[direction].sigmoid() for name in ("delta", "alpha"))
    h, outputs = torch.zeros(len(x), *p.shape, dtype=x.dtype), []
    for t in range(x.shape[1]):
        h = (1 - p * a) * h + p * ema.beta[direction] * x[:, t, :, None]
        outputs.append((h * ema.gamma[direction]).sum(-1) * ema.d_state**-0.5)
    return torch.stack(outputs, 1)


def by_hand(mixer, x, residual, quantize=True):
    """The causal or two-sided layer, token by token, from its parameters."""
    gated, attention, heads = mixer.gated, mixer.attention, mixer.attention.num_heads
    m = average(mixer.memory, x, 0) + mixer.memory.omega * x
    if not mixer.causal:
        m = m + average(mixer.memory, x.flip(1), 1).flip(1)
    u, z, r, h = gated.mx_proj(F.silu(m)).split((D, Z, V, D), -1)
    z, r, v = F.silu(z), F.silu(r), F.silu(gated.v_proj(x)).unflatten(-1, (heads, -1))
    q, k = ((z * gated.qk_weight[i] + gated.qk_bias[i]).unflatten(-1, (heads, -1)) for i in (0, 1))
    q, k = (t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (Z // heads) ** -0.25 for t in (q, k))
    if quantize:
        book = attention.quantizer.codebook()
        distance = (k.unsqueeze(3) - book).square().sum(-1)
        k = book[torch.arange(heads), distance.argmin(-1)]
    chunk, length, rows = attention.chunk_size, x.shape[1], []
    for i in range(length):
        past = range(i + 1) if mixer.causal else range(length)
        scores = []
        for j in past:
            score = (q[:, i] * k[:, j]).sum(-1)
            if abs(i // chunk - j // chunk) <= 1:
                score = score + attention.bias[:, i - j if mixer.causal else i - j + 2 * chunk - 1]
            scores.append(score)
        weight = torch.stack(scores, -1).softmax(-1)
        rows.append(torch.einsum("bhj,bjhv->bhv", weight, v[:, : len(scores)]).flatten(1))
    new = F.silu(h + gated.h_proj(r * torch.stack(rows, 1)))
    return u.sigmoid() * (new - residual)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("heads", [1, 2])
def test_the_layer_token_by_token(causal, quantize, heads):
    mixer, x, before = build(causal=causal, quantize=quantize, num_heads=heads), sequence(2, 17), sequence(2, 17, 2)
    close(mixer(x, residual=before).y, by_hand(mixer, x, before, quantize))
    close(mixer(x).y, by_hand(mixer, x, x, quantize))


@pytest.mark.parametrize("causal", [True, False])
def test_a_codebook_that_holds_the_keys_is_exact_attention(causal):
    exact, quantized = build(causal=causal, quantize=False), build(causal=causal, codebook_size=20)
    missing = quantized.load_state_dict(exact.state_dict(), strict=False)
    assert not missing.unexpected_keys and all("quantizer" in name for name in missing.missing_keys)
    x = sequence(1, 20)
    keys = []
    hook = quantized.attention.quantizer.register_forward_pre_hook(lambda _, args: keys.append(args[0]))
    rough = quantized(x).y
    hook.remove()
    quantized.attention.quantizer.sum.copy_(keys[0][0].movedim(1, 0).detach())
    close(quantized(x).y, exact(x).y, 1e-10)
    assert (rough - exact(x).y).abs().max() > 1e-4


@pytest.mark.parametrize("causal", [True, False])
def test_cross_attends_to_the_codewords_of_the_context(causal):
    mixer = build(cross=True, causal=causal, num_heads=2)
    x, context, before = sequence(2, 5), sequence(2, 9, 3), sequence(2, 5, 4)
    gated, book = mixer.gated, mixer.attention.quantizer.codebook()
    u, r, q = gated.q_proj(x).split((D, D, Z), -1)
    q, k = (t.unflatten(-1, (2, 2)) for t in (q, gated.k_proj(context)))
    q, k = (t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() * 2**-0.25 for t in (q, k))
    code = (k.unsqueeze(3) - book).square().sum(-1).argmin(-1)
    weight = torch.einsum("blhk,bshk->bhls", q, book[torch.arange(2), code]).softmax(-1)
    o = torch.einsum("bhls,bshv->blhv", weight, F.silu(gated.v_proj(context)).unflatten(-1, (2, -1))).flatten(2)
    want = u.sigmoid() * (F.silu(gated.h_proj(o * F.silu(r))) - before)
    out = mixer(x, context, residual=before)
    close(out.y, want)
    # A key reaches the output by its codeword alone: its map learns from the commitment loss only.
    parameter = gated.k_proj.weight
    assert (torch.autograd.grad(out.y.sum(), parameter, allow_unused=True, retain_graph=True)[0] is None) or (
        torch.autograd.grad(out.y.sum(), parameter, retain_graph=True)[0] == 0
    ).all()
    assert (torch.autograd.grad(out.aux["commitment"], parameter)[0] != 0).any()


def test_a_block_gates_against_its_own_input():
    mixer = build(causal=True)
    block, x = Block(D, mixer, None).double().eval(), 3 + sequence(2, 8)
    close(block(x).y, x + by_hand(mixer, block.norm_mixer(x), x))
    with torch.no_grad():
        mixer.gated.mx_proj.bias[:D] = -1e3  # the gate is shut: the residual stream passes
    close(block(x).y, x)


def test_the_commitment_loss_has_its_weight_and_knows_no_pads():
    light, heavy, x = build(commitment_weight=1e-4), build(commitment_weight=2.0), sequence(3, 9)
    close(light(x).aux["commitment"] * 2e4, heavy(x).aux["commitment"])
    mask = torch.arange(9) < torch.tensor([[9], [4], [0]])
    noise = torch.where(mask[..., None], x, 1e3)
    error = [heavy(x[:1]).aux["commitment"] * 9, heavy(x[1:2, :4]).aux["commitment"] * 4]
    close(heavy(noise, mask=mask).aux["commitment"], sum(error) / 13)
    assert build(quantize=False)(x).aux == {}


def test_the_codebook_learns_in_training_only_and_then_every_form_agrees():
    mixer, x = build(causal=True, decay=0.5, kmeans_init=True), sequence(2, 23)
    quantizer = mixer.attention.quantizer
    for step in range(3):
        mixer.train()(sequence(4, 23, seed=step))
    assert int(quantizer.updates) == 3
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    mixer.eval()
    whole, state, parts = mixer(x).y, mixer.init_state(2), []
    for part in x.split([9, 1, 1, 12], 1):
        y, state, _ = mixer(part, state=state)
        parts.append(y)
    close(torch.cat(parts, 1), whole, 1e-11)
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


def test_checkpointed_blocks_train_as_others():
    options = {"name": "long_vq", "z_dim": 4, "hidden_dim": 8, "codebook_size": 5, "chunk_size": 3, "decay": 0.5}
    models = []
    for again in (False, True):
        torch.manual_seed(0)
        model = Backbone(D, 2, mixer=options, causal=True, proj_drop=0.3).double().train()
        model.set_grad_checkpointing(again)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            torch.manual_seed(step)
            out = model(sequence(2, 13, seed=step))
            optimizer.zero_grad()
            (out.y.square().sum() + sum(out.aux.values())).backward()
            optimizer.step()
        models.append(model.state_dict())
    assert int(models[1]["blocks.1.mixer.gated.attention.quantizer.updates"]) == 3
    for name, value in models[0].items():
        close(models[1][name], value)


@pytest.mark.parametrize("memory", ["ema", "s4d"])
@pytest.mark.parametrize("quantize", [True, False])
def test_state_size(memory, quantize):
    mixer = build(causal=True, memory=memory, quantize=quantize, num_heads=2)
    held = 5 * (V + 2) + 5 * (Z + V)  # S (d_v + H) and 2 C - 1 tokens
    for length in (1, 7, 30):
        state = mixer(sequence(2, length), state=mixer.init_state(2)).state
        want = 2 * D + (held if quantize else length * (Z + V))
        assert state_elements(state) == mixer.state_size(length) == want
    assert isinstance(state, LongVQState)


def test_the_s4d_memory_is_the_layer_without_its_output_map():
    mixer, x = build(causal=True, memory="s4d", d_state=4), sequence(2, 10)
    assert isinstance(mixer.memory, S4D)
    seen = []
    hook = mixer.gated.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    mixer(x)
    hook.remove()
    convolved, _ = mixer.memory._convolve(x, None, None)
    close(seen[0], F.silu(convolved))


def test_every_parameter_is_in_one_group_and_the_codebook_in_none():
    mixer = build(causal=True, memory="s4d", d_state=4)
    groups = parameter_groups(mixer, lr=1.0, weight_decay=0.1)
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in mixer.parameters())
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay[id(mixer.attention.bias)] == 0 and decay[id(mixer.gated.h_proj.weight)] == 0.1
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rates[id(mixer.memory.log_dt)] == 1e-3
    assert {"sum", "count", "updates"} == {n.split(".")[-1] for n, _ in mixer.named_buffers() if "quantizer" in n}


def test_keys_stay_apart_while_training():
    """With the gains and weights of MEGA's start, a few steps make all keys one."""
    torch.manual_seed(0)
    model = Backbone(16, 1, mixer={"name": "long_vq", "codebook_size": 32, "chunk_size": 8}, causal=True)
    table = torch.randn(32, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        token = torch.randint(0, 32, (16, 33))
        out = model(table[token[:, :-1]])
        loss = (out.y - table[token[:, 1:]]).square().mean() + sum(out.aux.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.blocks[0].mixer.attention.quantizer.perplexity() > 6


def test_bf16_autocast_stays_finite_in_training():
    torch.manual_seed(0)
    model = Backbone(16, 1, mixer={"name": "long_vq", "codebook_size": 16, "chunk_size": 4}, causal=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(50):
        x = torch.randn(4, 24, 16)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
            loss = (out.y[:, 1:] - x[:, :-1]).float().square().mean() + sum(out.aux.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.isfinite(), step
    assert all(t.isfinite().all() for t in model.state_dict().values())


def test_defaults():
    mixer = LongVQ(64, causal=True)
    assert (mixer.attention.z_dim, mixer.value_dim, mixer.attention.chunk_size) == (32, 128, 64)
    quantizer = mixer.attention.quantizer
    assert (quantizer.codebook_size, quantizer.decay, mixer.attention.commitment_weight) == (256, 0.99, 1e-4)
    assert (quantizer.count == 1).all() and abs(quantizer.sum.std() * 16 - 1) < 0.05
    # 64 x 128 + 128 of values, 64 x 288 + 288 of what follows the average, 128 x 64 + 64 of h, the maps of z, the bias,
    # four tables of 64 x 16 and omega
    assert sum(p.numel() for p in mixer.parameters()) == 8320 + 18720 + 8256 + 128 + 128 + 4096 + 64
    assert mixer_info("long_vq").origin == "reconstruction"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "s4"}, "Did you mean s4d"),
        ({"z_dim": 0}, "z_dim=0"),
        ({"hidden_dim": 9, "num_heads": 2}, "num_heads=2 does not divide hidden_dim=9"),
        ({"num_heads": 3}, "num_heads=3 does not divide z_dim=4"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"codebook_size": 0}, "codebook_size=0"),
        ({"commitment_weight": -1.0}, "commitment_weight=-1.0"),
        ({"decay": 0.0}, "decay=0.0"),
        ({"reduction": "max"}, "reduction='max'"),
        ({"backend": "flash"}, "backend='flash' is unknown"),
        ({"d_state": 0}, "d_state=0"),
        ({"drop": 1.0}, "1.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_bad_inputs():
    mixer, x = build(causal=True), sequence(2, 5)
    with pytest.raises(ValueError, match="state is a S4DState, expected the LongVQState"):
        mixer(x, state=create_mixer("s4d", D, causal=True).init_state(2))
    with pytest.raises(ValueError, match="state is of 3 rows, but there are 2"):
        mixer(x, state=mixer.init_state(3))
    with pytest.raises(ValueError, match="initial_state has shapes"):
        mixer(x, state=build(causal=True, chunk_size=4).init_state(2))
    with pytest.raises(ValueError, match=r"residual has shape \(2, 4, 6\)"):
        mixer(x, residual=x[:, 1:])
    with pytest.raises(ValueError, match="needs a context"):
        build(cross=True)(x)
    for other in (build(), build(cross=True, causal=True)):
        with pytest.raises(ValueError, match="carries no state"):
            other.init_state(1)
        with pytest.raises(ValueError, match="carries no state"):
            other.state_size(1)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_projections_before_a_norm_start_wide(cross, qk_norm):
    """With qk_norm keys and queries start from N(0, 1 / D), and scales from N(0, 1); the rest from N(0, 0.02^2)."""
    torch.manual_seed(0)
    dim, z = 128, 64
    gated = LongVQ(dim, cross=cross, qk_norm=qk_norm).gated
    if cross:
        rows, rest = (gated.k_proj.weight, gated.q_proj.weight[-z:]), [gated.q_proj.weight[:-z]]
    else:
        weight = gated.mx_proj.weight
        rows, rest = [weight[dim : dim + z]], [weight[:dim], weight[dim + z :]]
        assert gated.qk_weight.std().item() == pytest.approx(1.0 if qk_norm else 0.02, rel=0.2)
    for part in rows:
        assert part.std().item() == pytest.approx(dim**-0.5 if qk_norm else 0.02, rel=0.1)
    for part in rest:
        assert part.std().item() == pytest.approx(0.02, rel=0.1)
