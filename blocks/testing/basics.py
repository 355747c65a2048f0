"""Checks of what any module of ours must do: dtypes, gradients, determinism, saving, compiling, refusing."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..protocol import PATTERNS, MixerOutput, pattern_name
from ..registry import list_mixers
from .subject import (
    CLOSE,
    EQUAL64,
    Subject,
    converted,
    expect,
    expect_close,
    expect_finite,
    expect_gradients,
    expect_same,
    fail,
    gradients,
)

LENGTHS = (1, 2, 13, 67)


def check_shapes_and_dtypes(s: Subject) -> None:
    """(B, L, D) to (B, L, D) in the dtype given, for any length; fp32 and bf16 near the higher precision."""
    single = s.mixer(torch.float32)
    double = converted(single, torch.float64)
    half = converted(single, torch.bfloat16)
    half_single = converted(half, torch.float32)  # the rounded weights, so that only the arithmetic differs
    smooth = single.smooth
    for length in LENGTHS:
        for mixer, dtype in ((double, torch.float64), (single, torch.float32), (half, torch.bfloat16)):
            x, context = s.tensor(2, length, dtype=dtype), s.context(2, dtype=dtype)
            what = f"L={length}, {dtype}"
            with torch.no_grad():
                out = mixer(x, context)
            expect(isinstance(out, MixerOutput), f"{what}: expected a MixerOutput, got {type(out).__name__}")
            expect(out.y.shape == x.shape, f"{what}: expected y {tuple(x.shape)}, got {tuple(out.y.shape)}")
            expect(out.y.dtype == dtype, f"{what}: expected y in {dtype}, got {out.y.dtype}")
            expect(out.state is None, f"{what}: no state was passed in, so expected none back")
            for name, loss in out.aux.items():
                expect(
                    loss.dim() == 0,
                    f"{what}: expected the aux loss {name!r} to be a scalar, got {tuple(loss.shape)}",
                )
            expect_finite(out.y, what)
            if dtype == torch.float64:
                continue
            higher, above = (double, torch.float64) if dtype == torch.float32 else (half_single, torch.float32)
            with torch.no_grad():
                want = higher(x.to(above), None if context is None else context.to(above)).y
            if dtype == torch.float32:
                expect_close(out.y, want, CLOSE[dtype], what)
            elif smooth:  # a rounded score may select other tokens, which is no error of arithmetic
                value = ((out.y.float() - want).norm() / want.norm()).item()
                expect(
                    value <= CLOSE[dtype],
                    f"{what}: expected within {CLOSE[dtype]:g} of fp32 (rms), got {value:.3g}",
                )
    with torch.no_grad():
        y = double(s.tensor(2, 0), s.context(2)).y
        expect(y.shape == (2, 0, s.dim), f"L=0: expected y {(2, 0, s.dim)}, got {tuple(y.shape)}")
        y = double(s.tensor(2, 12 + double.num_prefix_tokens), s.context(2), grid=(3, 4)).y
    expect_finite(y, "with grid=(3, 4)")


def check_device_and_dtype_arguments(s: Subject) -> None:
    """The constructor's device and dtype reach every parameter and buffer."""
    accepted = inspect.signature(s.cls.__init__).parameters
    if "dtype" in accepted:
        mixer = s.build(dtype=torch.float64).eval()
        with torch.no_grad():
            y = mixer(s.tensor(2, 5), s.context(2)).y
        expect(y.dtype == torch.float64, f"dtype=torch.float64: expected y in float64, got {y.dtype}")
    if "device" in accepted:
        mixer = s.build(device="meta")
        for name, tensor in [*mixer.named_parameters(), *mixer.named_buffers()]:
            expect(tensor.is_meta, f"device='meta': expected {name} there, it is on {tensor.device}")


def check_gradients(s: Subject) -> None:
    """Every parameter and every input gets a finite gradient that is not always zero (in training mode)."""
    alive: set[str] = set()
    names: list[str] = []
    for seed, length in ((0, 13), (1, 13), (2, 40), (3, 2)):
        mixer = s.mixer(seed=seed).train()
        x, context = s.tensor(3, length, seed=seed).requires_grad_(), s.context(3, seed=seed)
        context = None if context is None else context.requires_grad_()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            out = mixer(x, context)
        objective = (out.y * s.tensor(3, length, seed=seed + 50)).sum() + sum(out.aux.values())
        found, names = gradients(objective, mixer, x, context)
        for gradient, name in zip(found, names, strict=True):
            expect_finite(gradient, f"gradient of {name} at L={length}")
            if bool((gradient != 0).any()):
                alive.add(name)
    dead = [name for name in names if name not in alive]
    expect(not dead, f"expected a nonzero gradient for everything, got none for {', '.join(dead)}")


def check_gradcheck(s: Subject) -> None:
    """Analytic against numeric gradients in fp64, for inputs and parameters, with a padded position."""
    mixer = s.mixer()
    if not mixer.smooth:
        return  # a selection jumps; its gradient is compared elsewhere with that of the separate sequences
    x, context = s.tensor(2, 4).requires_grad_(), s.context(2, 3)
    context = None if context is None else context.requires_grad_()
    mask = torch.tensor([[True] * 4, [True] * 3 + [False]])
    parameters = {n: p.detach().clone().requires_grad_() for n, p in mixer.named_parameters() if p.requires_grad}

    def function(*tensors: Tensor) -> Tensor:
        weights = dict(zip(parameters, tensors, strict=False))
        inputs = tensors[len(parameters) :]
        out = torch.func.functional_call(mixer, weights, inputs, {"mask": mask})
        return torch.cat([out.y.flatten(), *(loss.reshape(1) for loss in out.aux.values())])

    tensors = (*parameters.values(), x, *([] if context is None else [context]))
    try:
        torch.autograd.gradcheck(function, tensors, fast_mode=True, atol=1e-6, rtol=1e-4)
    except RuntimeError as mismatch:
        fail(f"expected analytic gradients equal to numeric ones: {' '.join(str(mismatch).split())[:400]}")


def check_eval_determinism(s: Subject) -> None:
    """In eval mode the same input gives the same bits; the global generator and the buffers stay."""
    mixer, x, context = s.mixer(), s.tensor(2, 13), s.context(2)
    before = {name: value.clone() for name, value in mixer.state_dict().items()}
    outputs = []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for seed in (0, 1, 2):
            torch.manual_seed(seed)
            state = torch.random.get_rng_state()
            outputs.append(mixer(x, context).y)
            expect(
                torch.equal(torch.random.get_rng_state(), state),
                "expected the global random generator untouched in eval mode; it was advanced",
            )
    for y in outputs[1:]:
        expect_same(y, outputs[0], "two calls in eval mode under different global seeds")
    for name, value in mixer.state_dict().items():
        expect_same(value, before[name], f"{name} after a call in eval mode")


def check_state_dict_round_trip(s: Subject) -> None:
    """Weights saved and loaded strictly into another instance give the same bits; they hold tensors only."""
    source, target, x, context = s.mixer(seed=0), s.mixer(seed=7), s.tensor(2, 13), s.context(2)
    with torch.no_grad():
        want = source(x, context).y
        if list(source.parameters()):
            expect(
                not torch.equal(target(x, context).y, want),
                "two seeds gave one output: the weights do not matter",
            )
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file, weights_only=True), strict=True)
        expect_same(target(x, context).y, want, "output after loading the state dict into another instance")


def check_copies(s: Subject) -> None:
    """copy.deepcopy and pickle give a mixer of the same output."""
    mixer, x, context = s.mixer(), s.tensor(2, 7), s.context(2)
    with torch.no_grad():
        want = mixer(x, context).y
        expect_same(copy.deepcopy(mixer)(x, context).y, want, "output of a deep copy")
        try:
            clone = pickle.loads(pickle.dumps(mixer))
        except (pickle.PicklingError, AttributeError) as problem:
            if "<locals>" in s.cls.__qualname__:
                return  # Python pickles no class defined inside a function; nothing the mixer could do
            fail(f"expected a mixer that pickles, got {problem}")
        expect_same(clone(x, context).y, want, "output of a pickled copy")


def check_noncontiguous(s: Subject) -> None:
    """Any stride is welcome, and inputs are left as they were."""
    mixer, x, context = s.mixer(), s.tensor(3, 7), s.context(3)
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1, 4:] = False

    def strided(tensor: Tensor) -> Tensor:
        wide = torch.full((tensor.shape[1] * 2, tensor.shape[0], *tensor.shape[2:]), 7, dtype=tensor.dtype)
        view = wide[::2].transpose(0, 1)
        view.copy_(tensor)
        return view

    with torch.no_grad():
        want = mixer(x, context, mask=mask).y
        inputs = strided(x), None if context is None else strided(context)
        got = mixer(*inputs, mask=strided(mask)).y
        expect_close(got, want, CLOSE[torch.float64], "with non-contiguous x, context and mask")
        expect_same(inputs[0], x, "x after the call")
        expanded = s.tensor(1, 7).expand(3, 7, s.dim)
        expect_close(
            mixer(expanded, context).y,
            mixer(expanded.contiguous(), context).y,
            CLOSE[torch.float64],
            "with an expanded x",
        )


def check_autocast(s: Subject) -> None:
    """bf16 autocast on the CPU: finite, near fp32, and with finite gradients."""
    mixer, x, context = (
        s.mixer(torch.float32),
        s.tensor(2, 13, dtype=torch.float32),
        s.context(2, dtype=torch.float32),
    )
    with torch.no_grad():
        want = mixer(x, context).y
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mixer(x, context)
    expect_finite(out.y, "output under autocast")
    if mixer.smooth:
        value = ((out.y.detach().float() - want).norm() / want.norm()).item()
        expect(
            value <= 2 * CLOSE[torch.bfloat16],
            f"expected within 0.04 of fp32 (rms) under autocast, got {value:.3g}",
        )
    found, names = gradients(out.y.float().square().sum(), mixer, x)
    for gradient, name in zip(found, names, strict=True):
        expect_finite(gradient, f"gradient of {name} under autocast")


def check_compile(s: Subject) -> None:
    """torch.compile takes the whole forward as one graph; outputs and gradients stay."""
    mixer, x, context = s.mixer(), s.tensor(2, 13).requires_grad_(), s.context(2)
    torch._dynamo.reset()
    try:
        compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")(x, context).y
    except torch._dynamo.exc.TorchDynamoException as problem:
        fail(f"expected one graph under fullgraph=True, got {' '.join(str(problem).split())[:400]}")
    want, weight = mixer(x, context).y, s.tensor(2, 13, seed=5)
    expect_close(compiled, want, EQUAL64, "compiled output")
    got, names = gradients((compiled * weight).sum(), mixer, x)
    expect_gradients(got, gradients((want * weight).sum(), mixer, x)[0], names, "compiled")


def check_export(s: Subject) -> None:
    """torch.export takes the forward too, for deployment: the exported program gives the same outputs."""
    mixer, x, context = s.mixer(), s.tensor(2, 13), s.context(2)
    inputs = (x,) if context is None else (x, context)
    with torch.no_grad():
        try:
            program = torch.export.export(mixer, inputs).module()
        except Exception as problem:
            fail(f"expected a program, got {type(problem).__name__}: {' '.join(str(problem).split())[:400]}")
        expect_close(program(*inputs).y, mixer(*inputs).y, EQUAL64, "exported output")


class OtherState(NamedTuple):
    """A state that no mixer has."""

    memory: Tensor


def check_refusals(s: Subject) -> None:
    """What the mixer cannot do is a ValueError: patterns and options when built, inputs when called."""

    def refused(what: str, call: Any, *, naming: tuple[str, ...] = (), errors: Any = ValueError) -> None:
        try:
            call()
        except errors as refusal:
            missing = [word for word in naming if word not in str(refusal)]
            expect(
                not missing,
                f"{what}: expected the message to name {', '.join(missing)}; it is {str(refusal)!r}",
            )
        except Exception as other:
            fail(f"{what}: expected ValueError, got {type(other).__name__}: {other}")
        else:
            fail(f"{what}: expected ValueError, it was accepted")

    accepted = inspect.signature(s.cls.__init__).parameters
    if isinstance(s.factory, str) or inspect.isclass(s.factory):
        for causal in (False, True):
            for cross in (False, True):
                pattern = pattern_name(causal, cross)
                if pattern in s.cls.patterns:
                    continue
                asked = {"causal": causal, "cross": cross}
                plain = replace(s, options={k: v for k, v in asked.items() if v or k in accepted})
                words = (pattern, *list_mixers(pattern=pattern)) if set(asked) <= set(accepted) else ()
                refused(f"the pattern {pattern!r}", plain.build, naming=words)
        refused("an unknown option", lambda: s.build(no_such_option=1), naming=("no_such_option",))
        for dim in (0, -4, "16"):
            refused(f"dim={dim!r}", replace(s, dim=cast(int, dim)).build)
    mixer, x, context = s.mixer(), s.tensor(2, 5), s.context(2)
    ones = torch.ones(2, 5, dtype=torch.bool)
    packed = torch.tensor([0, 2, 5], dtype=torch.int32)
    refused("x of another width", lambda: mixer(x[..., :-1], context))
    refused("x without a batch", lambda: mixer(x[0], context))
    refused("a float mask", lambda: mixer(x, context, mask=ones.double()), naming=("mask",))
    refused("a mask of another length", lambda: mixer(x, context, mask=ones[:, :-1]), naming=("mask",))
    if context is None:
        refused("a context for a self pattern", lambda: mixer(x, x), naming=("context",))
        refused("cu_seqlens with two rows", lambda: mixer(x, cu_seqlens=packed), naming=("cu_seqlens",))
        refused("cu_seqlens with a mask", lambda: mixer(x[:1], mask=ones[:1], cu_seqlens=packed))
    else:
        refused("no context for a cross pattern", lambda: mixer(x), naming=("context",))
        refused("a context of another batch", lambda: mixer(x, context[:1]), naming=("context",))
        refused(
            "a float context_mask",
            lambda: mixer(x, context, context_mask=torch.ones(2, 6)),
            naming=("context_mask",),
        )
        refused("cu_seqlens for a cross pattern", lambda: mixer(x[:1], context[:1], cu_seqlens=packed))
    refused("a grid of other tokens", lambda: mixer(x, context, grid=(2, 7)), naming=("grid",))
    if mixer.streaming and mixer.pattern == "causal":
        foreign = OtherState(torch.zeros(2, 3, dtype=torch.float64))
        refused("a state of another mixer", lambda: mixer(x, state=foreign), naming=("state", "OtherState"))
        refused("a state of another batch", lambda: mixer(x, state=mixer.init_state(3)), naming=("state",))
    else:
        refused(
            "a state where none is carried",
            lambda: mixer(x, context, state=(torch.zeros(2, 1),)),
            naming=("state",),
        )
        refused("init_state where none is carried", lambda: mixer.init_state(2))
        refused("state_size where none is carried", lambda: mixer.state_size(5))


def check_options_covered(s: Subject) -> None:
    """Every option of the constructor appears in a declared variant, and there is no catch-all."""
    if not s.declared:
        return
    parameters = list(inspect.signature(s.cls.__init__).parameters.values())[2:]
    for parameter in parameters:
        expect(
            parameter.kind is inspect.Parameter.KEYWORD_ONLY,
            f"expected the constructor's options to be keyword-only and named, got {parameter}",
        )
    skipped = {"causal", "cross", "device", "dtype"}
    covered = {key for options in s.cls.variants.values() for key in options}
    missing = [p.name for p in parameters if p.name not in covered | skipped]
    expect(not missing, f"expected every option in some variant, missing {', '.join(missing)}")
    expect(set(s.cls.patterns) <= set(PATTERNS), f"expected patterns of {PATTERNS}, got {sorted(s.cls.patterns)}")
