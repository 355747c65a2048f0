"""Reading the config of a public checkpoint: values that a converter does not know are refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

_MISSING = object()
# our words of `positions.scale_frequencies` for those of transformers
ROPE_KINDS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low": "low_freq_factor",
        "high": "high_freq_factor",
        "length": "original_max_position_embeddings",
    },
}


class Rope(NamedTuple):
    """base: of the wavelengths. share: of the channels of a head that turn. scaling: as `positions.rope` takes it."""

    base: float
    share: float
    scaling: dict[str, Any] | None


class Config:
    """The values of a config.json and the words that name it in messages."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = dict(values), where

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)

    def _value(self, key: str, default: Any) -> Any:
        """None is as good as nothing: files have `null` where a class takes its default."""
        value = self.values.get(key)
        return default if value is None else value

    def integer(self, key: str, default: Any = _MISSING) -> int:
        """A positive integer. Raises ValueError where it is missing or another value."""
        value = self._value(key, default)
        if value is _MISSING:
            raise ValueError(f"{self.where} has no {key}")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{self.where} has {key}={value!r}, expected a positive integer")
        return value

    def number(self, key: str, default: float) -> float:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{self.where} has {key}={value!r}, expected a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"{self.where} has {key}={value!r}, expected true or false")
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """Raise ValueError unless the value is one of `allowed`, the first of which is what a missing key means."""
        value = self.values.get(key, allowed[0])
        if not any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed):
            choices = " or ".join(repr(a) for a in allowed)
            raise ValueError(f"{self.where} has {key}={value!r}; only {choices} can be converted")

    def absent(self, *keys: str) -> None:
        """Raise ValueError for keys that have a value other than None and False: what they switch on is not ours."""
        for key in keys:
            if self.values.get(key) not in (None, False):
                raise ValueError(f"{self.where} has {key}={self.values[key]!r}, which cannot be converted")

    def choice(self, key: str, choices: Mapping[str, Any], default: str) -> Any:
        """The value of `choices` under the config's word."""
        word = self.values.get(key, default)
        if word not in choices:
            raise ValueError(f"{self.where} has {key}={word!r}; only {' or '.join(choices)} can be converted")
        return choices[word]

    def rope(self, *, base_keys: Sequence[str] = (), share_keys: Sequence[str] = (), share: float = 1.0) -> Rope:
        """The rotary positions, of old and new forms of the config.

        base_keys, share_keys: where old forms have them; share: where none has. Raises ValueError for kinds of scaled
        positions that ours do not have.
        """
        new, old = self.get("rope_parameters") or {}, self.get("rope_scaling") or {}
        for name, table in (("rope_parameters", new), ("rope_scaling", old)):
            if not isinstance(table, Mapping) or any(isinstance(v, Mapping) for v in table.values()):
                raise ValueError(f"{self.where} has {name}={table!r}; one set of values for all layers is expected")
            kind = table.get("rope_type", table.get("type", "default"))
            if kind not in ROPE_KINDS:
                raise ValueError(
                    f"{self.where} has {name} of the type {kind!r}; only {' or '.join(ROPE_KINDS)} can be converted"
                )
        kind = new.get("rope_type", old.get("rope_type", old.get("type", "default")))
        tables = Config({k: v for k, v in {**self.values, **old, **new}.items() if v is not None}, self.where)

        def find(keys: Sequence[str], default: float) -> float:
            return tables.number(next((key for key in keys if key in tables), keys[0]), default)

        for key in ROPE_KINDS[kind].values():
            if key not in tables:
                raise ValueError(f"{self.where} has positions of the type {kind!r} without {key}")
        scaling = {ours: tables.number(key, 1.0) for ours, key in ROPE_KINDS[kind].items()}
        return Rope(
            find(("rope_theta", *base_keys), 10000.0),
            find(("partial_rotary_factor", *share_keys), share),
            {"kind": kind, **scaling} if scaling else None,
        )


GELU: dict[str, dict[str, Any] | str] = {
    "gelu": "gelu",
    "gelu_new": {"name": "gelu", "approximate": "tanh"},
    "gelu_pytorch_tanh": {"name": "gelu", "approximate": "tanh"},
}
