"""Every single thing that can be wrong with the tensors of an operation is refused with that operation's message."""

import pytest
import torch

from seqzoo.kernels.agent_attention import running_agent_attention
from seqzoo.kernels.block_sparse import block_sparse_attention
from seqzoo.kernels.dilated_conv import dilated_conv
from seqzoo.kernels.ema import Coefficients, ema
from seqzoo.kernels.gated_linear_attention import gated_linear_attention
from seqzoo.kernels.linear_attention import linear_attention
from seqzoo.kernels.lse import merge_lse
from seqzoo.kernels.prob_sparse import prob_sparse_attention
from seqzoo.kernels.s4d_conv import s4d_conv
from seqzoo.kernels.selective_scan import selective_scan
from seqzoo.kernels.short_conv import short_conv
from seqzoo.kernels.softmax import softmax_attention
from seqzoo.kernels.vq_attention import vq_attention


def t(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def whole(*shape):
    return t(*shape, dtype=torch.int64)


def pair(*shape):
    return t(*shape, dtype=torch.complex64)


FIT = "do not (fit|go together)"
Q, V = t(2, 5, 4, 6), t(2, 5, 4, 3)
HEADS = {"q": Q, "k": Q, "v": V}
PARTS = {name: pair(4, 3) for name in ("log_a", "b", "c")}
SCAN = {"u": t(2, 5, 4), "dt": t(2, 5, 4), "a": t(4, 3), "b": t(2, 5, 3), "c": t(2, 5, 3)}
TABLE = {
    running_agent_attention: (
        {**HEADS, "agents": t(7, 4, 6)},
        [
            ({"v": t(1, 5, 4, 3)}, FIT),
            ({"agents": t(4, 6)}, FIT),
            ({"agents": t(7, 4, 5)}, FIT),
            ({"chunk_size": 3}, "power of two"),
        ],
    ),
    softmax_attention: (
        HEADS,
        [
            ({"v": t(2, 4, 4, 3)}, FIT),
            ({"q": t(1, 5, 4, 6)}, FIT),
            ({"q": t(2, 5, 4, 5)}, FIT),
            ({"v": t(2, 5, 4, 7)}, "wider than the keys"),
            ({"mask": t(2, 1, 5, 5)}, "expected bool"),
            ({"window": (1,)}, "window="),
            ({"window": (1, -1)}, "window="),
            ({"window": (1, 1), "bias": t(1, 4, 5, 5)}, "without a bias"),
            ({"window": (1, 1), "mask": t(1, 4, 1, 5).bool()}, "mask of keys"),
            ({"window": (1, 1), "mask": t(5, 5).bool()}, "mask of keys"),
            ({"window": (1, 1), "mask": t(1, 1, 1, 4).bool()}, "mask of keys"),
            ({"drop": -0.1}, "drop=-0.1"),
        ],
    ),
    block_sparse_attention: (
        {**HEADS, "index": whole(2, 1, 5, 1), "q_block": 1, "k_block": 5},
        [
            ({"k": t(5, 4, 6)}, "must be"),
            ({"k": t(1, 5, 4, 6), "v": t(1, 5, 4, 3)}, FIT),
            ({"k": t(2, 5, 2, 6), "v": t(2, 5, 2, 3)}, FIT),
            ({"v": V.double()}, FIT),
            ({"k_block": 0}, "k_block=0"),
            ({"index": whole(2, 5, 1)}, "index"),
            ({"index": whole(1, 1, 5, 1)}, "index"),
            ({"index": whole(2, 1, 4, 1)}, "index"),
            ({"key_mask": t(2, 4).bool()}, "key_mask"),
            ({"q_position": t(2, 5)}, "q_position"),
        ],
    ),
    dilated_conv: (
        {"x": t(2, 5, 4), "weight": t(4, 2, 3), "causal": True},
        [
            ({"x": t(5, 4)}, "are not"),
            ({"weight": t(4, 2)}, "are not"),
            ({"weight": t(4, 0, 3)}, "are not"),
            ({"weight": t(4, 3, 3)}, "are not"),
            ({"causal": False, "tail": t(2, 2, 4)}, "carries no tail"),
        ],
    ),
    ema: (
        {"x": t(2, 5, 4), "ahead": Coefficients(t(4, 3), t(4, 3), t(4, 3))},
        [
            ({"ahead": Coefficients(t(4), t(4), t(4))}, "ahead holds"),
            ({"ahead": Coefficients(t(5, 3), t(5, 3), t(5, 3))}, "ahead holds"),
            ({"ahead": Coefficients(t(4, 3), t(4, 3), t(4, 2))}, "ahead holds"),
            ({"behind": [t(4, 3)] * 3, "initial_state": (t(2, 4, 3), None)}, "looks ahead"),
        ],
    ),
    gated_linear_attention: (
        {**HEADS, "log_decay": t(2, 5, 4)},
        [
            ({"q": t(2, 5, 4, 5)}, FIT),
            ({"v": t(2, 4, 4, 3)}, FIT),
            ({"k": Q.double()}, "share a dtype"),
            ({"q": t(2, 5, 0, 6), "k": t(2, 5, 0, 6)}, "must divide"),
            ({"log_decay": t(2, 5, 3)}, "log_decay is"),
            ({"log_decay": whole(2, 5, 4)}, "log_decay is"),
            ({"lengths": t(2)}, "lengths is"),
            ({"chunk_size": 0}, "chunk_size=0"),
            ({"chunk_size": 16.0}, "chunk_size=16.0"),
        ],
    ),
    linear_attention: (
        {**HEADS, "causal": False},
        [
            ({"k": t(1, 5, 4, 6)}, FIT),
            ({"k": t(2, 5, 4, 5)}, FIT),
            ({"v": t(2, 5, 2, 3)}, FIT),
            ({"k": Q.double()}, "share a dtype"),
            ({"key_mask": t(1, 5).bool()}, "key_mask"),
            ({"q": t(1, 3, 4, 6), "k": t(1, 5, 4, 6), "v": t(1, 5, 4, 3), "cu_seqlens": t(2).int()}, "needs S = L"),
            ({"q": Q[:1], "k": Q[:1], "v": V[:1], "cu_seqlens": torch.tensor([0])}, "cu_seqlens"),
            ({"q": Q[:1], "k": Q[:1], "v": V[:1], "cu_seqlens": torch.tensor([[0, 5]])}, "cu_seqlens"),
        ],
    ),
    prob_sparse_attention: (
        HEADS,
        [
            ({"v": t(2, 4, 4, 3)}, FIT),
            ({"k": t(1, 5, 4, 6), "v": t(1, 5, 4, 3)}, FIT),
            ({"k": t(2, 5, 4, 5)}, FIT),
            ({"key_mask": t(2, 5)}, "key_mask"),
            ({"sample_index": t(5, 2)}, "sample_index is"),
            ({"sample_index": whole(5)}, "sample_index is"),
            ({"sample_index": whole(4, 2)}, "sample_index is"),
            ({"sample_index": whole(5, 0)}, "sample_index is"),
            ({"sample_index": whole(5, 2) - 1}, "must lie in"),
            ({"sample_index": whole(5, 2) + 5}, "must lie in"),
        ],
    ),
    s4d_conv: (
        {"u": t(2, 5, 4), **PARTS},
        [
            ({name: pair(4) for name in PARTS}, "has shape"),
            ({name: pair(5, 3) for name in PARTS}, "has shape"),
            ({"c": pair(4, 2)}, "c has shape"),
            ({"c_reverse": pair(4, 3), "state": t(2, 4, 3, 2)}, "looks ahead"),
            ({"state": t(2, 4, 3, 1)}, "state has shape"),
        ],
    ),
    selective_scan: (
        SCAN,
        [
            ({"a": t(4)}, "must be"),
            ({"a": t(5, 3)}, FIT),
            ({"dt": t(2, 5, 3)}, FIT),
            ({"b": t(2, 4, 3)}, FIT),
            ({"c": t(2, 5, 2)}, FIT),
        ],
    ),
    short_conv: (
        {"x": t(2, 6, 5), "weight": t(5, 4)},
        [({"x": t(2, 5)}, "must be"), ({"weight": t(5)}, "must be"), ({"weight": t(4, 4)}, "must be")],
    ),
    vq_attention: (
        {**HEADS, "code": whole(2, 5, 4), "codebook": t(4, 7, 6), "chunk_size": 2, "causal": True},
        [
            ({"v": t(5, 4, 3)}, "must be"),
            ({"v": t(3, 5, 4, 3), "code": whole(3, 5, 4)}, FIT),
            ({"v": t(1, 5, 4, 3), "code": whole(1, 5, 4)}, FIT),
            ({"v": t(2, 5, 2, 3), "code": whole(2, 5, 2)}, FIT),
            ({"code": whole(2, 4, 4)}, FIT),
            ({"codebook": t(7, 6)}, "codebook"),
            ({"codebook": t(2, 7, 6)}, "codebook"),
            ({"lengths": whole(3)}, "lengths is"),
            ({"k": t(2, 5, 4, 5)}, "with a window k"),
            ({"v": t(2, 6, 4, 3), "code": whole(2, 6, 4)}, "and v its length"),
            ({"bias": t(4, 3)}, "bias"),
            ({"chunk_size": None, "causal": False, "bias": t(4, 4)}, "need a window"),
            ({"chunk_size": None, "causal": False, "return_state": True}, "need a window"),
        ],
    ),
}
CASES = [(op, change, message) for op, (_, changes) in TABLE.items() for change, message in changes]


@pytest.mark.parametrize(
    ("op", "change", "message"), CASES, ids=[f"{op.__name__}-{'-'.join(change)}" for op, change, _ in CASES]
)
def test_one_wrong_thing_is_refused(op, change, message):
    with pytest.raises(ValueError, match=message):
        op(**{**TABLE[op][0], **change})


@pytest.mark.parametrize("op", TABLE, ids=lambda op: op.__name__)
def test_the_rest_is_right(op):
    op(**TABLE[op][0])


@pytest.mark.parametrize(
    "second",
    [
        (t(2, 5, 4, 3), t(2, 4, 5)),
        (t(2, 5, 4, 6), t(2, 4, 4)),
    ],
)
def test_parts_of_attention_must_be_alike(second):
    with pytest.raises(ValueError, match="must be"):
        merge_lse([(t(2, 5, 4, 6), t(2, 4, 5)), second])


def test_the_log_sum_exp_of_other_heads_is_refused():
    with pytest.raises(ValueError, match="must be"):
        merge_lse([(t(2, 5, 4, 6), t(2, 3, 5))])
