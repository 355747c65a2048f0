"""The codebook: nearest codewords, straight-through gradients, running averages, resuming, several processes."""

import copy
import io
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from seqzoo.blocks.layers import vector_quantizer
from seqzoo.blocks.layers.vector_quantizer import VectorQuantizer

torch.set_num_threads(1)
H, K, M = 2, 3, 5


def build(size=M, seed=0, **options):
    torch.manual_seed(seed)
    return VectorQuantizer(size, K, **{"num_heads": H, "dtype": torch.float64, **options})


def vectors(batch, length, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, H, K, generator=generator, dtype=torch.float64).to(dtype)


def close(got, want, atol=1e-12):
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


def loop(total, count, x, valid, decay):
    """One update, token by token; returns the codes too. total (H, M, K), count (H, M)."""
    book = total / count.clamp(min=0.01)[..., None]
    sums, numbers = torch.zeros_like(total), torch.zeros_like(count)
    code = torch.zeros(x.shape[:3], dtype=torch.int64)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            for h in range(x.shape[2]):
                distance = [(x[b, t, h] - book[h, m]).square().sum() for m in range(count.shape[1])]
                code[b, t, h] = best = int(torch.stack(distance).argmin())
                if valid[b, t]:
                    sums[h, best] += x[b, t, h]
                    numbers[h, best] += 1
    return decay * total + (1 - decay) * sums, decay * count + (1 - decay) * numbers, code


@pytest.mark.parametrize("padded", [False, True])
def test_updates_follow_a_loop(padded):
    quantizer = build(decay=0.8)
    total, count = quantizer.sum.clone(), quantizer.count.clone()
    for step in range(4):
        x = vectors(3, 7, seed=step)
        valid = torch.ones(3, 7, dtype=torch.bool)
        if padded:
            valid[1, 4:], valid[2] = False, False
            x = x.masked_fill(~valid[..., None, None], 1e6)
        before = quantizer.codebook()
        out = quantizer(x, valid if padded else None)
        total, count, code = loop(total, count, x, valid, 0.8)
        close(quantizer.sum, total)
        close(quantizer.count, count)
        assert torch.equal(out.code[valid], code[valid])
        assert torch.equal(out.codebook, before)  # the update comes after the use
        assert torch.equal(out.x, before[torch.arange(H), out.code])
        error = (x - out.x).square().sum((2, 3))[valid].mean()
        close(out.commitment, error)
    assert int(quantizer.updates) == 4


def test_gradients_pass_straight_through_and_the_commitment_pulls_to_the_codeword():
    quantizer, x = build().eval(), vectors(2, 5).requires_grad_()
    out = quantizer(x)
    weight = vectors(2, 5, seed=3)
    (straight,) = torch.autograd.grad((out.x * weight).sum(), x, retain_graph=True)
    assert torch.equal(straight, weight)
    (pull,) = torch.autograd.grad(out.commitment, x)
    close(pull, 2 * (x - out.x).detach() / 10)
    assert not list(quantizer.parameters()) and not out.codebook.requires_grad


def test_frozen_in_eval_mode_and_learning_in_training_with_or_without_gradients():
    quantizer = build().eval()
    before = copy.deepcopy(quantizer.state_dict())
    quantizer(vectors(2, 9))
    assert all(torch.equal(v, before[n]) for n, v in quantizer.state_dict().items())
    with torch.no_grad():
        quantizer.train()(vectors(2, 9))
    assert not torch.equal(quantizer.sum, before["sum"]) and int(quantizer.updates) == 1


def test_a_batch_of_pads_changes_nothing():
    quantizer = build(threshold_ema_dead_code=0.5, kmeans_init=True)
    before = copy.deepcopy(quantizer.state_dict())
    out = quantizer(vectors(2, 4), torch.zeros(2, 4, dtype=torch.bool))
    assert out.commitment == 0
    assert all(torch.equal(v, before[n]) for n, v in quantizer.state_dict().items())
    quantizer(vectors(2, 40))  # and k-means still waits for the first real tokens
    assert (quantizer.count.sum(-1) > 70).all()


@pytest.mark.parametrize("options", [{}, {"kmeans_init": True, "threshold_ema_dead_code": 0.6, "decay": 0.7}], ids=str)
def test_resuming_after_some_steps_equals_never_stopping(options):
    """Through a file, into an instance that started elsewhere; the random picks come again too."""
    straight, first = build(seed=0, **options), build(seed=0, **options)
    for step in range(8):
        straight(vectors(2, 11, seed=step))
        if step < 3:
            first(vectors(2, 11, seed=step))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = build(seed=5, **options)
    second.load_state_dict(torch.load(file, weights_only=True))
    torch.rand(7)  # the global generator stands elsewhere
    for step in range(3, 8):
        second(vectors(2, 11, seed=step))
    for name, value in straight.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


class Small(nn.Module):
    """A projection before the quantizer and dropout after it."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(4, H * K, dtype=torch.float64)
        self.quantizer = build(seed=1, **options)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        out = self.quantizer(self.proj(x).unflatten(-1, (H, K)))
        return self.drop(out.x), out.commitment


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", [{"decay": 0.5}, {"decay": 0.5, "threshold_ema_dead_code": 0.9}], ids=str)
def test_activation_checkpointing_updates_once_and_gives_the_same_gradients(reentrant, options):
    """What is computed again must find the codewords of the first time, though the update came in between."""
    plain, saved = Small(**options), Small(**options)
    for step in range(3):
        x = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        found = []
        for model, again in ((plain, False), (saved, True)):
            torch.manual_seed(step)
            entry = x.clone().requires_grad_()
            y, loss = checkpoint(model, entry, use_reentrant=reentrant) if again else model(entry)
            (y.sum() + 10 * loss).backward()
            found.append([entry.grad, model.proj.weight.grad.clone()])
            model.proj.weight.grad = None
        for a, b in zip(*found, strict=True):
            close(a, b)
        for name, value in plain.quantizer.state_dict().items():
            assert torch.equal(saved.quantizer.state_dict()[name], value), name
    assert int(saved.quantizer.updates) == 3


def test_averages_stay_in_single_precision():
    half = build(dtype=None).bfloat16()
    assert half.sum.dtype == half.count.dtype == torch.float32
    single = build(dtype=None)
    x = vectors(2, 9, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = half(x)
    want = single(x.float())
    assert torch.equal(out.code, want.code) and torch.equal(half.sum, single.sum)
    assert build(dtype=torch.bfloat16).sum.dtype == torch.float32
    assert build().half().sum.dtype == torch.float32 and build(dtype=None).double().sum.dtype == torch.float64


def test_long_inputs_are_searched_in_parts(monkeypatch):
    quantizer, x = build().eval(), vectors(3, 50)
    want = quantizer(x)
    monkeypatch.setattr(vector_quantizer, "TOKENS", 7)
    assert torch.equal(quantizer(x).code, want.code)


def test_perplexity_counts_the_codewords_in_use():
    quantizer = build(size=8)
    close(quantizer.perplexity(), torch.tensor(8.0, dtype=torch.float64))
    quantizer.count.copy_(torch.tensor([[4.0, 4, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 3.0]]))
    close(quantizer.perplexity(), torch.tensor(1.5, dtype=torch.float64))  # the mean of 2 and 1


def test_a_collapse_is_warned_of_once(monkeypatch):
    monkeypatch.setattr(vector_quantizer, "CHECK_EVERY", 5)
    quantizer, same = build(size=60, decay=0.5), torch.ones(1, 50, H, K, dtype=torch.float64)
    quantizer._until_check = 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            quantizer(same)
    with pytest.warns(UserWarning, match=r"perplexity of 1\.\d of 60 codewords"):
        for _ in range(6):
            quantizer(same)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20):
            quantizer(same)
        healthy = build(size=60)
        healthy._until_check = 1
        healthy(vectors(4, 50))


def test_kmeans_finds_separate_clusters_and_leaves_pads_out():
    centres = 10 * torch.eye(3, dtype=torch.float64)
    x = centres[torch.arange(60) % 3].view(1, 60, 1, K).expand(1, 60, H, K) + 0.01 * vectors(1, 60)
    valid = torch.ones(1, 90, dtype=torch.bool)
    valid[:, 60:] = False
    x = torch.cat([x, torch.full((1, 30, H, K), 1e4, dtype=torch.float64)], 1)
    quantizer = build(size=12, kmeans_init=True)
    quantizer(x, valid)
    for head in range(H):
        used = quantizer.count[head] > 1.5
        nearest = torch.cdist(quantizer.codebook()[head, used], centres).min(1)
        assert nearest.values.max() < 0.05 and len(nearest.indices.unique()) == 3
    assert quantizer.codebook().abs().max() < 11


def test_dead_codewords_restart_from_the_batch():
    quantizer = build(size=6, decay=0.1, threshold_ema_dead_code=0.5)
    x = vectors(1, 20)
    quantizer.sum[:, 3:] = 1e3  # far from everything
    quantizer(x)
    moved = quantizer.codebook()[:, 3:]
    assert (quantizer.count[:, 3:] == 1).all()
    for head in range(H):
        assert all((x[0, :, head] - code).abs().sum(-1).min() < 1e-12 for code in moved[head])


def work(rank, folder, reduction):
    """One of two processes: three steps on its half of each batch, with the codebook written to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name, options in (("plain", {}), ("restart", {"kmeans_init": True, "threshold_ema_dead_code": 0.9})):
        quantizer = build(reduction=reduction, decay=0.5, **options)
        for step in range(3):
            quantizer(vectors(4, 6, seed=step)[2 * rank : 2 * rank + 2])
        torch.save(quantizer.state_dict(), f"{folder}/{name}{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_two_processes(reduction, tmp_path):
    torch.multiprocessing.start_processes(work, (str(tmp_path), reduction), nprocs=2, start_method="fork")
    states = {name: torch.load(tmp_path / f"{name}.pt") for name in ("plain0", "plain1", "restart0", "restart1")}
    together, alone = build(decay=0.5), build(decay=0.5)
    total, count = together.sum.clone(), together.count.clone()
    for step in range(3):
        x = vectors(4, 6, seed=step)
        together(x)
        alone(x[:2])
        book = total / count.clamp(min=0.01)[..., None]
        half = build(decay=0.5)
        half.sum.zero_()
        half.count.zero_()
        code = half._nearest(x.movedim(2, 0).flatten(1, 2), book)
        number, sums = vector_quantizer.cell_sums(x.movedim(2, 0).flatten(1, 2), code, None, M)
        total, count = 0.5 * total + 0.25 * sums, 0.5 * count + 0.25 * number
    want = {"sum": (together.sum, together.count), "mean": (total, count), "none": (alone.sum, alone.count)}[reduction]
    close(states["plain0"]["sum"], want[0])
    close(states["plain0"]["count"], want[1])
    shared = reduction != "none"
    assert torch.equal(states["plain0"]["sum"], states["plain1"]["sum"]) == shared
    assert torch.equal(states["restart0"]["sum"], states["restart1"]["sum"]) == shared


def test_vector_quantize_pytorch():
    """Codes, sums, counts, loss and gradient over steps. There, counts are smoothed (eps = 0 turns it off) and the
    loss is a mean over elements: K times smaller."""
    package = pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed")
    heads = [
        package.VectorQuantize(
            K, M, rotation_trick=False, decay=0.99, commitment_weight=1.0, kmeans_init=False,
            threshold_ema_dead_code=0, eps=0.0,
        )
        for _ in range(H)
    ]  # fmt: skip
    ours = build(dtype=None)
    for h, theirs in enumerate(heads):
        book = theirs._codebook
        for name, value in (("embed", ours.codebook()), ("embed_avg", ours.sum), ("cluster_size", ours.count)):
            getattr(book, name).data.copy_(value[h : h + 1])
        theirs.train()
    for step in range(20):
        x = vectors(3, 40, seed=step, dtype=torch.float32)
        mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        out = ours(mine)
        weight = vectors(3, 40, seed=99, dtype=torch.float32)
        parts = [theirs(other[:, :, h]) for h, theirs in enumerate(heads)]
        assert torch.equal(out.code, torch.stack([code for _, code, _ in parts], -1))
        close(out.x, torch.stack([quantized for quantized, _, _ in parts], 2), 1e-5)
        loss = sum(loss.sum() for *_, loss in parts)
        close(out.commitment / K, loss, 1e-5)
        ((out.x * weight).sum() + out.commitment / K).backward()
        (sum((part[0] * weight[:, :, h]).sum() for h, part in enumerate(parts)) + loss).backward()
        close(mine.grad, other.grad, 1e-5)
        for h, theirs in enumerate(heads):
            close(ours.sum[h], theirs._codebook.embed_avg[0], 1e-5)
            close(ours.count[h], theirs._codebook.cluster_size[0], 1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codebook_size": 0}, "codebook_size=0"),
        ({"head_dim": 2.5}, "head_dim=2.5"),
        ({"num_heads": -1}, "num_heads=-1"),
        ({"kmeans_steps": 0}, "kmeans_steps=0"),
        ({"decay": 1.0}, "decay=1.0"),
        ({"threshold_ema_dead_code": -1.0}, "threshold_ema_dead_code=-1.0"),
        ({"reduction": "summ"}, "Did you mean sum"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        VectorQuantizer(**{"codebook_size": 4, "head_dim": 2, **options})
