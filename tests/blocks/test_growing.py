"""Caches that grow: values as torch.cat gives them, at the cost of a token."""

import copy
import io
from itertools import pairwise

import pytest
import torch

from seqzoo.blocks.layers import block_routing, kv_cache
from seqzoo.blocks.layers.growing import grown
from seqzoo.blocks.protocol import detach_state, map_state, select_rows


def entries(number, start=0.0, batch=2):
    return start + torch.arange(batch * number * 3, dtype=torch.float32).reshape(batch, number, 3)


@pytest.fixture(params=[torch.no_grad, torch.inference_mode])
def quiet(request):
    with request.param():
        yield


def test_one_entry_after_another_is_cat_and_copies_seldom(quiet):
    tensor, want, places = torch.zeros(2, 0, 3), torch.zeros(2, 0, 3), []
    for i in range(2000):
        new = entries(1, i)
        tensor, want = grown(tensor, new), torch.cat((want, new), 1)
        places.append(tensor.data_ptr())
    assert torch.equal(tensor, want)
    moves = sum(a != b for a, b in pairwise(places))
    assert 5 < moves < 20  # log(2000 / 64) / log(5 / 4) is 15


def test_a_tensor_that_grew_is_a_value(quiet):
    """Several continuations of one past: none sees another's, and the past stays."""
    past = grown(grown(torch.zeros(2, 0, 3), entries(4)), entries(1, 50.0))
    kept = past.clone()
    one, two = grown(past, entries(2, 100.0)), grown(past, entries(2, 200.0))
    three = grown(one, entries(1, 300.0))
    four = grown(one, entries(1, 400.0))
    assert torch.equal(past, kept)
    assert torch.equal(one, torch.cat((kept, entries(2, 100.0)), 1))
    assert torch.equal(two, torch.cat((kept, entries(2, 200.0)), 1))
    assert torch.equal(three, torch.cat((one, entries(1, 300.0)), 1))
    assert torch.equal(four, torch.cat((one, entries(1, 400.0)), 1))
    assert len({t.data_ptr() for t in (one, two)}) == 2


def test_copies_and_other_lengths_are_their_own(quiet):
    past = grown(torch.zeros(2, 0, 3), entries(4))
    grown(past, entries(1, 7.0))  # takes the room
    for made in (past.clone(), past.detach(), past[:, :3], past.index_select(0, torch.tensor([1, 0])), past[:1]):
        kept = made.clone()
        more = grown(made, entries(2, 9.0, batch=len(made)))
        assert torch.equal(more, torch.cat((kept, entries(2, 9.0, batch=len(made))), 1)) and torch.equal(made, kept)
    assert torch.equal(past, entries(4))


def test_gradients_flow_as_through_cat():
    old, new = entries(3).requires_grad_(), entries(2).requires_grad_()
    both = grown(grown(old, new), new)
    assert torch.autograd.gradcheck(lambda a, b: grown(grown(a, b), b).sin(), (old.double(), new.double()))
    both.sum().backward()
    assert torch.equal(old.grad, torch.ones_like(old)) and torch.equal(new.grad, 2 * torch.ones_like(new))
    with torch.no_grad():
        past = grown(torch.zeros(2, 0, 3), entries(4))
    product = (past * old[:, :1]).sum()  # keeps `past` for its backward
    grown(past, entries(1))
    with torch.no_grad():
        grown(past, entries(1))
    product.backward()


def test_room_dtype_and_empty_parts(quiet):
    tensor = grown(torch.zeros(2, 0, 3, dtype=torch.bfloat16), entries(4), most=5)
    assert tensor.dtype == torch.bfloat16 and tensor.untyped_storage().nbytes() == 2 * 5 * 3 * 2
    assert torch.equal(grown(tensor, entries(0)), tensor)
    assert grown(tensor, entries(1), most=5).data_ptr() == tensor.data_ptr()


def cache_of(kind, rows=2):
    tail = torch.zeros(rows, 2, 4)
    if kind == "kv":
        return kv_cache.empty_cache(rows, 0, 1, 4)
    return block_routing.empty_state(tail, 1, 4, max_len=None, device="cpu", dtype=torch.float32)


def extend(state, k, number=None):
    if isinstance(state, kv_cache.KVState):
        place = state.length.unsqueeze(1) + torch.arange(k.shape[1])
        real = torch.ones_like(place, dtype=torch.bool)
        if number is not None:
            real = torch.arange(k.shape[1]) < number.unsqueeze(1)
        return kv_cache.append(state, k, 2 * k, torch.where(real, place, -1))
    return block_routing.append(state, k, 2 * k, number, 4)


def same(a, b):
    map_state(lambda x, y: torch.testing.assert_close(x, y, rtol=0, atol=0), a, b)


@pytest.mark.parametrize("kind", ["kv", "routing"])
def test_states_without_gradients_are_those_with(kind):
    """Steps, a branch, rows reordered, rows with pads, a detached and a copied state: as cat has it."""

    def walk():
        generator = torch.Generator().manual_seed(0)
        made = []

        def more(state, length, number=None):
            k = torch.rand(state.k.shape[0], length, 1, 4, generator=generator)
            if number is not None:
                k = torch.where((torch.arange(length) < number.unsqueeze(1))[..., None, None], k, 0.0)
            made.append(extend(state, k, number))
            if kind == "routing":  # at the place among the row's real tokens
                for i, begin in enumerate(state.length.tolist()):
                    real = length if number is None else int(number[i])
                    assert torch.equal(made[-1].k[i, begin : begin + real], k[i, :real])
                    assert not made[-1].k[i, begin + real :].any()
            return made[-1]

        state = cache_of(kind)
        for length in (5, 1, 1, 1):
            state = more(state, length)
        branch = more(state, 1)
        state = more(more(state, 2), 1)
        more(branch, 3)
        state = more(more(select_rows(state, torch.tensor([1, 0, 1])), 1), 1)
        state = more(detach_state(state), 1)
        more(copy.deepcopy(state), 1)
        state = more(state, 3, torch.tensor([3, 0, 2]))
        for _ in range(3):
            state = more(state, 1)
        more(state, 2, torch.tensor([1, 2, 0]))
        more(state, 1)
        return made

    want = walk()
    with torch.no_grad():
        found = walk()
    for one, other in zip(found, want, strict=True):
        same(one, other)


@pytest.mark.parametrize("kind", ["kv", "routing"])
def test_a_step_does_not_copy_the_past(kind):
    with torch.no_grad():
        state = extend(cache_of(kind), torch.rand(2, 100, 1, 4))
        for _ in range(10):
            following = extend(state, torch.rand(2, 1, 1, 4))
            assert following.k.data_ptr() == state.k.data_ptr() and following.v.data_ptr() == state.v.data_ptr()
            state = following


def test_saved_states_are_plain_tensors():
    with torch.no_grad():
        state = extend(cache_of("kv"), torch.rand(2, 5, 1, 4))
        file = io.BytesIO()
        torch.save(tuple(state[:4]), file)
        file.seek(0)
        again = torch.load(file, weights_only=True)
        same(kv_cache.KVState(*again), state)
        extend(kv_cache.KVState(*again), torch.rand(2, 1, 1, 4))
        same(kv_cache.KVState(*again), state)
