"""Long recordings and texts in one space: samples -> `AudioEncoder` -> a vector for each clip; texts as vectors.

After CoLLAP (arXiv:2410.02271): recordings of minutes are cut into clips, one vector each, and compared with the words
and the whole of a text. Its encoders are BEATs, Whisper and RoBERTa; here the encoder is any of ours, which can also
hear the whole recording and not each clip alone, and texts come as vectors that a frozen encoder made. Sizes are ours.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..blocks.backbone import MixerChoice
from ..blocks.layers.contrastive import SCORES, ContrastiveScore
from ..blocks.registry import did_you_mean
from ._audio import AudioEncoder, AudioZooModel
from ._registry import register_sizes

CONTEXTS = ("recording", "clip")


class ClipOutput(NamedTuple):
    """y: of the clips (B, n, E), zero beyond a row's. mask: bool (B, n), True = clip. aux: scalar losses by name."""

    y: Tensor
    mask: Tensor
    aux: dict[str, Tensor]


class AudioTextModel(AudioZooModel):
    """Recordings (B, T) to vectors of their clips (B, n, E), texts to vectors (C, E), and how well they fit (B, C).

    clip_seconds: a clip's vector is W mean(y) over the tokens whose centres lie in it; the last clip has from half to
    one and a half of that length. context: what the encoder hears for it, "clip", as in the paper: clips know nothing
    of each other, and one that fits is where it is; or "recording", all of it. embed_dim: E. text_dim: of the vectors
    of texts. scores, fusion, temperature, attention_temperature: of `ContrastiveScore`. head_drop: dropout of clips and
    of texts before their projections. All other options are those of `AudioEncoder`. config: set by `create_model`.
    Raises ValueError as those do, and for clips that are shorter than a token.
    """

    heads = ("audio_proj.", "text_proj.", "token_proj.")

    def __init__(
        self,
        *,
        sample_rate: int = 16000,
        front_end: str | Mapping[str, Any] = "log_mel",
        mixer: MixerChoice | Sequence[MixerChoice] = "softmax",
        dim: int = 64,
        depth: int = 2,
        ffn: str | Callable[..., nn.Module] | None = "gelu",
        mlp_ratio: float | None = None,
        norm: str = "layernorm",
        norm_eps: float | None = None,
        prenorm: bool = True,
        position: str = "none",
        max_len: int | None = None,
        causal: bool = False,
        clip_seconds: float = 5.0,
        context: str = "clip",
        embed_dim: int = 128,
        text_dim: int = 384,
        scores: Sequence[str] = SCORES,
        fusion: str = "mean",
        temperature: float = 0.07,
        attention_temperature: float = 0.1,
        input_drop: float = 0.0,
        head_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        time_encoding: Mapping[str, Any] | None = None,
    ) -> None:
        options = {k: v for k, v in locals().items() if k in _ENCODER}
        super().__init__()
        self.encoder = AudioEncoder(**options)
        front = self.encoder.front_end
        if context not in CONTEXTS:
            raise ValueError(f"context={context!r} is not a choice.{did_you_mean(str(context), CONTEXTS)}")
        self.clip_seconds, self.context = clip_seconds, context
        self._clip = round(clip_seconds * sample_rate) if math.isfinite(clip_seconds) else 0
        if self._clip < front.hop_length:
            raise ValueError(
                f"clip_seconds={clip_seconds} is less than one token, {front.hop_length / sample_rate:.6g} seconds"
            )
        self.drop = nn.Dropout(head_drop)
        self.audio_proj = nn.Linear(dim, embed_dim)
        self.text_proj = nn.Linear(text_dim, embed_dim)
        self.score = ContrastiveScore(
            scores, fusion=fusion, temperature=temperature, attention_temperature=attention_temperature
        )
        self.token_proj = nn.Linear(text_dim, embed_dim) if self.score.needs_tokens else None

    def forward(self, samples: Tensor, lengths: Tensor | None = None) -> ClipOutput:
        """samples: floating (B, T) in [-1, 1]. lengths: int64 (B,), real samples of each row, at least 1; None when all
        are. Neither pads nor other rows change a row's vectors."""
        out = self.encoder.features(samples, lengths)
        if lengths is None and torch.compiler.is_exporting():
            return self._encode_whole(out.features)
        return self.encode(out.features, out.lengths)

    def encode(self, features: Tensor, lengths: Tensor) -> ClipOutput:
        """Vectors of the clips from the features of `encoder.features`. lengths: int64 (B,), tokens of each row. Raises
        ValueError for a recording without any."""
        if len(lengths) and int(lengths.min()) < 1:
            raise ValueError(f"recording {int(lengths.argmin())} of the batch has no samples")
        batch, number = features.shape[:2]
        real = torch.arange(number, device=features.device) < lengths.unsqueeze(1)
        place = self._clip_of(number, lengths)
        count = int(place.max()) + 1 if place.numel() else 0
        # of the real tokens, one row after the other: the clip that they are in
        clip = (torch.arange(batch, device=place.device).unsqueeze(1) * count + place)[real]
        size = torch.bincount(clip, minlength=batch * count)
        if self.context == "recording":
            out = self.encoder.encode(features, lengths)
            y = out.y[real]
        else:
            offset = torch.arange(len(clip), device=clip.device) - (size.cumsum(0) - size)[clip]
            parts = features.new_zeros(len(size), int(size.max()), features.shape[2])
            parts = parts.index_put((clip, offset), features[real])
            out = self.encoder.encode(parts[size > 0], size[size > 0])
            y = out.y[(size > 0).cumsum(0)[clip] - 1, offset]
        # a mean of many terms: never in half precision
        y = y.float() if y.dtype in (torch.bfloat16, torch.float16) else y
        mean = y.new_zeros(len(size), y.shape[1]).index_add(0, clip, y) / size.clamp_min(1).unsqueeze(1)
        mask = (size > 0).unflatten(0, (batch, count))
        clips = self.audio_proj(self.drop(mean)).unflatten(0, (batch, count))
        return ClipOutput(clips.masked_fill(~mask.unsqueeze(-1), 0), mask, out.aux)

    def embed_texts(self, vectors: Tensor, tokens: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Texts in the common space. vectors: (C, text_dim). tokens: (C, m, text_dim), for the score "token"; else they
        are left out. Returns (C, E) and (C, m, E) or None."""
        text = self.text_proj(self.drop(vectors))
        if self.token_proj is None or tokens is None:
            return text, None
        return text, self.token_proj(self.drop(tokens))

    def clip_spans(self, count: int, seconds: float) -> list[tuple[float, float]]:
        """Start and end of the clips of a recording, in seconds: `count` of them in so many seconds."""
        edges = [i * self._clip / self.encoder.sample_rate for i in range(count)] + [seconds]
        return list(itertools.pairwise(edges))

    def _run_trunk(self, *args: Any, **arguments: Any) -> Any:
        return self(*args, **arguments)  # with context="clip" what is heard are clips

    def _encode_whole(self, features: Tensor) -> ClipOutput:
        """`encode` of rows whose tokens are all real, with every clip's size in the program. Raises ValueError for a
        length that is not known."""
        number = features.shape[1]
        if not isinstance(number, int):
            raise ValueError("the number of clips follows from the length: it must be known, length=<samples>")
        sizes = self._clip_sizes(number)
        if self.context == "recording":
            out = self.encoder.encode(features)
            parts = out.y.split(sizes, 1)
        else:
            outs = [self.encoder.encode(part) for part in features.split(sizes, 1)]
            out, parts = outs[0], [o.y for o in outs]
        wide = torch.promote_types(out.y.dtype, torch.float32)
        mean = torch.stack([part.to(wide).mean(1) for part in parts], 1)
        mask = torch.ones(features.shape[0], len(sizes), dtype=torch.bool, device=features.device)
        return ClipOutput(self.audio_proj(self.drop(mean)), mask, out.aux)

    def _clip_sizes(self, number: int) -> list[int]:
        """Tokens of each clip of a recording of `number` tokens: `_clip_of` in whole numbers."""
        front = self.encoder.front_end
        clips = [(2 * token * front.hop_length + front.frame_length) // (2 * self._clip) for token in range(number)]
        begin = clips.index(clips[-1])
        if 2 * (number - begin) * front.hop_length < self._clip and clips[-1] > 0:
            clips[begin:] = [clips[-1] - 1] * (number - begin)
        return [clips.count(clip) for clip in range(clips[-1] + 1)]

    def _clip_of(self, number: int, lengths: Tensor) -> Tensor:
        """The clip of each token, int64 (B, number); what lies beyond a row's has its last clip."""
        front = self.encoder.front_end
        token = torch.arange(number, device=lengths.device)
        # whole numbers: centres in half samples
        clip = (2 * token * front.hop_length + front.frame_length) // (2 * self._clip)
        last = clip[lengths - 1]
        begin = torch.searchsorted(clip, last)  # the first token of a row's last clip
        short = 2 * (lengths - begin) * front.hop_length < self._clip
        last = (last - short.long()).clamp_min(0)
        return torch.minimum(clip.unsqueeze(0), last.unsqueeze(1))


_ENCODER = frozenset(AudioEncoder.__init__.__annotations__) - {"return", "token_merging"}
_FRONT = {"name": "log_mel", "stack": 4, "norm": "fixed"}


def _options(dim: int, depth: int) -> dict[str, Any]:
    return {"dim": dim, "depth": depth, "mixer": {"name": "softmax", "num_heads": 4}}


register_sizes(
    "audio_text",
    AudioTextModel,
    {
        "tiny": ("Recordings and texts in one space, any mixer (`mixer`), two blocks of width 64.", _options(64, 2)),
        "small": (
            "Recordings and texts in one space, any mixer (`mixer`), four blocks of width 128.",
            _options(128, 4),
        ),
    },
    module=__name__,
    task="audio_retrieval",
    paper="arXiv:2410.02271",
    mlp_ratio=2.0,
    position="sinusoidal",
    front_end=_FRONT,
)
