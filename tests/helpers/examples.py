"""How many examples hypothesis tries: a few in the default suite, SEQZOO_EXAMPLES times as many in a deep run."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable
from typing import Any

from hypothesis import HealthCheck, Phase, example, given, seed, settings
from hypothesis import strategies as st


def examples(n: int) -> settings:
    """Settings for `n` examples of one property: `@examples(30)` below or above `@given(...)`.

    The examples are the same in every run and no time limit applies; SEQZOO_EXAMPLES (a whole number, 1 where it is not
    set) multiplies `n`. Fixtures may be used that keep nothing of an example (tmp_path, shared_data).
    Raises ValueError where SEQZOO_EXAMPLES is no positive whole number.
    """
    given = os.environ.get("SEQZOO_EXAMPLES") or "1"
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"SEQZOO_EXAMPLES={given!r} is no positive whole number")
    return settings(
        max_examples=n * int(given),
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


def forall(
    strategy: st.SearchStrategy[Any], holds: Callable[[Any], None], *, few: int, also: Iterable[Any] = ()
) -> None:
    """`holds` of `few` examples, counted as in `examples`, and of all in `also`: within a test that pytest repeats with
    other parameters, each of which draws its own."""
    chosen = settings(
        examples(few),
        derandomize=False,  # by the function's name, which all share
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    drawn = zlib.crc32(os.environ.get("PYTEST_CURRENT_TEST", "").encode())
    test = seed(drawn)(chosen(given(strategy)(holds)))
    for one in also:
        test = example(one)(test)
    test()
