"""The recordings that fit a text, best first, and where in them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from ...labelled_tables import TABLES
from ...loading import EvaluationLoader, IndexSampler, loader_options
from ...ranks import predicted
from ...text_vectors import encode_texts
from ..classify.data import ClipBatches, durations
from ..clips import Clip
from ..skipping import checked_clips
from ..sources import recordings_in
from .data import AudioPairData
from .module import AudioTextModule


def search(
    trainer: Any, module: AudioTextModule, data: AudioPairData, queries: Sequence[str], window_seconds: float
) -> list[dict[str, Any]]:
    """A record for each query and recording, the best recording first: query, rank, recording, score, and start and end
    of the clip that fits best, in seconds.

    data: its `path` names a recording, a folder of recordings or a table of pairs; prompts without a path and datasets
    give their test recordings. window_seconds: longer recordings are read in pieces of about this length, each heard by
    itself.
    """
    data.sample_rate = module.schema["sample_rate"]
    texts = encode_texts(queries, path=data.text_encoder)
    recordings = _recordings(data)
    seconds = durations(recordings)
    found = _clip_vectors(trainer, module, data, recordings, seconds, window_seconds)
    vectors = [torch.cat([clips for _, clips in pieces]) for pieces in found]
    scores = module.similarity(vectors, list(zip(texts.vectors, texts.tokens, strict=True))).double().numpy()
    rows = []
    for number, query in enumerate(queries):
        order = np.argsort(-scores[:, number], kind="stable")
        for rank, place in enumerate(order.tolist(), 1):
            clip = recordings[place]
            best = _best_clip(module, vectors[place], texts.vectors[number], texts.tokens[number])
            start, end = _spans(module, found[place], float(seconds[place]))[best]
            record = {"query": query, "rank": rank, "recording": clip.name, "score": float(scores[place, number])}
            record |= {"start": clip.start + start, "end": clip.start + end}
            rows.append({**record, "text": clip.label} if clip.label else record)
    return rows


def check_queries(query: Any) -> list[str]:
    """The texts of `query`, one or a list. Raises UserError where there is none or an empty one."""
    hint = "give query='what is heard', or a list of such texts"
    if query is None or query == []:
        raise UserError(f"query is missing: {hint}")
    queries = [str(text) for text in (query if isinstance(query, (list, tuple)) else [query])]
    for text in queries:
        if not text.strip():
            raise UserError(f"query has an empty text, {text!r}: {hint}")
    return queries


def _clip_vectors(
    trainer: Any,
    module: AudioTextModule,
    data: AudioPairData,
    recordings: Sequence[Clip],
    seconds: np.ndarray,
    window_seconds: float,
) -> list[list[tuple[float, Tensor]]]:
    """Of each recording: where its pieces begin, and the vectors (n, E) of their clips."""
    each = module.net.clip_seconds
    if not window_seconds >= each:
        raise UserError(f"task.window_seconds={window_seconds} must be at least model.clip_seconds={each}")
    window = math.floor(window_seconds / each) * each
    pieces = []
    for number, clip in enumerate(recordings):
        # what would be less than half a clip at the end stays with the piece before
        count = max(1, math.ceil((seconds[number] - each / 2) / window))
        for place in range(count):
            start, end = place * window, (place + 1) * window
            last = clip.end if place == count - 1 else clip.start + end
            pieces.append((number, start, clip._replace(start=clip.start + start, end=last)))
    lengths = durations([piece for _, _, piece in pieces])
    pieces = [pieces[place] for place in np.argsort(lengths, kind="stable")]
    batches = ClipBatches([piece for _, _, piece in pieces], [], sample_rate=data.sample_rate)
    loader = EvaluationLoader(
        batches, sampler=IndexSampler(len(pieces), data.eval_batch_size), **loader_options(data.num_workers)
    )
    found: list[list[tuple[float, Tensor]]] = [[] for _ in recordings]
    for numbers, vectors in predicted(trainer, module, loader):
        for place, clips in zip(numbers.tolist(), vectors, strict=True):
            number, start, _ = pieces[place]
            found[number].append((start, clips))
    return [sorted(parts, key=lambda part: part[0]) for parts in found]


def _spans(module: AudioTextModule, pieces: list[tuple[float, Tensor]], seconds: float) -> list[tuple[float, float]]:
    """Start and end of all clips of a recording, in seconds from its start."""
    spans = []
    ends = [start for start, _ in pieces[1:]] + [seconds]
    for (start, clips), end in zip(pieces, ends, strict=True):
        spans += [(start + a, start + b) for a, b in module.net.clip_spans(len(clips), end - start)]
    return spans


def _best_clip(module: AudioTextModule, clips: Tensor, text: Tensor, words: Tensor) -> int:
    with torch.no_grad():
        vector, tokens = module.net.embed_texts(text.to(module.device)[None], words.to(module.device)[None])
        return int(module.net.score.clip_relevance(clips.to(module.device)[None], vector, tokens)[0].argmax())


def _recordings(data: AudioPairData) -> list[Clip]:
    if data.source == "hub" or (data.source == "prompts" and data.path is None):
        data.setup("test")
        return data.sets["test"]
    if data.path is None:
        raise UserError("data.path is missing: a recording, a folder of recordings, or a CSV or JSONL table of pairs")
    files, path = recordings_in(data.path), Path(data.path)
    if path.suffix.lower() in TABLES:
        return checked_clips(data.pairs())
    return checked_clips([Clip(file, 0.0, None, "") for file in files])
