"""Which frames of a long video to look at: functions of times, scores and features, and a budget of frames.

A sampler is called as `sampler(times, scores, features, budget, *, seed=0) -> Sample`. times: seconds (N,), in order.
scores: how well each frame fits what is looked for, (N,), or a function of indices that computes those asked for; None
where nothing is looked for. features: (N, D), or None. budget: frames that may be chosen. Nothing is changed in place,
and the same arguments give the same frames.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, Protocol

import numpy as np

from ...errors import UserError, nearest
from .dpp import sample_dpp
from .inputs import Sample, Scores, Values
from .search import sample_time_search
from .tass import sample_tass
from .top_k import sample_top_k
from .uniform import sample_fps, sample_uniform

__all__ = [
    "SAMPLERS",
    "Sample",
    "Sampler",
    "Scores",
    "create_sampler",
    "list_samplers",
    "sample_dpp",
    "sample_fps",
    "sample_tass",
    "sample_time_search",
    "sample_top_k",
    "sample_uniform",
    "sampler_options",
]


class Sampler(Protocol):
    """What `create_sampler` gives."""

    def __call__(
        self, times: np.ndarray, scores: Values, features: Values, budget: int, *, seed: int = 0
    ) -> Sample: ...


SAMPLERS: dict[str, Sampler] = {
    "uniform": sample_uniform,
    "fps": sample_fps,
    "top_k": sample_top_k,
    "tass": sample_tass,
    "dpp": sample_dpp,
    "time_search": sample_time_search,
}
_INPUTS = {"times", "scores", "features", "budget", "seed"}


def list_samplers() -> list[str]:
    """The names of the samplers."""
    return list(SAMPLERS)


def sampler_options(name: str) -> dict[str, Any]:
    """The options of a sampler with their defaults. Raises UserError with the close names for an unknown one."""
    if name not in SAMPLERS:
        raise UserError(f"unknown sampler {name!r}.{nearest(str(name), SAMPLERS)}")
    parameters = inspect.signature(SAMPLERS[name]).parameters
    return {key: value.default for key, value in parameters.items() if key not in _INPUTS}


def create_sampler(name: str, **options: Any) -> Sampler:
    """The sampler of that name with these options; it can be pickled.

    Raises UserError for an unknown name or option, naming the close ones, and for a value that it does not take.
    """
    known = sampler_options(name)
    for key in options:
        if key not in known:
            hint = nearest(key, known) if known else " It has none."
            raise UserError(f"the sampler {name!r} has no option {key!r}.{hint}")
    sampler: Sampler = functools.partial(SAMPLERS[name], **options)
    # wrong values are said now, not when a video has been scored
    sampler(np.arange(2.0), np.arange(2.0), np.eye(2), 1)
    return sampler
