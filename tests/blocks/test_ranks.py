"""Sums, rows and batch norms over two processes against one that has all rows."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from seqzoo.blocks.layers.ranks import own_rows, rows_of_ranks, share_batch_norms, sum_over_ranks
from seqzoo.blocks.layers.vector_quantizer import VectorQuantizer

PARTS = (slice(0, 3), slice(3, 8))  # rows of each process


def rows(seed: int = 0, *shape: int) -> torch.Tensor:
    return torch.randn(8, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def contrast(x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    logits = (x @ y.T) * scale
    return nn.functional.cross_entropy(logits, torch.arange(len(x)))


def norms() -> nn.Module:
    torch.manual_seed(0)
    kinds = [nn.BatchNorm1d(4), nn.BatchNorm1d(4, momentum=None), nn.BatchNorm1d(4, affine=False)]
    return nn.Sequential(*kinds, nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False))).double()


def quantizer() -> VectorQuantizer:
    torch.manual_seed(0)
    return VectorQuantizer(5, 3, num_heads=2, kmeans_init=True, threshold_ema_dead_code=1.0, decay=0.5).double()


def steps(own: slice, ranks: int, folder: Path, name: str) -> None:
    """What a process has after a step on its rows, the losses averaged over the processes as DDP does."""
    found: dict[str, torch.Tensor] = {}
    x, y = (rows(seed, 4)[own].requires_grad_() for seed in (1, 2))
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    contrast(rows_of_ranks(x), rows_of_ranks(y), scale).backward()
    found |= {"x": x.grad / ranks, "y": y.grad / ranks, "scale": scale.grad}
    ragged = [rows_of_ranks(torch.ones(2, 3 + own.start, dtype=kind)) for kind in (torch.bool, torch.float64)]
    found |= {"bool": ragged[0], "float": ragged[1]}
    z = rows(3, 4)[own].requires_grad_()
    sum_over_ranks(z.square().sum(0)).exp().sum().backward()
    found["sum"] = z.grad / ranks
    model = share_batch_norms(norms())
    inputs = rows(4, 4)[own].requires_grad_()
    out = model(inputs)
    (out * rows(5, 4)[own]).sum().backward()
    found |= {"norm": out.detach(), "norm grad": inputs.grad}
    found |= {f"norm {key}": value for key, value in model.state_dict().items()}
    found |= {f"norm d {key}": value.grad for key, value in model.named_parameters()}
    model.eval()
    found["norm eval"] = model(rows(6, 4)).detach()
    draw = torch.Generator().manual_seed(0)
    found["drawn"] = own_rows(len(x), lambda n: torch.rand(n, 2, generator=draw))
    books = quantizer()
    for seed in range(3):
        vectors = rows(7 + seed, 6, 2, 3)[own].requires_grad_()
        valid = (torch.arange(6) < torch.arange(1, 9).unsqueeze(1))[own]
        loss = books(vectors, valid).commitment
        loss.backward()
        found[f"commitment {seed}"], found[f"commitment grad {seed}"] = loss.detach() / ranks, vectors.grad / ranks
    found |= {f"books {key}": value for key, value in books.state_dict().items()}
    torch.save(found, folder / f"{name}.pt")


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    steps(PARTS[rank], 2, Path(folder), str(rank))
    dist.destroy_process_group()


def test_two_processes_have_what_one_has(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(work, (str(tmp_path),), nprocs=2, start_method="fork")
    steps(slice(0, 8), 1, tmp_path, "one")
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("one", "0", "1"))
    of_rows = ["x", "y", "sum", "norm", "norm grad", "drawn", *(f"commitment grad {seed}" for seed in range(3))]
    for key in of_rows:
        torch.testing.assert_close(torch.cat((first[key], second[key])), one[key], rtol=1e-12, atol=1e-12, msg=key)
    for seed in range(3):  # each divides by the mean number of tokens
        key = f"commitment {seed}"
        torch.testing.assert_close(first[key] + second[key], one[key], rtol=1e-12, atol=1e-12, msg=key)
    for key in one.keys() - {*of_rows, "bool", "float", *(f"commitment {seed}" for seed in range(3))}:
        if key.startswith("norm d"):  # of the outputs of each alone; DDP adds them up
            torch.testing.assert_close(first[key] + second[key], one[key], rtol=1e-12, atol=1e-12, msg=key)
        else:
            torch.testing.assert_close(first[key], one[key], rtol=1e-12, atol=1e-12, msg=key)
            assert torch.equal(first[key], second[key]), key
    expected = torch.tensor([[1] * 3 + [0] * 3] * 2 + [[1] * 6] * 2)
    for kind in ("bool", "float"):
        assert torch.equal(first[kind].long(), expected) and torch.equal(first[kind], second[kind])
