"""One sequence over several ranks, which are threads here, equals one device: mixers, states, bytes, refusals."""

import pytest
import torch
from sequence_ranks import SHARED, SUBJECTS, earlier_state, leaves, on_rank, prepare, worst

from seqzoo.blocks.backbone import Backbone
from seqzoo.blocks.protocol import map_state
from seqzoo.blocks.registry import create_mixer, list_mixers, mixer_info
from seqzoo.blocks.sequence_parallel import (
    SharedSequence,
    check_shareable,
    even_lengths,
    list_shared_mixers,
    run_ranks,
    sequence_parallel,
)
from seqzoo.blocks.testing.subject import error
from seqzoo.kernels.gated_linear_attention import gated_chunk_summary

UNEVEN = [3, 1, 5]
LINEAR = [name for name in list_mixers(streaming=True) if mixer_info(name).cls.linear_state]


@pytest.mark.parametrize("label", SUBJECTS)
def test_ranks_equal_one_device(label):
    """Output, final state and all gradients, with and after an earlier segment; a rank has one token."""
    subject = SUBJECTS[label]
    prepared = prepare(subject, sum(UNEVEN), started=subject.pattern == "causal")
    ranks = run_ranks(len(UNEVEN), lambda transport: on_rank(prepared, UNEVEN, transport))
    assert max(worst(prepared, ranks)) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [[8, 8], [7, 6], [1, 11], [4, 4, 4, 4], [2, 7, 1, 6]], ids=str)
@pytest.mark.parametrize("label", SUBJECTS)
def test_every_split_equals_one_device(label, lengths):
    subject = SUBJECTS[label]
    for started in (False, True)[: 1 + (subject.pattern == "causal")]:
        prepared = prepare(subject, sum(lengths), started=started)
        ranks = run_ranks(len(lengths), lambda transport, p=prepared: on_rank(p, lengths, transport))
        assert max(worst(prepared, ranks)) < 1e-10


@pytest.mark.parametrize("label", ["mega[causal]", "mega[self]", "tcnca[self]", "softmax[window_self]"])
def test_parts_that_end_with_chunks(label):
    """Where no chunk of attention crosses a border nothing but the average or the convolutions is exchanged."""
    prepared = prepare(SUBJECTS[label], 14)
    ranks = run_ranks(3, lambda transport: on_rank(prepared, [8, 4, 2], transport))
    assert max(worst(prepared, ranks)) < 1e-10
    if label.startswith("mega"):
        assert all(rank[4]["all_to_all"] == 0 for rank in ranks)


@pytest.mark.parametrize("name", SHARED)
def test_one_rank_changes_nothing(name):
    mixer = create_mixer(name, 16, causal=True, **({"head_dim": 8} if name == "mamba2" else {})).double().eval()
    x = torch.randn(2, 9, 16, dtype=torch.float64)

    def run(transport):
        with sequence_parallel(mixer, SharedSequence(transport, [9])):
            return mixer(x).y, sum(transport.calls.values())

    [(y, calls)] = run_ranks(1, run)
    assert torch.equal(y, mixer(x).y) and calls == 0


def volume(label, lengths):
    prepared = prepare(SUBJECTS[label], sum(lengths))
    return [rank[3:] for rank in run_ranks(len(lengths), lambda transport: on_rank(prepared, lengths, transport))]


@pytest.mark.parametrize("label", ["linear[causal]", "linear[default]", "lightning[causal]", "gla[causal]"])
def test_states_travel_once_each_way(label):
    """LASP-2: one all-gather forward and one backward, of decays and states; H K (V + 1) numbers of 8 bytes and 2 B."""
    for received, calls in volume(label, [4, 5, 6]):
        assert calls == {"all_gather": 2}
        mixer = SUBJECTS[label].mixer()
        heads, key = mixer.num_heads, getattr(mixer, "key_dim", mixer.head_dim if hasattr(mixer, "head_dim") else 0)
        value = getattr(mixer, "value_dim", key)
        state = 2 * heads * key * value  # of a batch of 2
        extra = {"linear": 2 * heads * key, "lightning": 0, "gla": 0}[label.partition("[")[0]]
        decay = {"linear": 0, "lightning": heads, "gla": 2 * heads * key}[label.partition("[")[0]]
        assert received["all_gather"] == 8 * 2 * (2 * (state + extra) + decay)


@pytest.mark.parametrize(
    "label",
    [f"{name}[causal]" for name in ("linear", "lightning", "gla", "mamba", "mamba2", "s4d")]
    + ["mamba[self]", "s4d[self]", "mega[truncation]", "tcnca[causal]", "softmax[window]", "softmax[window_self]"],
)
def test_volume_does_not_depend_on_the_length(label):
    assert volume(label, [40, 40]) == volume(label, [80, 80])


def test_full_attention_receives_the_earlier_keys():
    """Causal: rank r gets the keys and values of the tokens before its own, and their gradients go the same way."""
    mixer = SUBJECTS["softmax[causal]"].mixer()
    per_token = 2 * 2 * mixer.num_kv_heads * mixer.head_dim * 8  # batch of 2, keys and values
    found = volume("softmax[causal]", [4, 3, 5])
    forward = [0, 4, 7]
    backward = [3 * 0 + 2 * 4, 3, 0]  # tokens whose gradients come home from later ranks
    assert [r[0]["all_to_all"] for r in found] == [per_token * (f + b) for f, b in zip(forward, backward, strict=True)]


# --- the protocol on one device


@pytest.mark.parametrize("name", LINEAR)
def test_summaries_are_the_state(name):
    """What chunk_summary says of a chunk is what forward does to a state; two chunks compose to one."""
    for label, subject in SUBJECTS.items():
        if not label.startswith(f"{name}[") or subject.pattern != "causal":
            continue
        mixer, x, _, _, earlier = prepare(subject, 13, started=True)
        state = earlier_state(mixer, earlier)
        first, second = x[:, :7], x[:, 7:]
        middle = mixer(first, state=state).state
        last = mixer(second, state=middle).state
        one, two = mixer.chunk_summary(first, state=state), mixer.chunk_summary(second, state=middle)
        for got, want in (
            (one.apply(state), middle),
            (two.apply(one.apply(state)), last),
            (one.then(two).apply(state), last),
        ):
            for g, w in zip(leaves(got), leaves(want), strict=True):
                assert error(g.double(), w.double()) < 1e-12, label


@pytest.mark.parametrize("name", LINEAR)
def test_prefill_in_chunks_through_summaries(name):
    """All summaries first, each chunk after the states that they give: the outputs of one forward."""
    subject = SUBJECTS[f"{name}[causal]"]
    mixer, x, _, _, earlier = prepare(subject, 16, started=True)
    state = earlier_state(mixer, earlier)
    want = mixer(x, state=state).y
    pieces, inputs = [], x.split(4, 1)
    for piece in inputs:
        halo = state if not pieces else pieces[-1][0]  # a convolution's last inputs: those of the chunk before
        summary = mixer.chunk_summary(piece, state=halo)
        pieces.append((summary.state, summary))
    outputs = []
    for piece, (_, summary) in zip(inputs, pieces, strict=True):
        outputs.append(mixer.apply_prefix(piece, state).y)
        state = summary.apply(state)
    assert error(torch.cat(outputs, 1), want) < 1e-12


@pytest.mark.parametrize("form", ["head", "token", "channel"])
def test_summary_by_the_recurrence(form):
    """S_t = a_t S_{t-1} + k_t v_t^T, token by token."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 6, 2, 3).double(), torch.randn(2, 6, 2, 4).double()
    shape = {"head": (2,), "token": (2, 6, 2), "channel": (2, 6, 2, 3)}[form]
    log_decay = -torch.rand(shape).double()
    decay, state = gated_chunk_summary(k, v, log_decay)
    start = torch.randn(2, 2, 3, 4).double()
    want = start
    for t in range(6):
        a = log_decay if form == "head" else log_decay[:, t]
        a = a.view(1, 2, 1, 1) if form == "head" else a.unsqueeze(-1) if form == "channel" else a[..., None, None]
        want = a.exp() * want + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
    assert error(decay * start + state, want) < 1e-12
    shared, _ = k[:, :, :1], v
    decay, state = gated_chunk_summary(
        shared, v, log_decay[..., :1].expand_as(log_decay) if form == "channel" else log_decay
    )
    assert state.shape == (2, 2, 3, 4)


# --- the exchange


def test_prefix_by_hand():
    """a = 2, 3, 5 and m = 1, 10, 100 after 7: 7, 2 7 + 1 = 15, 3 15 + 10 = 55, at the end 5 55 + 100 = 375."""

    def run(transport):
        exchange = SharedSequence(transport, [1, 1, 1])
        factor = torch.tensor([2.0, 3.0, 5.0])[transport.rank].requires_grad_()
        own = torch.tensor([1.0, 10.0, 100.0])[transport.rank].requires_grad_()
        start = torch.tensor(7.0, requires_grad=True)
        (before,), (last,) = exchange.prefix([factor], [own], [start], return_last=True)
        (behind,), _ = exchange.reversed.prefix([factor], [own])
        (rest,) = exchange.others([own])
        grads = torch.autograd.grad(before + (last if transport.rank == 0 else 0 * last), [factor, own, start])
        return [t.item() for t in (before, last, behind, rest, *grads)]

    found = run_ranks(3, run)
    assert [r[0] for r in found] == [7.0, 15.0, 55.0] and {r[1] for r in found} == {375.0}
    assert [r[2] for r in found] == [310.0, 100.0, 0.0]  # from the end: 100, then 3 100 + 10
    assert [r[3] for r in found] == [110.0, 101.0, 11.0]
    # The sum of 7, 15, 55 and 375: d/da_1 = 7 (1 + 3 + 15), d/da_2 = 15 (1 + 5), d/da_3 = 55.
    assert [r[4] for r in found] == [133.0, 90.0, 55.0]
    assert [r[5] for r in found] == [19.0, 6.0, 1.0]  # 1 + 3 + 15, 1 + 5, 1
    assert sum(r[6] for r in found) == 1 + 2 + 6 + 30


def test_tokens_from_other_ranks():
    x = torch.arange(6.0).view(1, 6)
    spans = [((4, 6), (0, 1)), ((1, 5),), ()]

    def run(transport):
        exchange = SharedSequence(transport, [2, 1, 3])
        own = exchange.split(x).clone().requires_grad_()
        found = exchange.gather(own, spans)
        (grad,) = torch.autograd.grad((found * (10.0**transport.rank)).sum(), own)
        around = exchange.around(exchange.split(x), 2, 1, torch.tensor([[-2.0, -1.0]]))
        return found.detach().tolist(), grad.tolist(), around.tolist(), exchange.last(exchange.split(x), 4).tolist()

    found = run_ranks(3, run)
    assert [r[0] for r in found] == [[[4.0, 5.0, 0.0]], [[1.0, 2.0, 3.0, 4.0]], [[]]]
    assert [r[1] for r in found] == [[[1.0, 10.0]], [[10.0]], [[10.0, 11.0, 1.0]]]
    assert [r[2] for r in found] == [
        [[-2.0, -1.0, 0.0, 1.0, 2.0]],
        [[0.0, 1.0, 2.0, 3.0]],
        [[1.0, 2.0, 3.0, 4.0, 5.0, 0.0]],
    ]
    assert all(r[3] == [[2.0, 3.0, 4.0, 5.0]] for r in found)


def test_an_error_of_one_rank_is_raised_and_ends_the_others():
    def run(transport):
        if transport.rank == 1:
            raise KeyError("rank 1")
        return transport.all_gather(torch.ones(1))

    with pytest.raises(KeyError, match="rank 1"):
        run_ranks(3, run)


def test_shares():
    assert even_lengths(11, 4) == (3, 3, 3, 2)
    with pytest.raises(ValueError, match="3 tokens cannot be split over 4 ranks"):
        even_lengths(3, 4)
    with pytest.raises(ValueError, match="at least one token"):
        run_ranks(2, lambda transport: SharedSequence(transport, [3, 0]))
    with pytest.raises(ValueError, match="expected \\(B, 4"):
        run_ranks(2, lambda transport: SharedSequence(transport, [2, 2]).split(torch.ones(1, 5)))


# --- what is refused


def test_mixers_that_need_the_whole_sequence_are_refused_by_name():
    for pattern in ("self", "causal"):
        able = list_shared_mixers(pattern)
        assert able == SHARED
        for name in sorted(set(list_mixers(pattern=pattern)) - set(able)):
            backbone = Backbone(16, 2, mixer=["linear", name], causal=pattern == "causal")
            with pytest.raises(ValueError, match=r"blocks\.1\.mixer: .* mixers that can .*gla, lightning, linear"):
                check_shareable(backbone)
    with pytest.raises(ValueError, match="no mixer"):
        check_shareable(torch.nn.Linear(2, 2))
    check_shareable(Backbone(16, 1, mixer="tcnca"))  # whose own convolutions are no obstacle


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (torch.nn.Conv1d(16, 16, 3), "1: Conv1d reads across the border"),
        (torch.nn.GRU(16, 16), "1: GRU reads across the border"),
        (torch.nn.BatchNorm1d(16), "1: a batch norm"),
    ],
    ids=["conv", "gru", "batchnorm"],
)
def test_parts_that_read_across_are_refused(part, message):
    with pytest.raises(ValueError, match=message):
        check_shareable(torch.nn.Sequential(Backbone(16, 1, mixer="linear"), part))
    check_shareable(torch.nn.Sequential(Backbone(16, 1, mixer="linear"), torch.nn.Conv1d(16, 16, 1)))


def test_masks_packing_and_wrong_parts_are_refused():
    mixer = create_mixer("gla", 16, causal=True)
    x = torch.randn(1, 4, 16)

    def run(transport):
        messages = []
        with sequence_parallel(
            mixer if transport.rank == 0 else create_mixer("gla", 16), SharedSequence(transport, [4, 3])
        ):
            if transport.rank == 0:
                for arguments in (
                    {"mask": torch.ones(1, 4, dtype=torch.bool)},
                    {"cu_seqlens": torch.tensor([0, 4], dtype=torch.int32)},
                ):
                    with pytest.raises(ValueError, match="takes no mask and no cu_seqlens") as caught:
                        mixer(x, **arguments)
                    messages.append(str(caught.value))
                with pytest.raises(ValueError, match="rank 0 was given 3 tokens, its part of 7 has 4"):
                    mixer(x[:, :3])
        return messages

    assert len(run_ranks(2, run)[0]) == 2
    assert mixer.exchange is None and mixer(x).y.shape == x.shape


def test_the_model_is_itself_again_after_an_error():
    backbone = Backbone(16, 2, mixer="linear")

    def run(transport):
        with sequence_parallel(backbone, SharedSequence(transport, [2, 2])):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        run_ranks(2, run)
    assert all(m.exchange is None for m in backbone.modules() if hasattr(m, "exchange"))


def test_map_state_keeps_complex_factors():
    mixer = create_mixer("s4d", 16, causal=True).double()
    summary = mixer.chunk_summary(torch.randn(2, 5, 16).double())
    assert summary.transition.x.is_complex() and not summary.state.x.is_complex()
    twice = summary.then(summary)
    assert error(torch.view_as_real(twice.transition.x), torch.view_as_real(summary.transition.x**2)) < 1e-12
    assert map_state(lambda t: t, twice.state).x.shape == summary.state.x.shape
