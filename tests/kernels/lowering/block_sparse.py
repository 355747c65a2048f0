"""Calls that launch every kernel of block-sparse attention: query blocks and single queries, forwards and backwards."""

from functools import partial

import torch

from seqzoo.kernels.block_sparse import block_sparse_attention


def call(dtype, width, q_block, *, weighted=False, masked=False):
    length, k_block = 1024, 128
    q, k, v = (torch.zeros(1, length, 2, width, dtype=dtype, requires_grad=True) for _ in range(3))
    index = torch.arange(2).expand(1, 1, length // q_block, 2)
    o = block_sparse_attention(
        q,
        k,
        v,
        index,
        q_block=q_block,
        k_block=k_block,
        weight=torch.ones(index.shape, requires_grad=True) if weighted else None,
        q_position=torch.arange(length).expand(1, -1) if q_block == 1 else None,
        key_mask=torch.ones(1, length, dtype=torch.bool) if masked else None,
        backend="triton",
    )
    o.sum().backward()


def cases():
    for width in (64, 128, 256):
        for q_block in (128, 1):
            yield f"bfloat16 width {width} q_block {q_block}", partial(call, torch.bfloat16, width, q_block)
        q_block = 128 if width == 64 else 1
        yield f"float32 width {width} q_block {q_block}", partial(call, torch.float32, width, q_block)
    yield "everything, blocks", partial(call, torch.bfloat16, 128, 128, weighted=True, masked=True)
    yield "everything, single queries", partial(call, torch.float16, 60, 1, weighted=True, masked=True)
