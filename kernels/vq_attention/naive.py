"""VQ attention by its formula, one softmax over all keys: the oracle of the other backends.

B batch, L queries, S keys, H heads, K key width, V value width, M codes, C block length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .state import MASKED, VQState, accumulation_dtype, advance, extend, leaving


def naive_vq_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    code: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    *,
    chunk: int | None,
    causal: bool,
    lengths: Tensor | None,
    scale: float,
    state: VQState | None,
    return_state: bool,
) -> tuple[Tensor, VQState | None]:
    """o_i = sum_j softmax_j(s_ij) v_j, shapes as in `vq_attention`, whose arguments these are.

    s_ij = scale q_i . k_j + bias[i - j] where the blocks of i and j are the same or neighbours, elsewhere
    scale q_i . c_j, the codeword of j, without a gradient. The cells of the state are M more keys, each counted
    `number` times. Needs L x S memory.
    """
    acc = accumulation_dtype(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        book_HMK, q_BLHK = codebook.detach().to(acc), q.to(acc) * scale
        new = torch.full_like(q[:, 0, 0, 0], v.shape[1], dtype=torch.int64) if lengths is None else lengths
        seen, tail = torch.zeros_like(new), 0
        if state is not None and k is not None:
            joined = extend(state, k, v, code)
            k, v_BSHV, code = joined[0], joined[1].to(acc), joined[2]
            seen, tail = state.length, state.k.shape[1]
        else:
            v_BSHV = v.to(acc)
        step = torch.arange(v_BSHV.shape[1] - tail, device=q.device)
        at_BS = seen[:, None] + torch.cat((torch.arange(-tail, 0, device=q.device), step))
        visible_B1S = ((at_BS >= 0) & (at_BS < (seen + new)[:, None]))[:, None]
        v_BSHV = v_BSHV.masked_fill(~visible_B1S.mT[..., None], 0)

        c_BSHK = book_HMK[torch.arange(book_HMK.shape[0], device=q.device), code]
        s_BHLS = torch.einsum("blhk,bshk->bhls", q_BLHK, c_BSHK)
        if chunk is not None and k is not None:
            here_BL = seen[:, None] + torch.arange(q.shape[1], device=q.device)
            distance = here_BL[:, :, None] - at_BS[:, None]
            block_L, block_S = (t.div(chunk, rounding_mode="floor") for t in (here_BL, at_BS))
            near_BLS = (block_L[:, :, None] - block_S[:, None]).abs() <= 1
            window = torch.einsum("blhk,bshk->bhls", q_BLHK, k.to(acc))
            if bias is not None:
                index = distance if causal else distance + 2 * chunk - 1
                window = window + bias.to(acc)[:, index.clamp(0, bias.shape[1] - 1)].transpose(0, 1)
            s_BHLS = torch.where(near_BLS[:, None], window, s_BHLS)
            if causal:
                visible_B1S = visible_B1S & (distance >= 0)
            if state is not None:  # what the cells hold already
                first = (seen.div(chunk, rounding_mode="floor") - 1) * chunk
                visible_B1S = visible_B1S & (at_BS >= first[:, None])[:, None]
        s_BHLS = s_BHLS.masked_fill(~visible_B1S[:, None], MASKED)
        if state is not None:
            cells = torch.einsum("blhk,hmk->bhlm", q_BLHK, book_HMK) + state.number.log()[:, :, None].clamp(min=MASKED)
            s_BHLS = torch.cat((s_BHLS, cells), -1)
        w_BHLS = s_BHLS.softmax(-1)
        o = torch.einsum("bhls,bshv->blhv", w_BHLS[..., : v_BSHV.shape[1]], v_BSHV)
        if state is None:
            return o.to(v.dtype), None
        o = o + torch.einsum("bhlm,bhmv->blhv", w_BHLS[..., v_BSHV.shape[1] :], state.mean)
        if not return_state or chunk is None:
            return o.to(v.dtype), None
        old = leaving(state, chunk, new, v_BSHV.shape[1])
        one_BSHM = torch.nn.functional.one_hot(code, book_HMK.shape[1]).to(acc) * old[..., None, None]
        total = torch.einsum("bshm,bshv->bhmv", one_BSHM, v_BSHV)
        return o.to(v.dtype), advance(state, joined, new, one_BSHM.sum(1), total)
