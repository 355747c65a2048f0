"""A model as a program that needs neither this package nor its sources: `torch.export`, for one length or for any.

While a model is exported every operation takes its portable form (`kernels.portable`), so that the program is made of
torch's own operations.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..blocks.layers.chunk_attention import ChunkAttention
from ..blocks.layers.positions import LearnedPosition
from ..blocks.layers.relative_bias import SimpleRelativeBias

# Where the length lies in the first input, by the kind of `input_spec`.
_LENGTH_AXIS = {"tokens": -1, "samples": 1, "frame features": 1, "frames": 1}
_UNITS = {"tokens": "tokens", "samples": "samples", "frame features": "frames", "frames": "frames"}
_NO_LENGTH = {
    "image": "the grid of its patches is part of the program: give length=None, and example_inputs of another size",
    "series": "its weights are of seq_len and pred_len steps: give length=None, or build it with another seq_len",
}
# Longer than any chunk of the portable forms, so that their loops are in the program, and no multiple of one.
_GENERIC = {"tokens": 150, "samples": 40_123, "frame features": 75, "frames": 13}
# Rows of the example where their number is free: what is equal to another size by chance would be taken for it.
ROWS = 5
_PERFORMANCE = re.compile(r"for expression Ne\(")

Length = int | Literal["dynamic"] | None
Batch = int | Literal["dynamic"]


class PlainModel(nn.Module):
    """A model whose outputs are a tensor, or tensors by name: neither classes of ours, nor states, nor losses.

    names: of what it returns, known after a first call; absent: inputs of a forecaster without any width, which a
    program cannot be given.
    """

    def __init__(self, model: nn.Module, absent: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.model = model
        self.absent = {k: tuple(v.shape[1:]) for k, v in (absent or {}).items()}
        self.names: tuple[str, ...] = ()

    def forward(self, *inputs: Any) -> Any:
        if self.absent:
            given = inputs[0]
            like = next(iter(given.values()))
            inputs = ({**given, **{k: like.new_zeros(like.shape[0], *size) for k, size in self.absent.items()}},)
        found = plain_outputs(self.model(*inputs))
        self.names = tuple(found)
        return next(iter(found.values())) if len(found) == 1 else found


def plain_outputs(output: Any) -> dict[str, Tensor]:
    """The tensors that a model gives, by name; `y` where it gives one."""
    if isinstance(output, Tensor):
        return {"y": output}
    if hasattr(output, "_asdict"):
        return {k: v for k, v in output._asdict().items() if isinstance(v, Tensor)}
    if isinstance(output, (list, tuple)):
        return {f"y{i}": v for i, v in enumerate(output)}
    raise ValueError(f"a program returns tensors, this model a {type(output).__name__}")


def length_axis(model: nn.Module) -> int | None:
    """The axis of the first input that is its length; None for images and windows of series."""
    kind = _spec(model).get("kind")
    return _LENGTH_AXIS.get(kind) if isinstance(kind, str) else None


def inputs_of_length(model: nn.Module, length: int, batch_size: int = 1) -> tuple[Any, ...]:
    """The model's example inputs, repeated or cut to a length. Raises ValueError for a model without a length."""
    axis = length_axis(model)
    if axis is None:
        raise ValueError(refusal_of_length(model) or f"{type(model).__name__} has no length")
    first, *others = _examples(model, batch_size)
    place = torch.arange(length, device=first.device) % first.shape[axis]
    return (first.index_select(axis % first.dim(), place), *others)


def refusal_of_length(model: nn.Module) -> str | None:
    """Why a model cannot be exported for any length, as far as its kind of input says so; None where it can."""
    kind = str(_spec(model).get("kind", "without input_spec"))
    if kind in _LENGTH_AXIS:
        return None
    why = _NO_LENGTH.get(kind, "give length=None and its example_inputs")
    return f"{_name(model)} takes inputs of kind {kind!r}, which have no length that could change; {why}"


def export_model(
    model: nn.Module,
    *,
    length: Length = "dynamic",
    batch: Batch = "dynamic",
    example_inputs: tuple[Any, ...] | None = None,
) -> torch.export.ExportedProgram:
    """The forward pass of a model, in evaluation, as a program of torch's own operations.

    length: "dynamic" for any, from 2 to what the model can take (`max_len` of learned positions); a number for this one
    alone, which is quicker to make and to run; None for that of the example. It counts tokens, samples or frames.
    batch: "dynamic", or the number of rows. example_inputs: positional arguments of `forward`; None: those of the
    model, which takes length=None. `program.module()(*inputs)` returns the model's `y`, or a dict where it gives more
    (the lengths of rows, a mask), without auxiliary losses.

    Raises ValueError for a model that has no such form, saying what stands in the way and what can be exported instead.
    """
    _check(length, batch)
    if length == "dynamic":
        reason = refusal_of_length(model)
        if reason is not None:
            raise ValueError(f"length='dynamic': {reason}")
    was_training = model.training
    model.eval()
    try:
        program, names = _export(model, length, batch, example_inputs)
    finally:
        model.train(was_training)
    _refuse_own_operations(program, model)
    program.graph_module.meta["outputs"] = names
    return program


def _export(
    model: nn.Module, length: Length, batch: Batch, example: tuple[Any, ...] | None
) -> tuple[torch.export.ExportedProgram, tuple[str, ...]]:
    rows = ROWS if batch == "dynamic" else batch
    inputs = example or _inputs(model, length, rows)
    inputs, absent = without_empty(inputs)
    plain = PlainModel(model, absent).eval()
    with torch.no_grad():
        plain(*inputs)  # whose names are known from now on; an export leaves attributes as they were
        shapes = _shapes(model, inputs, length == "dynamic", batch == "dynamic")
        if shapes is None:
            return _run(plain, inputs, None), plain.names
        try:
            return _run(plain, inputs, shapes), plain.names
        except torch._dynamo.exc.UserError as error:
            bounded = _bounded(str(error), shapes)
            if bounded is None:
                raise _refused(model, length, error) from error
        try:
            return _run(plain, inputs, bounded), plain.names
        except torch._dynamo.exc.UserError as error:
            raise _refused(model, length, error) from error


def _run(plain: PlainModel, inputs: tuple[Any, ...], shapes: Any) -> torch.export.ExportedProgram:
    with general_sizes():
        program = torch.export.export(
            plain,
            inputs,
            dynamic_shapes=None if shapes is None else (shapes,),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    for part in program.graph_module.modules():
        if isinstance(part, torch.fx.GraphModule):
            _drop_performance_checks(part)
    return program


@contextmanager
def general_sizes() -> Iterator[None]:
    """Sizes that are not known count as general ones: not as 1, not as those that make a tensor contiguous."""
    from torch.fx.experimental import _config

    before = _config.backed_size_oblivious
    _config.backed_size_oblivious = True
    try:
        yield
    finally:
        _config.backed_size_oblivious = before


def _drop_performance_checks(part: torch.fx.GraphModule) -> None:
    """Leave out "this size is not that one": torch asks so to choose among equal ways through its memory."""
    for node in list(part.graph.nodes):
        check = node.op == "call_function" and node.target is torch.ops.aten._assert_scalar.default
        if check and len(node.args) > 1 and _PERFORMANCE.search(str(node.args[1])):
            part.graph.erase_node(node)
    part.graph.eliminate_dead_code()
    part.recompile()


def _inputs(model: nn.Module, length: Length, rows: int) -> tuple[Any, ...]:
    if length is None:
        return _examples(model, rows)
    if length != "dynamic":
        return inputs_of_length(model, length, rows)
    return inputs_of_length(model, generic_length(model), rows)


def generic_length(model: nn.Module) -> int:
    """The length that a program for any is made with."""
    usual, longest = _GENERIC[_spec(model)["kind"]], _longest(model)
    return usual if longest is None else min(usual, longest)


def _longest(model: nn.Module) -> int | None:
    """What tables with a row for every position bound the length to, where their unit is that of the input."""
    if _spec(model).get("kind") not in ("tokens", "frame features"):
        return None
    parts = list(model.modules())
    found = [part.max_len for part in parts if isinstance(part, LearnedPosition)]
    whole = [part.bias for part in parts if isinstance(part, ChunkAttention) and part.chunk_size is None]
    found += [bias.max_len for bias in whole if isinstance(bias, SimpleRelativeBias)]
    return min(found, default=None)


def _shapes(model: nn.Module, inputs: tuple[Any, ...], dynamic_length: bool, dynamic_batch: bool) -> Any:
    """`dynamic_shapes` of the inputs; None where everything is fixed."""
    if not (dynamic_length or dynamic_batch):
        return None
    batch = torch.export.Dim("batch", min=1)
    longest = _longest(model)
    length = torch.export.Dim("length", min=2) if longest is None else torch.export.Dim("length", min=2, max=longest)
    axis = length_axis(model) if dynamic_length else None

    def of(x: Any, place: int) -> Any:
        if isinstance(x, Mapping):
            return {key: of(part, -1) for key, part in x.items()}
        sizes = {0: batch} if dynamic_batch else {}
        if place == 0 and axis is not None:
            sizes[axis % x.dim()] = length
        return sizes

    return tuple(of(x, i) for i, x in enumerate(inputs))


def _bounded(message: str, shapes: Any) -> Any:
    """The shapes with the largest length that torch found the model to take; None where it found something else."""
    found = re.search(r"length = Dim\('length'(?:, min=(\d+))?, max=(\d+)\)", message)
    if found is None or (found[1] is not None and int(found[1]) > 2):
        return None
    length = torch.export.Dim("length", min=2, max=int(found[2]))

    def of(x: Any) -> Any:
        if isinstance(x, Mapping):
            return {k: of(v) for k, v in x.items()}
        if isinstance(x, tuple):
            return tuple(of(v) for v in x)
        return length if getattr(x, "__name__", "") == "length" else x

    return of(shapes)


def _refused(model: nn.Module, length: Length, error: Exception) -> ValueError:
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip().startswith("-")]
    reason = lines[0] if lines else str(error).splitlines()[0]
    other = "length=<number> exports it for one length" if length == "dynamic" else "batch=<number> fixes its rows"
    return ValueError(f"{_name(model)} cannot be exported for any size: {reason}; {other}")


def _refuse_own_operations(program: torch.export.ExportedProgram, model: nn.Module) -> None:
    names = {
        str(node.target)
        for part in program.graph_module.modules()
        if isinstance(part, torch.fx.GraphModule)
        for node in part.graph.nodes
        if node.op == "call_function" and str(node.target).startswith("seqzoo")
    }
    if names:
        raise ValueError(
            f"the program of {_name(model)} would hold {', '.join(sorted(names))}, which nothing but this package "
            "knows: build the model with backend='auto'"
        )


def without_empty(inputs: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
    """The inputs without the entries of a batch that have no width, and those."""
    if not (len(inputs) == 1 and isinstance(inputs[0], Mapping)):
        return tuple(inputs), {}
    empty = {k: v for k, v in inputs[0].items() if 0 in v.shape[1:]}
    return ({k: v for k, v in inputs[0].items() if k not in empty},), empty


def _examples(model: Any, rows: int) -> tuple[Any, ...]:
    if not hasattr(model, "example_inputs"):
        raise ValueError(f"{type(model).__name__} has no example_inputs: give example_inputs=(...)")
    return tuple(model.example_inputs(rows))


def _spec(model: Any) -> dict[str, Any]:
    return getattr(model, "input_spec", None) or {}


def _name(model: Any) -> str:
    config = getattr(model, "config", None)
    return str(config["name"]) if isinstance(config, Mapping) and "name" in config else type(model).__name__


def _check(length: Any, batch: Any) -> None:
    for name, value, words in (("length", length, ("dynamic", None)), ("batch", batch, ("dynamic",))):
        if value in words or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
            continue
        choices = " or ".join(repr(word) for word in words)
        raise ValueError(f"{name}={value!r} must be a positive number or {choices}")
