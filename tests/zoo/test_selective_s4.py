"""Selective S4: ViS4mer when all is kept, order, the straight-through gradient, the momentum copy, and LSMCL."""

import math

import numpy as np
import pytest
import torch

from seqzoo.zoo import create_model, load_model, save_model
from seqzoo.zoo.selective_s4 import (
    LongShortContrast,
    long_short_loss,
    random_tokens,
    top_in_order,
    update_momentum,
)

SMALL = {"encoder": {"name": "features", "dim": 16}, "dim": 16, "d_state": 4, "num_classes": 3}


def small(name="selective_s4_tiny", **options):
    torch.manual_seed(0)
    return create_model(name, **{**SMALL, **options}).double()


@pytest.mark.parametrize("training", [False, True])
def test_keeping_all_is_vis4mer_bit_for_bit(training):
    plain, selective = small("vis4mer_tiny").train(training), small(keep_ratio=1.0).train(training)
    assert list(plain.state_dict()) == list(selective.state_dict())
    x = torch.randn(2, 13, 16, dtype=torch.float64)
    mask = torch.arange(13) < torch.tensor([[13], [6]])
    for given in ((x,), (x, mask)):
        found = []
        for model in (plain, selective):
            model.zero_grad()
            torch.manual_seed(1)  # the same dropout
            y = model(*given).y
            y.square().sum().backward()
            found.append([y, *(p.grad for p in model.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_kept_are_the_largest_in_their_order():
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.9, 0.5, 0.2], [0.5, 0.5, 0.5, 0.5, 0.5, 0.5]])
    assert top_in_order(scores, None, 0.5)[0].tolist() == [[1, 3, 4], [0, 1, 2]]
    assert top_in_order(scores, None, 0.51)[0].tolist() == [[1, 2, 3, 4], [0, 1, 2, 3]]
    mask = torch.tensor([[True, False, True, True, True, True], [True, True, False, False, False, False]])
    places, real = top_in_order(scores, mask, 0.5)
    assert places[0].tolist() == [2, 3, 4] and real.tolist() == [[True, True, True], [True, False, False]]
    assert places[1, 0] == 0
    assert top_in_order(torch.zeros(1, 25), None, 0.28)[0].shape == (1, 7)  # 0.28 * 25 is a little more than 7


def test_the_stages_read_the_gathered_tokens():
    model = small(keep_ratio=0.4).eval()
    torch.nn.init.normal_(model.stages[0].mixer.d)  # the copy is not what it was copied from
    x = torch.randn(2, 10, 16, dtype=torch.float64)
    kept = model.select(x)
    assert kept.x.shape == (2, 4, 16) and (kept.places.diff() > 0).all()
    for row in range(2):
        assert torch.equal(kept.x[row], x[row, kept.places[row]])
    # the answer is ViS4mer's of these tokens alone
    plain = small("vis4mer_tiny").eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in plain.state_dict()})
    torch.testing.assert_close(model(x).y, plain(kept.x).y, atol=1e-12, rtol=0)
    # places are those of the largest keep probabilities of what the momentum copy sees
    f = x + model.momentum_mixer(model.momentum_norm(x)).y
    u = model.mask_generator.local(model.mask_generator.norm(f))
    logits = model.mask_generator.out(torch.cat((u, u.mean(1, keepdim=True).expand_as(u)), -1))
    want = (logits[..., 0] - logits[..., 1]).topk(4).indices.sort().values
    assert torch.equal(kept.places, want)


def test_pads_and_other_rows_change_nothing():
    model = small(keep_ratio=0.5).eval()
    x = torch.randn(3, 11, 16, dtype=torch.float64)
    lengths = [11, 6, 1]
    mask = torch.arange(11) < torch.tensor(lengths).unsqueeze(1)
    y = model(x.masked_fill(~mask.unsqueeze(-1), float("nan")), mask).y
    for row, n in enumerate(lengths):
        torch.testing.assert_close(y[row], model(x[row : row + 1, :n]).y[0], atol=1e-12, rtol=0)


def test_the_generator_reads_a_token_and_the_mean_of_the_real_ones():
    generator = small(keep_ratio=0.5).mask_generator
    f, mask = torch.randn(1, 7, 16, dtype=torch.float64), torch.arange(7).unsqueeze(0) < 4
    torch.testing.assert_close(generator(f, mask)[:, :4], generator(f[:, :4]), atol=1e-12, rtol=0)


def test_the_gradient_reaches_the_generator_straight_through_only():
    model = small(keep_ratio=0.5, drop=0.0).train()
    x = torch.randn(2, 8, 16, dtype=torch.float64)
    weight = torch.randn(2, 4, 16, dtype=torch.float64)

    def grads(change):
        model.zero_grad()
        torch.manual_seed(2)
        kept = model.select(x)
        assert torch.equal(kept.x, x.gather(1, kept.places.unsqueeze(-1).expand(-1, -1, 16)))  # values as they are
        (change(kept.x) * weight).sum().backward()
        return kept, {k: p.grad for k, p in model.named_parameters()}

    kept, found = grads(lambda y: y)
    generator = {k: g for k, g in found.items() if k.startswith("mask_generator.")}
    assert all(g is not None and g.any() for g in generator.values())
    assert all(g is None for k, g in found.items() if not k.startswith("mask_generator."))
    # it is that of sum_k p_k <x_k, w_k>, and of nothing else
    model.zero_grad()
    torch.manual_seed(2)
    with torch.no_grad():
        f = x + model.momentum_mixer(model.momentum_norm(x)).y
    logits = model.mask_generator(f)
    p = (logits - torch.empty_like(logits).exponential_().log()).softmax(-1)[..., 0].gather(1, kept.places)
    (p * (kept.x.detach() * weight).sum(-1)).sum().backward()
    for key, grad in generator.items():
        torch.testing.assert_close(grad, dict(model.named_parameters())[key].grad, atol=1e-12, rtol=1e-9)
    # nor do the tokens get any but their own: the copy that chooses hands none on
    given = x.clone().requires_grad_()
    torch.manual_seed(2)
    (model.select(given).x * weight).sum().backward()
    own = torch.zeros_like(x).scatter_(1, kept.places.unsqueeze(-1).expand(-1, -1, 16), weight)
    torch.testing.assert_close(given.grad, own, atol=1e-12, rtol=0)
    # without the values of the tokens there is nothing to learn from
    _, cut = grads(lambda y: y.detach() + 0 * y)
    assert not any(g.any() for k, g in cut.items() if k in generator)


def test_noise_in_training_only():
    model = small(keep_ratio=0.5)
    x = torch.randn(4, 40, 16, dtype=torch.float64)
    model.train()
    assert not torch.equal(model.select(x).places, model.select(x).places)
    model.eval()
    assert torch.equal(model.select(x).places, model.select(x).places)


def test_gumbel_noise_chooses_with_the_probabilities_of_the_logits():
    """With one token of two kept, it is the first with the chance that its noisy score is the larger one."""
    model = small(keep_ratio=0.5).train()
    x = torch.randn(1, 2, 16, dtype=torch.float64).expand(20000, 2, 16)
    model.momentum = 1.0
    with torch.no_grad():
        share = float((model.select(x).places == 0).double().mean())
        logits = model.mask_generator(x[:1] + model.momentum_mixer(model.momentum_norm(x[:1])).y)[0]
    # the difference of two Gumbel variables is logistic; compare two of them by drawing
    rng = np.random.default_rng(0)
    gap = (logits[:, 0] - logits[:, 1]).numpy()
    want = (gap[0] + rng.logistic(size=200000) > gap[1] + rng.logistic(size=200000)).mean()
    assert abs(share - want) < 0.02


def test_the_momentum_copy_follows_as_a_loop_does():
    model = small(keep_ratio=0.5, momentum=0.9).train()
    copy = {k: v.clone() for k, v in model.momentum_mixer.state_dict().items()}
    for key, value in model.stages[0].mixer.state_dict().items():
        assert torch.equal(copy[key], value)
    assert not any(p.requires_grad for p in model.momentum_mixer.parameters())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    for _ in range(3):
        source = {k: v.clone() for k, v in model.stages[0].mixer.state_dict().items()}
        optimizer.zero_grad()
        model(x).y.square().sum().backward()
        for key, value in copy.items():
            flat, new = value.flatten(), source[key].flatten()
            for i in range(len(flat)):
                flat[i] = 0.9 * flat[i] + 0.1 * new[i]
        optimizer.step()
        for key, value in model.momentum_mixer.state_dict().items():
            torch.testing.assert_close(value, copy[key], atol=1e-12, rtol=1e-9)
    before = {k: v.clone() for k, v in model.momentum_mixer.state_dict().items()}
    model.eval()(x)  # evaluation changes nothing
    assert all(torch.equal(v, before[k]) for k, v in model.momentum_mixer.state_dict().items())
    norm = torch.nn.BatchNorm1d(2)
    norm.running_mean += 5
    other = torch.nn.BatchNorm1d(2)
    update_momentum(other, norm, 0.5)
    assert torch.equal(other.running_mean, norm.running_mean)  # buffers are copied


def test_every_parameter_learns_and_a_saved_model_loads(tmp_path):
    torch.manual_seed(0)
    model = create_model("selective_s4_tiny", **{**SMALL, "encoder": {"name": "features", "dim": 9}}).train()
    x = torch.randn(2, 9, 9)
    model(x).y.square().sum().backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.any(), key
        else:
            assert key.startswith("momentum_")
    save_model(model.eval(), tmp_path)
    assert torch.equal(load_model(tmp_path)(x).y, model(x).y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_ratio": 0.0}, "keep_ratio=0.0"),
        ({"keep_ratio": 1.5}, "keep_ratio=1.5"),
        ({"momentum": -0.1}, "momentum=-0.1"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"mask_dim": 0}, "mask_dim=0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)
    with pytest.raises(ValueError, match="nothing to select"):
        small(keep_ratio=1.0).select(torch.zeros(1, 4, 16, dtype=torch.float64))


# LSMCL ----------------------------------------------------------------------------------------------------------------


def unit(batch, width=6, seed=0):
    x = np.random.default_rng(seed).normal(size=(batch, width))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_the_loss_is_info_nce_in_numpy_and_symmetric():
    vectors = [unit(5, seed=i) for i in range(4)]
    long_q, short_q, long_k, short_k = vectors
    total = 0.0
    for queries, keys in ((short_q, long_k), (long_q, short_k)):
        for b in range(5):
            weights = np.exp(keys @ queries[b] / 0.2)
            total += -np.log(weights[b] / weights.sum()) / 5
    tensors = [torch.from_numpy(v) for v in vectors]
    loss = long_short_loss(*tensors, 0.2)
    assert math.isclose(float(loss), total / 2, rel_tol=1e-12)
    swapped = long_short_loss(tensors[1], tensors[0], tensors[3], tensors[2], 0.2)
    assert math.isclose(float(loss), float(swapped), rel_tol=1e-12)  # long and short change places
    order = torch.tensor([3, 1, 4, 0, 2])
    assert math.isclose(float(long_short_loss(*(t[order] for t in tensors), 0.2)), float(loss), rel_tol=1e-12)
    assert float(long_short_loss(*(t[:1] for t in tensors), 0.2)) == 0.0  # no negatives
    same = torch.from_numpy(unit(5, width=40))
    assert float(long_short_loss(same, same, same, same, 0.01)) < 1e-6


def test_at_a_random_start_the_loss_is_the_log_of_the_batch():
    torch.manual_seed(0)
    model = create_model("vis4mer_tiny", **{**SMALL, "dim": 64})
    contrast = LongShortContrast(model, 8).train()
    long, short = torch.randn(32, 24, 16), torch.randn(32, 9, 16)
    loss, _ = contrast(long, short)
    assert abs(float(loss.detach()) - math.log(32)) < 0.05


def test_masks_leave_out_a_share_of_real_frames():
    frames = torch.zeros(200, 20, 1)
    mask = torch.arange(20) < torch.tensor([20, 8] * 100).unsqueeze(1)
    kept = random_tokens(frames, mask, (0.25, 0.5), torch.Generator().manual_seed(0))
    assert not (kept & ~mask).any()
    for n, rows in ((20, kept[::2]), (8, kept[1::2])):
        counts = rows.sum(1)
        assert counts.min() == n // 2 and counts.max() == round(0.75 * n)
    assert (kept[::2, :20].float().mean(0) - 0.625).abs().max() < 0.2  # anywhere
    assert random_tokens(frames, None, (0.0, 0.0)).all()
    one = random_tokens(frames, torch.arange(20) < 1 + torch.zeros(200, 1), (0.9, 0.95))
    assert (one.sum(1) == 1).all()
    again = random_tokens(frames, mask, (0.25, 0.5), torch.Generator().manual_seed(0))
    assert torch.equal(kept, again)


def test_contrast_learns_and_its_keys_do_not():
    torch.manual_seed(0)
    model = create_model("selective_s4_tiny", **SMALL)
    contrast = LongShortContrast(model, 2, momentum=0.5).train()
    assert not contrast.momentum_model.training and contrast.model.training
    start = {k: v.clone() for k, v in contrast.momentum_projector.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in contrast.parameters() if p.requires_grad], lr=0.5)
    long, short = torch.randn(4, 12, 16), torch.randn(4, 6, 16)
    for step in range(2):
        source = {k: v.clone() for k, v in contrast.projector.state_dict().items()}
        loss, found = contrast(long, short)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        start = {k: 0.5 * v + 0.5 * source[k] for k, v in start.items()}
        for key, value in contrast.momentum_projector.state_dict().items():
            torch.testing.assert_close(value, start[key], msg=f"{step} {key}")
    assert 0 <= found["right"] <= 1
    for key, parameter in contrast.named_parameters():
        assert (parameter.grad is None) == key.startswith(("momentum_", "model.momentum_", "model.head")), key
    for options in ({"temperature": 0.0}, {"mask_ratio": (0.5, 0.2)}, {"mask_ratio": (0.5, 1.0)}):
        with pytest.raises(ValueError, match=next(iter(options))):
            LongShortContrast(model, 2, **options)
