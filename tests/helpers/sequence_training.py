"""A training step of a hybrid language model, on one device and over ranks; spawned processes import this file."""

import copy

import torch
from torch.nn import functional as F

from seqzoo.blocks.sequence_parallel import GroupTransport, next_tokens, shared_step
from seqzoo.zoo import create_model

HYBRID = [
    {"name": "mamba2", "head_dim": 8, "d_state": 4},
    {"name": "softmax", "num_heads": 2, "position": "rope", "window_size": 4},
    {"name": "gla", "num_heads": 2},
    {"name": "softmax", "num_heads": 2, "position": "rope"},
]


def make_model(**options):
    torch.manual_seed(0)
    shape = {"vocab_size": 11, "dim": 16, "depth": 4, "mixer": HYBRID, "position": "sinusoidal", **options}
    return create_model("language_tiny", **shape).double()


def make_tokens(length=13):
    return torch.randint(11, (2, length), generator=torch.Generator().manual_seed(1))


def one_device(model, tokens):
    """The mean loss of next tokens, and the gradients."""
    model = copy.deepcopy(model)
    logits = model(tokens).y[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


def summed_loss(model, batch, exchange):
    targets = next_tokens(batch["tokens"], exchange)
    logits = model(batch["tokens"]).y.flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), reduction="sum"), (targets >= 0).sum()


def one_rank(model, tokens, transport):
    """The same on a rank, and how often it called which collective."""
    model = copy.deepcopy(model)
    loss = shared_step(model, {"tokens": tokens}, summed_loss, transport, keys=["tokens"])
    return loss, [p.grad for p in model.parameters()], dict(transport.calls)


def difference(found, expected):
    """The largest difference of loss and gradients."""
    pairs = [(found[0], expected[0]), *zip(found[1], expected[1], strict=True)]
    return max((a - b).abs().max().item() for a, b in pairs)


def process(rank, size, store, folder):
    """One process of a group over gloo; writes the largest difference from one device and its calls."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    model, tokens = make_model(), make_tokens()
    found = one_rank(model, tokens, GroupTransport())
    torch.save((difference(found, one_device(model, tokens)), found[2]), f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
