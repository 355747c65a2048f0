"""Where a state lies and of what type it is: the mixer's own, or what is asked for."""

from __future__ import annotations

import pytest
import torch

from seqzoo.blocks.protocol import map_state
from seqzoo.blocks.registry import list_mixers
from seqzoo.blocks.testing import find_subjects

STREAMING = {s.label: s for name in list_mixers(streaming=True) for s in find_subjects(name) if s.pattern == "causal"}


def parts(state):
    found = []
    map_state(lambda part: found.append(part) or part, state)
    return found


@pytest.mark.parametrize("label", STREAMING)
def test_device_and_dtype_are_the_mixers_or_those_asked_for(label):
    mixer = STREAMING[label].mixer().double()
    own, asked = parts(mixer.init_state(2, max_len=9)), parts(mixer.init_state(2, max_len=9, device="meta"))
    abroad = parts(mixer.to("meta").init_state(2, max_len=9))
    assert {part.device.type for part in own} <= {"cpu"}
    assert {part.device.type for part in (*asked, *abroad)} <= {"meta"}
    kinds = [part.dtype for part in own]
    assert {kind for kind in kinds if kind.is_floating_point or kind.is_complex} <= {torch.float64, torch.complex128}
    assert [part.dtype for part in asked] == [part.dtype for part in abroad] == kinds
    assert [part.shape for part in asked] == [part.shape for part in own]
    narrow = parts(mixer.init_state(2, max_len=9, dtype=torch.bfloat16))
    kinds = [part.dtype for part in narrow if part.dtype.is_floating_point or part.dtype.is_complex]
    assert set(kinds) <= {torch.bfloat16, torch.float32, torch.complex64}
