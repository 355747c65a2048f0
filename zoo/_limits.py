"""A bound on what building a saved model may ask for: its config can name any size, its weights show what it needs."""

from __future__ import annotations

import math
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# Beyond the weights' own size: what initialisation makes and throws away, tables that are computed, a larger head that
# the caller asked for.
TIMES, SPARE_BYTES = 16, 1 << 30
# Operations that make a tensor, for each tensor of the weights.
TIMES_EACH, SPARE_TENSORS = 50, 20_000
_LITTLE = 1 << 20  # elements


class BoundedBuilding(TorchDispatchMode):
    """Raises ValueError, before it is allocated, for a tensor with which those made under it exceed the bound.

    size, number: bytes and tensors of the weights. where: their file, for the message.
    """

    def __init__(self, size: int, number: int, where: str) -> None:
        super().__init__()
        self.most, self.where = TIMES * size + SPARE_BYTES, where
        self.most_tensors = TIMES_EACH * number + SPARE_TENSORS
        self.made = self.number = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch's own switch: nothing here is compiled, and telling the compiler so imports it, a second and more."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)
        if schema is None or any(value.alias_info is not None for value in schema.returns):
            return func(*args, **kwargs)  # in place, or a view
        self.number += 1
        result = None
        if _is_small(args, kwargs):
            result = func(*args, **kwargs)
            self.made += _bytes(result)
        else:
            self.made += _bytes_of(func, args, kwargs)
        if self.made > self.most or self.number > self.most_tensors:
            asked = f"{self.made:,} bytes" if self.made > self.most else f"{self.number:,} tensors"
            raise ValueError(
                f"the config beside {self.where} asks for a model of at least {asked}, which those weights cannot "
                "fill; it is not built"
            )
        return func(*args, **kwargs) if result is None else result


def _is_small(args: Any, kwargs: Any) -> bool:
    """Whether an operation can make but little: no more elements than the product of all sizes and numbers it is given.
    Then it just runs; the meta forms of many operations import the compiler."""
    most = 1.0
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor):
            most *= leaf.numel() + 1
        elif isinstance(leaf, (int, float)) and not isinstance(leaf, bool):
            most *= abs(leaf) + 1
    return most < _LITTLE


def _bytes(made: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(made) if isinstance(t, Tensor))


def _bytes_of(func: Any, args: Any, kwargs: Any) -> int:
    """What an operation would make, found on the meta device; 0 where that cannot be known.

    An elementwise one makes what its tensors broadcast to: the meta form of some imports the compiler too."""
    if torch.Tag.pointwise in func.tags:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        sizes = [reversed(t.shape) for t in given]
        number = math.prod(max(axis) for axis in zip_longest(*sizes, fillvalue=1))
        return number * max((t.element_size() for t in given), default=0)
    args, kwargs = tree_map_only(Tensor, lambda t: t.to("meta"), (args, dict(kwargs)))
    if any(argument.name == "device" for argument in func._schema.arguments):
        kwargs["device"] = torch.device("meta")
    kwargs.pop("generator", None)
    try:
        made = func(*args, **kwargs)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return 0
    return _bytes(made)
