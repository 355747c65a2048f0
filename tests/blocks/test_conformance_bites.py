"""The conformance suite bites: toy mixers, each with one planted bug, and the checks that must see it."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from seqzoo.blocks.protocol import Mixer, MixerOutput
from seqzoo.blocks.testing import CHECKS, CheckError, applies, check_mixer, find_subjects, run_check


class Average(NamedTuple):
    value: Tensor  # (B, D), the moving average after the last token
    count: Tensor  # int64 (B,), tokens seen


class Honest(Mixer):
    """A gated moving average, causal; each step of it is a method for a bug to replace."""

    patterns = frozenset({"causal"})
    streaming = True
    state_type = Average
    variants: ClassVar[dict[str, dict[str, Any]]] = {"default": {}}

    def __init__(self, dim, *, causal=True, cross=False, device=None, dtype=None):
        super().__init__(dim, causal=causal, cross=cross)
        self.in_proj = nn.Linear(dim, 2 * dim, device=device, dtype=dtype)
        self.out_proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x, context=None, *, mask=None, cu_seqlens=None, grid=None, state=None, **options):
        self.check(x, context, mask=mask, cu_seqlens=cu_seqlens, grid=grid, state=state, **options)
        if cu_seqlens is not None:
            return self.packed(x, cu_seqlens, state)
        start = self.init_state(len(x), dtype=x.dtype) if state is None else state
        real = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        keep, value = self.project(self.clean(x, real))
        y, end = self.scan(self.closed(keep.sigmoid(), real), value, real, start)
        y = self.finish(self.out_proj(y), x).masked_fill(~real[..., None], 0.0)
        return MixerOutput(y, None if state is None else self.carry(start, end))

    def check(self, *inputs: Tensor | None, **options: Any) -> None:
        self.check_inputs(*inputs, **options)

    def clean(self, x: Tensor, real: Tensor) -> Tensor:
        return x.masked_fill(~real[..., None], 0.0)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.in_proj(x).chunk(2, dim=-1)

    def closed(self, keep: Tensor, real: Tensor) -> Tensor:
        return keep.masked_fill(~real[..., None], 1.0)

    def scan(self, keep: Tensor, value: Tensor, real: Tensor, start: Average) -> tuple[Tensor, Average]:
        average, ys = start.value, []
        for a, v in zip(keep.unbind(1), value.unbind(1), strict=True):
            average = a * average + (1 - a) * v
            ys.append(average)
        return self.joined(ys, value), Average(average, start.count + real.sum(1))

    def joined(self, ys: list[Tensor], value: Tensor) -> Tensor:
        return torch.stack(ys, 1) if ys else value

    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        return y

    def carry(self, start: Average, end: Average) -> Average:
        return end

    def packed(self, x: Tensor, cu_seqlens: Tensor, state: Average | None) -> MixerOutput:
        rows = nn.utils.rnn.pad_sequence(list(x[0].split(cu_seqlens.diff().tolist())), batch_first=True)
        mask = torch.arange(rows.shape[1]) < cu_seqlens.diff()[:, None]
        out = self(rows, mask=mask, state=state)
        return MixerOutput(out.y[mask][None], out.state)

    def init_state(self, batch_size, *, max_len=None, device=None, dtype=None):
        value = self.out_proj.weight.new_zeros(batch_size, self.dim, dtype=dtype)
        return Average(value, torch.zeros(batch_size, dtype=torch.int64))

    def state_size(self, length):
        return self.dim


class FutureLeak(Honest):
    """Sees one token ahead."""

    def project(self, x):
        keep, value = super().project(x)
        return keep, value + 1e-6 * torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1)


class LateLeak(FutureLeak):
    """Sees one token ahead where a second chunk of 64 begins, and calls it rounding."""

    exact = False

    def project(self, x):
        keep, value = super().project(x)
        right = Honest.project(self, x)[1]
        place = torch.arange(x.shape[1])[:, None]
        return keep, torch.where(place == 63, value, right)


class RoutingLeak(Honest):
    """A decision over all positions: no gradient flows through it."""

    def finish(self, y, x):
        return y * torch.where(x.sum((1, 2), keepdim=True) > 0, 1.0, 1.1).to(y.dtype)


class PadInState(Honest):
    """Pads pass through the average; only the outputs there are hidden."""

    def closed(self, keep, real):
        return keep


class RightPadInState(Honest):
    """Pads after the last token still decay the state: no output of the same call shows it."""

    def closed(self, keep, real):
        started = real.long().cumsum(1) > 0
        return super().closed(keep, started).masked_fill((started & ~real)[..., None], 0.9)


class BatchMixing(Honest):
    def finish(self, y, x):
        return y - 1e-3 * y.mean(0, keepdim=True)


class BatchSizeMatters(Honest):
    """Nothing of the mates but their number: a bare squeeze does such things."""

    def finish(self, y, x):
        return y * 1.001 if len(x) == 1 else y


class OtherStep(Honest):
    """One token after others takes another path, with the gate forgotten."""

    def scan(self, keep, value, real, start):
        if value.shape[1] == 1 and bool((start.count > 0).all()):
            keep = keep * 0.99
        return super().scan(keep, value, real, start)


class StaleState(Honest):
    def carry(self, start, end):
        return start


class MutatedState(Honest):
    def carry(self, start, end):
        start.value.data.copy_(end.value.detach())
        return end


class DetachedState(Honest):
    def carry(self, start, end):
        return Average(end.value.detach(), end.count)


class SharedCount(Honest):
    """Depends on the position, and takes that of the first row for all of them."""

    def scan(self, keep, value, real, start):
        ys, end = super().scan(keep, value, real, start)
        place = start.count[0] + torch.arange(value.shape[1])
        return ys * (1 + 0.1 * (place[None, :, None] % 4).to(ys.dtype)), end


class WrongStateSize(Honest):
    def state_size(self, length):
        return self.dim * length


class PackedLeak(Honest):
    """Takes the packed row for one sequence."""

    def packed(self, x, cu_seqlens, state):
        return self(x) if state is None else super().packed(x, cu_seqlens, state)


class PackedStatesShuffled(Honest):
    def packed(self, x, cu_seqlens, state):
        out = super().packed(x, cu_seqlens, state)
        return MixerOutput(out.y, None if state is None else Average(*(t.flip(0) for t in out.state)))


class UnusedParameter(Honest):
    def __init__(self, dim, *, causal=True, cross=False):
        super().__init__(dim, causal=causal, cross=cross)
        self.spare = nn.Parameter(torch.ones(dim))


class WrongGradient(Honest):
    def finish(self, y, x):
        return 1.5 * y - 0.5 * y.detach()


class RandomInEval(Honest):
    def finish(self, y, x):
        return y + 1e-9 * torch.randn_like(y)


class BufferInEval(Honest):
    def __init__(self, dim, *, causal=True, cross=False):
        super().__init__(dim, causal=causal, cross=cross)
        self.register_buffer("calls", torch.zeros(()))

    def finish(self, y, x):
        self.calls += 1
        return y


class HiddenWeight(Honest):
    def __init__(self, dim, *, causal=True, cross=False):
        super().__init__(dim, causal=causal, cross=cross)
        self.register_buffer("scale", 1 + torch.rand(dim), persistent=False)

    def finish(self, y, x):
        return y * self.scale.to(y.dtype)


class NoPickle(Honest):
    def __init__(self, dim, *, causal=True, cross=False):
        super().__init__(dim, causal=causal, cross=cross)
        self.activation = lambda y: y.tanh()

    def finish(self, y, x):
        return self.activation(y)


class ChangesInput(Honest):
    def clean(self, x, real):
        return super().clean(x if x.requires_grad else x.mul_(1.01), real)


class IgnoresAutocast(Honest):
    def finish(self, y, x):
        return y.float() * torch.nan if y.dtype != x.dtype else y


class AlwaysSingle(Honest):
    def finish(self, y, x):
        return y.float()


class IgnoresDtype(Honest):
    def __init__(self, dim, *, causal=True, cross=False, dtype=None):
        super().__init__(dim, causal=causal, cross=cross)


class GraphBreak(Honest):
    def finish(self, y, x):
        return y * float(y.detach().abs().max() >= 0)


class UnknownOption(Honest):
    def __init__(self, dim, *, causal=True, cross=False, **options):
        super().__init__(dim, causal=causal, cross=cross)


class UncoveredOption(Honest):
    def __init__(self, dim, *, causal=True, cross=False, extra=False):
        super().__init__(dim, causal=causal, cross=cross)


class AcceptsAnything(Honest):
    def check(self, *inputs, **options):
        pass


class CausalUnasked(Honest):
    patterns = frozenset({"self"})
    streaming = False

    def __init__(self, dim, *, causal=False, cross=False):
        super().__init__(dim, causal=causal, cross=cross)

    def init_state(self, batch_size, *, max_len=None, device=None, dtype=None):
        return (Mixer if dtype is None else Honest).init_state(self, batch_size, dtype=dtype)

    def state_size(self, length):
        return Mixer.state_size(self, length)


class ReadsPads(Honest):
    """Pads count for nothing, but they go through the projections: NaN times a gradient of 0 is NaN."""

    def clean(self, x, real):
        return x


class NeedsAToken(Honest):
    def joined(self, ys, value):
        return torch.stack(ys, 1)


class NoExport(Honest):
    def finish(self, y, x):
        return y + 1e-9 if torch.compiler.is_exporting() else y


class HonestCross(Mixer):
    """Queries gate a softmax-weighted mean of the context."""

    patterns = frozenset({"cross", "causal-cross"})

    def __init__(self, dim: int, *, causal: bool = False, cross: bool = True) -> None:
        super().__init__(dim, causal=causal, cross=cross)
        self.q_proj, self.v_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x, context=None, *, mask=None, context_mask=None, grid=None, **options):
        self.check_inputs(x, context, mask=mask, context_mask=context_mask, grid=grid, **options)
        real = torch.ones(context.shape[:2], dtype=torch.bool) if context_mask is None else context_mask
        mean = self.mean(self.v_proj(context.masked_fill(~real[..., None], 0.0)), real)
        x = x if mask is None else x.masked_fill(~mask[..., None], 0.0)
        y = self.gate(self.q_proj(x).sigmoid(), mask) * mean
        return MixerOutput(y if mask is None else y.masked_fill(~mask[..., None], 0.0))

    def mean(self, value: Tensor, real: Tensor) -> Tensor:
        value = value.masked_fill(~real[..., None], 0.0)
        return value.sum(1, keepdim=True) / real.sum(1).clamp(min=1)[:, None, None]

    def gate(self, query: Tensor, mask: Tensor | None) -> Tensor:
        return query


class PoolsQueries(HonestCross):
    def gate(self, query, mask):
        real = torch.ones(query.shape[:2], dtype=torch.bool) if mask is None else mask
        return query + 1e-6 * query.masked_fill(~real[..., None], 0.0).sum(1, keepdim=True)


class ContextPadLeak(HonestCross):
    def mean(self, value, real):
        return value.mean(1, keepdim=True)


class DividesByZero(HonestCross):
    def mean(self, value, real):
        return value.masked_fill(~real[..., None], 0.0).sum(1, keepdim=True) / real.sum(1)[:, None, None]


class ContextBlind(HonestCross):
    """Never looks at the last real token of the context."""

    def mean(self, value, real):
        last = real & (real.flip(1).long().cumsum(1).flip(1) == 1)
        return super().mean(value, real & ~last)


# The checks that must reject each toy, and some that must not: a leak that only one check sees proves that
# check. The five classic bugs come first.
PLANTED: dict[type[Mixer], tuple[str, str]] = {
    FutureLeak: (
        "causality_jacobian causality_perturbation streaming",
        "gradcheck batch_independence state_size",
    ),
    RoutingLeak: ("causality_perturbation streaming", "causality_jacobian gradcheck batch_independence"),
    PadInState: ("padding streaming_masks", "streaming packed causality_perturbation"),
    RightPadInState: ("streaming_masks packed_states", "streaming padding packed"),
    BatchMixing: ("batch_independence", "streaming causality_perturbation eval_determinism"),
    BatchSizeMatters: ("batch_independence", "streaming causality_perturbation"),
    OtherStep: ("streaming streaming_masks", "padding packed causality_perturbation state_is_a_value"),
    StaleState: ("streaming streaming_gradient packed_states", "padding packed state_size"),
    LateLeak: ("causality_jacobian causality_perturbation", "padding gradcheck"),
    MutatedState: ("state_is_a_value", "streaming state_size"),
    DetachedState: ("streaming_gradient", "streaming gradients"),
    SharedCount: ("state_rows streaming_masks", "streaming packed batch_independence"),
    WrongStateSize: ("state_size", "streaming"),
    PackedLeak: ("packed", "packed_states padding"),
    PackedStatesShuffled: ("packed_states", "packed streaming"),
    UnusedParameter: ("gradients", "gradcheck state_dict_round_trip"),
    WrongGradient: ("gradcheck", "gradients padding"),
    RandomInEval: ("eval_determinism", "gradients refusals"),
    BufferInEval: ("eval_determinism", "copies"),
    HiddenWeight: ("state_dict_round_trip", "eval_determinism"),
    NoPickle: ("copies", "state_dict_round_trip"),
    ChangesInput: ("noncontiguous", "gradcheck"),
    IgnoresAutocast: ("autocast", "shapes_and_dtypes"),
    AlwaysSingle: ("shapes_and_dtypes", "options_covered"),
    IgnoresDtype: ("device_and_dtype_arguments", "shapes_and_dtypes"),
    GraphBreak: ("compile", "gradcheck"),
    NoExport: ("export", "compile"),
    ReadsPads: ("padding", "streaming_masks packed shapes_and_dtypes"),
    NeedsAToken: ("shapes_and_dtypes", "padding streaming"),
    UnknownOption: ("options_covered", "refusals"),
    UncoveredOption: ("options_covered", "refusals"),
    AcceptsAnything: ("refusals", "padding"),
    CausalUnasked: ("future_visible", "padding packed refusals"),
    PoolsQueries: ("causal_cross causality_jacobian", "padding context_padding context_visible"),
    ContextPadLeak: ("context_padding", "padding causal_cross"),
    DividesByZero: ("context_padding", "padding context_visible"),
    ContextBlind: ("context_visible", "context_padding"),
}


def rejects(name: str, mixer: type[Mixer]) -> bool:
    found = False
    for subject in find_subjects(mixer):
        if applies(name, subject):
            try:
                run_check(name, subject)
            except CheckError as broken:
                assert str(broken).startswith(f"{mixer.__name__}[") and f": {name}: " in str(broken)
                found = True
    return found


@pytest.mark.parametrize("mixer", PLANTED, ids=lambda mixer: mixer.__name__)
def test_a_planted_bug_is_rejected(mixer: type[Mixer]) -> None:
    seen, unseen = (names.split() for names in PLANTED[mixer])
    assert [name for name in seen if not rejects(name, mixer)] == []
    assert [name for name in unseen if rejects(name, mixer)] == []
    with pytest.raises(CheckError):
        check_mixer(mixer, checks=seen)


def test_every_check_is_seen_to_reject() -> None:
    assert {name for seen, _ in PLANTED.values() for name in seen.split()} == set(CHECKS)


def test_honest_mixers_pass() -> None:
    assert {*check_mixer(Honest), *check_mixer(HonestCross)} == set(CHECKS) - {"future_visible"}
