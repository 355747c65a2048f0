"""A value of another kind than its default: what is said, and that what is told to be written works."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf

from seqzoo.pipelines.config_errors import explain


def composed(*words: str) -> dict:
    GlobalHydra.instance().clear()
    with initialize_config_module("seqzoo.conf", version_base="1.3"):
        return OmegaConf.to_container(compose("config", overrides=list(words)))  # type: ignore[return-value]


@pytest.mark.parametrize("prefix", ["", "++"])
def test_a_mapping_over_a_list(prefix: str) -> None:
    hybrid = ("task=text", "data=stdlib", "model=hybrid_tiny")
    assert isinstance(composed(*hybrid)["model"]["mixer"], list)
    word = prefix + "model.mixer={name: mamba2, d_state: 16}"
    with pytest.raises(HydraException) as caught:
        composed(*hybrid, word)
    said = explain(caught.value, [*hybrid, word], ())
    better = prefix + "model.mixer=[{name: mamba2, d_state: 16}]"
    assert said == (
        f'the default of model.mixer is a list, a mapping cannot be merged over it: give a list, "{better}"'
    )
    assert composed(*hybrid, better)["model"]["mixer"] == [{"name": "mamba2", "d_state": 16}]


def test_a_list_over_a_section() -> None:
    with pytest.raises(HydraException) as caught:
        composed("callbacks.checkpoint=[1]")
    said = explain(caught.value, ["callbacks.checkpoint=[1]"], ())
    assert said.startswith("the default of callbacks.checkpoint is a section, a list cannot take its place")


def test_any_other_cause_is_named() -> None:
    error = HydraException("Error merging override a.b={c: 1}")
    error.__cause__ = ValueError("something is odd\nfull_key: a.b")
    assert explain(error, ["a.b={c: 1}"], ()) == "cannot take 'a.b={c: 1}': something is odd"
