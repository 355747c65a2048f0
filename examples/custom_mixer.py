"""A token mixer of your own: a gated moving average, checked and trained without touching the library.

Check it against the contract of `seqzoo.Mixer`:

    python custom_mixer.py

Train it in any pipeline, from this folder (so that Python finds the file):

    lightning fit mixer._target_=custom_mixer.MyMixer

h_t = a_t h_{t-1} + (1 - a_t) v_t with a gate a_t = sigmoid(W x_t) and values v_t = U x_t; causal,
or the sum of both directions where the model is not.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from seqzoo import Mixer, MixerOutput, register_mixer
from seqzoo.blocks.testing import check_mixer


class AverageState(NamedTuple):
    """The average after the last token, (B, D): all that the past leaves behind."""

    average: Tensor


@register_mixer("my_ema", paper="none: an example", origin="example")
class MyMixer(Mixer):
    """y = P h with the gated moving average h of the values; without `causal`, of both directions."""

    patterns = frozenset({"self", "causal"})
    streaming = True
    state_type = AverageState

    def __init__(self, dim, *, causal=False, cross=False, device=None, dtype=None):
        super().__init__(dim, causal=causal, cross=cross)  # refuses the patterns that are not declared
        self.in_proj = nn.Linear(dim, 2 * dim, device=device, dtype=dtype)
        self.out_proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x, context=None, *, mask=None, context_mask=None, cu_seqlens=None, grid=None, state=None):
        inputs = {"mask": mask, "context_mask": context_mask, "cu_seqlens": cu_seqlens, "grid": grid, "state": state}
        self.check_inputs(x, context, **inputs)
        if cu_seqlens is not None:  # packed: one sequence a row, padded on the right
            x = nn.utils.rnn.pad_sequence(x[0].split(cu_seqlens.diff().tolist()), batch_first=True)
            mask = torch.arange(x.shape[1], device=x.device) < cu_seqlens.diff()[:, None]
            out = self(x, mask=mask, state=state)
            return MixerOutput(out.y[mask][None], out.state)
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0.0)  # a pad may hold anything
        keep, value = self.in_proj(x).chunk(2, dim=-1)
        keep = keep.sigmoid()
        if mask is not None:
            keep = keep.masked_fill(~mask[..., None], 1.0)  # at a pad the average stays as it is
        averages, last = self.run(keep, value, None if state is None else state.average)
        if not self.causal:
            averages = averages + self.run(keep.flip(1), value.flip(1), None)[0].flip(1)
        y = self.out_proj(averages)
        y = y if mask is None else y.masked_fill(~mask[..., None], 0.0)
        return MixerOutput(y, None if state is None else AverageState(last))

    def run(self, keep, value, average):
        averages = [value.new_zeros(len(value), self.dim) if average is None else average]
        for a, v in zip(keep.unbind(1), value.unbind(1), strict=True):
            averages.append(a * averages[-1] + (1 - a) * v)
        return torch.stack(averages, dim=1)[:, 1:], averages[-1]

    def init_state(self, batch_size, *, max_len=None, device=None, dtype=None):
        if not self.causal:
            return super().init_state(batch_size)  # raises: both directions carry nothing
        weight = self.out_proj.weight
        return AverageState(weight.new_zeros(batch_size, self.dim, device=device, dtype=dtype))

    def state_size(self, length):
        return self.dim if self.causal else super().state_size(length)


def main() -> None:
    print("passed:", ", ".join(check_mixer(MyMixer)))


if __name__ == "__main__":
    main()
