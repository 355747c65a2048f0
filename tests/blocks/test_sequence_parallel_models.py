"""A hybrid language model with its loss over ranks: threads, and processes over gloo."""

import copy

import pytest
import torch
from sequence_training import HYBRID, difference, make_model, make_tokens, one_device, one_rank, process

from seqzoo.blocks.sequence_parallel import (
    GroupTransport,
    SharedSequence,
    check_shareable,
    next_tokens,
    run_ranks,
    sequence_parallel,
    shared_mean,
    split_batch,
)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_over_ranks_is_a_step_on_one_device(checkpointing):
    """Mamba-2, GLA, windowed and full attention: loss and gradients, 13 tokens over 3 ranks, blocks recomputed too."""
    model, tokens = make_model(ngrams=(3,), ngram_size=16, ngram_width=4), make_tokens()
    model.set_grad_checkpointing(checkpointing)
    want = one_device(model, tokens)
    for found in run_ranks(3, lambda transport: one_rank(model, tokens, transport)):
        assert difference(found, want) < 1e-12


def test_a_recomputation_outside_of_the_context_meets_the_same_ranks():
    model, tokens = make_model(), make_tokens(8)
    expected = torch.autograd.grad(model(tokens).y.square().sum(), list(model.parameters()))
    models = [copy.deepcopy(model) for _ in range(2)]

    def run(transport):
        own, exchange = models[transport.rank], SharedSequence(transport, [5, 3])
        own.set_grad_checkpointing(True)
        with sequence_parallel(own, exchange):
            y = own(exchange.split(tokens)).y
        return torch.autograd.grad(y.square().sum(), list(own.parameters()))

    for *parts, want in zip(*run_ranks(2, run), expected, strict=True):
        assert (sum(parts) - want).abs().max() < 1e-10


def test_a_state_is_that_of_the_whole_sequence():
    """Two segments over ranks, the state handed on, then one more on one device: as one sequence."""
    model, tokens = make_model().eval(), make_tokens(21)
    want = model(tokens).y
    models = [copy.deepcopy(model) for _ in range(2)]

    def run(transport):
        own, pieces = models[transport.rank], []
        state = own.init_state(2, dtype=torch.float64)
        for first in (0, 9):
            exchange = SharedSequence(transport, [4, 5])
            with sequence_parallel(own, exchange):
                out = own(exchange.split(tokens[:, first : first + 9]), state=state)
                pieces.append(exchange.join(out.y))
            state = out.state
        pieces.append(own(tokens[:, 18:], state=state).y)
        return torch.cat(pieces, 1).detach(), state.position

    for y, position in run_ranks(2, run):
        assert (y - want).abs().max() < 1e-10 and position.tolist() == [18, 18]


def test_targets_across_the_border():
    tokens = torch.arange(10, 17).view(1, 7)

    def run(transport):
        exchange = SharedSequence(transport, [3, 1, 3])
        return next_tokens(split_batch({"tokens": tokens}, ["tokens"], exchange)["tokens"], exchange).tolist()

    assert run_ranks(3, run) == [[[11, 12, 13]], [[14]], [[15, 16, -100]]]


def test_a_mean_over_ranks():
    """Sums 3 and 9 over 1 and 3 tokens: 3; own shares add up to it. A rank without a target divides by nothing."""

    def run(transport):
        exchange = SharedSequence(transport, [1, 1, 1])
        total, number = [(3.0, 1), (9.0, 3), (0.0, 0)][transport.rank]
        share, mean = shared_mean(torch.tensor(total), number, exchange)
        return share.item(), mean.item()

    found = run_ranks(3, run)
    assert [mean for _, mean in found] == [3.0] * 3 and sum(share for share, _ in found) == 3.0
    with pytest.raises(ValueError, match="the batch has no 'tokens'; it has text"):
        run_ranks(1, lambda transport: split_batch({"text": 0}, ["tokens"], SharedSequence(transport, [1])))


@pytest.mark.parametrize("lengths", [[5, 3, 5], [1, 1, 11]])
def test_ngrams_see_the_tokens_of_the_ranks_before(lengths):
    """Over parts that are shorter than the n-grams too, from a state and to one."""
    model = make_model(ngrams=(2, 4), ngram_size=16, ngram_width=4).eval()
    tokens = make_tokens(17)
    want = model(tokens).y[:, 4:]
    models = [copy.deepcopy(model) for _ in range(3)]

    def run(transport):
        own, exchange = models[transport.rank], SharedSequence(transport, lengths)
        state = own(tokens[:, :4], state=own.init_state(2, dtype=torch.float64)).state
        with sequence_parallel(own, exchange):
            out = own(exchange.split(tokens[:, 4:]), state=state)
            y = exchange.join(out.y)
        return y, out.state.embedding

    embedding = model(tokens, state=model.init_state(2, dtype=torch.float64)).state.embedding
    for y, after in run_ranks(3, run):
        assert (y - want).abs().max() < 1e-12
        assert torch.equal(after, embedding) and after.tolist() == (1 + tokens[:, -3:]).tolist()


def test_an_embedding_that_looks_back_by_itself_is_refused():
    class Looking(torch.nn.Embedding):
        def init_state(self, batch_size):
            return None

        def read(self, tokens):
            return self(tokens)

    model = make_model()
    model.embedding = Looking(11, 16)
    with pytest.raises(ValueError, match="embedding: Looking looks back at earlier tokens"):
        check_shareable(model)


def test_without_a_process_group():
    with pytest.raises(ValueError, match="init_process_group"):
        GroupTransport()


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_over_gloo(size, tmp_path):
    """The same step by spawned processes of torch.distributed."""
    arguments = (size, str(tmp_path / "store"), str(tmp_path))
    torch.multiprocessing.spawn(process, arguments, nprocs=size)
    for rank in range(size):
        error, calls = torch.load(tmp_path / f"{rank}.pt")
        assert error < 1e-10
        # The targets at the borders; each way a halo of the convolution, one of the window, and keys and values; two
        # states; the loss and the gradients.
        assert calls == {"all_gather": 4, "all_to_all": 1 + 2 * 3, "all_reduce": 2}
    assert len(HYBRID) == 4
