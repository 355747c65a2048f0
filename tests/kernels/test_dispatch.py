"""The choice of a backend: nothing is dropped, a refusal names its reason, auto says what it took once."""

import logging

import pytest
import torch

from seqzoo.kernels import dispatch
from seqzoo.kernels.dispatch import backends, choose_backend, register_backend


def quick(*args):
    return "quick"


def sure(*args):
    return "sure"


@pytest.fixture
def toy(monkeypatch):
    """An operation with a quick backend that takes only float32 on the CPU, and a sure one."""
    backends()  # imports the kernel folders, so that they do not register into the toy table
    monkeypatch.setattr(dispatch, "_BACKENDS", {})
    monkeypatch.setattr(dispatch, "_LOGGED", set())
    register_backend("toy", "quick", quick, note="fast", dtypes=(torch.float32,), devices=("cpu",))
    register_backend("toy", "sure", sure, note="the oracle", features=("state", "mask"))
    return "toy"


def test_auto_takes_the_first_that_can(toy):
    assert choose_backend(toy).name == "quick"
    assert choose_backend(toy, dtype=torch.float32, device="cpu", state=False).run() == "quick"
    assert choose_backend(toy, dtype=torch.float64).name == "sure"
    assert choose_backend(toy, device="cuda:1").name == "sure"
    assert choose_backend(toy, device=torch.device("meta")).name == "sure"
    assert choose_backend(toy, state=True).name == "sure"


def test_a_forced_backend_runs_or_raises(toy):
    assert choose_backend(toy, "sure").name == "sure"
    with pytest.raises(ValueError, match=r"backend='quick' does not support state; backends that can: sure"):
        choose_backend(toy, "quick", state=True, mask=False)
    with pytest.raises(ValueError, match=r"'quick' does not take torch.float64; backends that can: sure"):
        choose_backend(toy, "quick", dtype=torch.float64)
    with pytest.raises(ValueError, match=r"'quick' does not run on cuda"):
        choose_backend(toy, "quick", device="cuda")
    with pytest.raises(ValueError, match=r"'sure' does not support varlen; no other backend can"):
        choose_backend(toy, "sure", varlen=True)
    with pytest.raises(ValueError, match=r"backend='qick' is unknown; choose from auto, quick, sure"):
        choose_backend(toy, "qick")


def test_a_size_beyond_a_limit_is_refused(toy):
    register_backend(toy, "narrow", quick, note="narrow", limits={"key": 64})
    assert choose_backend(toy, "narrow", sizes={"key": 64, "value": 900}).name == "narrow"
    with pytest.raises(ValueError, match=r"'narrow' takes key sizes up to 64, not 65; backends that can: quick, sure"):
        choose_backend(toy, "narrow", sizes={"key": 65})


def test_an_interpreted_backend_takes_cpu_tensors_only_when_asked_for_by_name(monkeypatch):
    backends()
    monkeypatch.setattr(dispatch, "_BACKENDS", {})
    register_backend("toy", "triton", quick, note="fast", devices=("cuda",), interpretable=True)
    register_backend("toy", "sure", sure, note="the oracle")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_backend("toy", device="cpu").name == "sure"
    assert choose_backend("toy", "triton", device="cpu").name == "triton"
    with pytest.raises(ValueError, match="does not run on mps"):
        choose_backend("toy", "triton", device="mps")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="does not run on cpu"):
        choose_backend("toy", "triton", device="cpu")


def test_auto_refuses_when_none_can(toy):
    with pytest.raises(ValueError, match=r"quick does not support varlen; sure does not support varlen"):
        choose_backend(toy, varlen=True)
    with pytest.raises(ValueError, match="none is registered"):
        choose_backend("no_such_op")


def test_auto_logs_each_choice_once_with_its_reason(toy, caplog):
    with caplog.at_level(logging.INFO, logger="seqzoo"):
        for _ in range(2):
            choose_backend(toy, state=True)
            choose_backend(toy, "sure")
    assert [r.getMessage() for r in caplog.records] == ["toy: backend sure (the oracle; quick does not support state)"]
    with caplog.at_level(logging.INFO, logger="seqzoo"):
        choose_backend(toy)
    assert [r.getMessage() for r in caplog.records][1:] == ["toy: backend quick (fast)"]


def test_probe_refuses_and_shows_in_the_table(toy):
    register_backend("toy", "gpu", lambda: None, note="fastest", probe=lambda: "needs a GPU")
    with pytest.raises(ValueError, match=r"backend='gpu' needs a GPU; backends that can: quick, sure"):
        choose_backend(toy, "gpu")
    assert backends()["toy"] == {"quick": "ok", "sure": "ok", "gpu": "needs a GPU"}


def test_a_name_is_taken_once(toy):
    register_backend("toy", "quick", quick, note="again")  # the same function: a module imported twice
    for name in ("quick", "auto"):
        with pytest.raises(ValueError, match=f"backend name '{name}' is already taken"):
            register_backend("toy", name, sure, note="another")


def test_the_table_finds_every_kernel_folder():
    table = backends()
    assert table["linear_attention"].items() >= {"chunked": "ok", "naive": "ok"}.items()
