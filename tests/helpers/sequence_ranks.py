"""One device against ranks that hold a part of the sequence each: outputs, gradients, states."""

import copy
from contextlib import nullcontext

import torch

from seqzoo.blocks.protocol import detach_state, map_state
from seqzoo.blocks.sequence_parallel import SharedSequence, sequence_parallel
from seqzoo.blocks.testing.subject import error, find_subjects

SHARED = ["gla", "lightning", "linear", "mamba", "mamba2", "mega", "s4d", "softmax", "tcnca"]
SUBJECTS = {
    subject.label: subject
    for name in SHARED
    for subject in find_subjects(name)
    if subject.pattern in subject.cls.shared_patterns
}


def leaves(state):
    found = []
    map_state(lambda t: found.append(t) or t, state)
    return found


def prepare(subject, total, *, started=False):
    """A mixer, its inputs, a context, a cotangent and five earlier tokens."""
    earlier = subject.tensor(2, 5, seed=9) if started else None
    return subject.mixer(), subject.tensor(2, total), subject.context(2), subject.tensor(2, total, seed=5), earlier


def earlier_state(mixer, earlier):
    return mixer(earlier, state=mixer.init_state(2, dtype=torch.float64)).state


def measure(mixer, x, context, cotangent, earlier, exchange=None):
    """y, the next state and the gradients of x, the context, the earlier tokens and the parameters."""
    given = [None if t is None else t.clone().requires_grad_() for t in (x, context, earlier)]
    x, context, earlier = given
    state = None if earlier is None else earlier_state(mixer, earlier)
    with nullcontext() if exchange is None else sequence_parallel(mixer, exchange):
        out = mixer(x, context, state=state)
    objective = (out.y * cotangent).sum()
    if state is not None:  # once: the objective is the sum over the ranks, each of which must reach all outputs
        share = 1.0 if exchange is None or exchange.rank == 0 else 0.0
        objective = objective + share * sum((0.1 * t * t).sum() for t in leaves(out.state) if t.requires_grad)
    wanted = [*(t for t in given if t is not None), *mixer.parameters()]
    found = torch.autograd.grad(objective, wanted, allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]
    return out.y.detach(), None if state is None else detach_state(out.state), grads


def on_rank(prepared, lengths, transport):
    """The same on one rank, with a copy of the mixer, then what was received and how often."""
    mixer, x, context, cotangent, earlier = prepared
    exchange = SharedSequence(transport, lengths)
    own = exchange.split(x), context, exchange.split(cotangent), earlier
    return *measure(copy.deepcopy(mixer), *own, exchange), transport.received.copy(), transport.calls.copy()


def worst(prepared, ranks):
    """The largest relative error of what `ranks` returned: (y, state, gradients)."""
    y, state, grads = measure(*prepared)
    found = [error(torch.cat([rank[0] for rank in ranks], 1), y)]
    states = [0.0]
    if state is not None:
        for rank in ranks:
            states += [error(g.double(), w.double()) for g, w in zip(leaves(rank[1]), leaves(state), strict=True)]
    floor = max(g.abs().max().item() for g in grads if g.numel()) * 1e-3
    joined = [torch.cat([rank[2][0] for rank in ranks], 1)]
    joined += [sum(rank[2][i] for rank in ranks) for i in range(1, len(grads))]
    errors = [error(g, w, floor=floor) for g, w in zip(joined, grads, strict=True)]
    return found[0], max(states), max(errors)
