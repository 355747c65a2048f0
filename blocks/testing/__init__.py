"""The conformance suite for token mixers: what a mixer must do to work in every backbone and pipeline.

`check_mixer(MyMixer)` runs it on a mixer of your own; our tests run it over the registry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..registry import did_you_mean
from . import basics, causality, padding, streaming
from .subject import CheckError, Factory, Subject, find_subjects

__all__ = ["CHECKS", "CheckError", "Subject", "applies", "check_mixer", "find_subjects", "run_check"]

Check = Callable[[Subject], None]

_EVERYWHERE: dict[str, Check] = {
    "shapes_and_dtypes": basics.check_shapes_and_dtypes,
    "device_and_dtype_arguments": basics.check_device_and_dtype_arguments,
    "gradients": basics.check_gradients,
    "gradcheck": basics.check_gradcheck,
    "batch_independence": causality.check_batch_independence,
    "padding": padding.check_padding,
    "eval_determinism": basics.check_eval_determinism,
    "state_dict_round_trip": basics.check_state_dict_round_trip,
    "copies": basics.check_copies,
    "noncontiguous": basics.check_noncontiguous,
    "autocast": basics.check_autocast,
    "refusals": basics.check_refusals,
    "compile": basics.check_compile,
    "export": basics.check_export,
    "options_covered": basics.check_options_covered,
}
_BY_PATTERN: dict[str, tuple[Check, set[str]]] = {
    "causality_jacobian": (causality.check_causality_jacobian, {"causal", "causal-cross"}),
    "causality_perturbation": (causality.check_causality_perturbation, {"causal"}),
    "causal_cross": (causality.check_causal_cross, {"causal-cross"}),
    "context_visible": (causality.check_context_visible, {"cross", "causal-cross"}),
    "context_padding": (padding.check_context_padding, {"cross", "causal-cross"}),
    "future_visible": (causality.check_future_visible, {"self"}),
    "packed": (padding.check_packed, {"self", "causal"}),
}
_STREAMING: dict[str, Check] = {
    "streaming": streaming.check_streaming,
    "streaming_masks": streaming.check_streaming_masks,
    "streaming_gradient": streaming.check_streaming_gradient,
    "state_is_a_value": streaming.check_state_is_a_value,
    "state_size": streaming.check_state_size,
    "state_rows": streaming.check_state_rows,
    "packed_states": padding.check_packed_states,
}
# Once per class and pattern: slow, about the class, or not for every option to keep (a window may look back
# only).
_FIRST = {"compile", "export", "options_covered", "future_visible"}

CHECKS: dict[str, Check] = {
    **_EVERYWHERE,
    **{name: check for name, (check, _) in _BY_PATTERN.items()},
    **_STREAMING,
}


def applies(name: str, subject: Subject) -> bool:
    """Whether a check is about the subject's pattern, state and place among the variants."""
    if name in _FIRST and not subject.first:
        return False
    if name in _BY_PATTERN:
        return subject.pattern in _BY_PATTERN[name][1]
    return name not in _STREAMING or (subject.cls.streaming and subject.pattern == "causal")


def run_check(name: str, subject: Subject) -> None:
    """Run one check. Raises CheckError 'Mixer[variant]: check: what was expected, what came'."""
    try:
        CHECKS[name](subject)
    except CheckError as broken:
        raise CheckError(f"{subject.label}: {name}: {broken}") from None
    except Exception as problem:
        message = f"{subject.label}: {name}: expected no error, got {type(problem).__name__}: {problem}"
        raise CheckError(message) from problem


def check_mixer(
    factory: Factory,
    *,
    dim: int = 16,
    options: Mapping[str, Any] | None = None,
    checks: Iterable[str] | None = None,
) -> list[str]:
    """Check a mixer against the contract of `Mixer`, in every pattern that it declares.

    factory: a registry name, a `Mixer` subclass or a factory. options: constructor options; None runs all of
    the class's `variants`, and the first one in each pattern that they leave out. checks: names from
    `CHECKS`, None for all that apply. Returns the names of the checks that ran.

    Parameters are moved by normal noise of 0.1, so that nothing hides behind a zero initial value. A mixer
    that selects tokens by rank may set `smooth = False` (its outputs jump: no numeric gradient, no comparison
    across precisions), one whose rounding mixes positions `exact = False`.

    Raises CheckError, an AssertionError, with 'Mixer[variant]: check: what was expected, what came'.
    """
    chosen = list(CHECKS if checks is None else checks)
    for name in chosen:
        if name not in CHECKS:
            raise ValueError(f"checks: no check {name!r}.{did_you_mean(name, CHECKS)}")
    ran = set()
    for subject in find_subjects(factory, dim=dim, options=options):
        for name in chosen:
            if applies(name, subject):
                run_check(name, subject)
                ran.add(name)
    return [name for name in chosen if name in ran]
