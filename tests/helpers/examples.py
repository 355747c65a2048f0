"""How many examples hypothesis tries: a few in the default suite, SEQZOO_EXAMPLES times as many in a deep run."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings


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
