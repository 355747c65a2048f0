"""The registry: names, classes, options, and messages that name the nearest valid choice."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

import seqzoo
from seqzoo.blocks import registry
from seqzoo.blocks.protocol import PATTERNS, Mixer, MixerOutput
from seqzoo.blocks.registry import create_mixer, did_you_mean, list_mixers, mixer_info, register_mixer


class Toy(Mixer):
    patterns = frozenset({"self", "causal"})
    streaming = True

    def __init__(self, dim, *, gain=2.0, causal=False, cross=False, device=None, dtype=None):
        super().__init__(dim, causal=causal, cross=cross)
        self.gain = gain

    def forward(self, x, context=None, **options):
        return MixerOutput(self.gain * x)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Toy]]:
    list_mixers()  # before the copy, since a module registers its mixer only once
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    yield register_mixer("toy", paper="arXiv:0000.00000", origin="seqzoo")(Toy)


def test_a_registered_class_is_found_and_described(toy: type[Toy]) -> None:
    info = mixer_info("toy")
    assert (info.name, info.cls, info.paper, info.origin) == ("toy", Toy, "arXiv:0000.00000", "seqzoo")
    assert info.patterns == ("self", "causal") and info.streaming
    assert info.options == {"gain": 2.0}


def test_a_taken_name_is_refused_and_the_same_class_may_come_again(toy: type[Toy]) -> None:
    assert register_mixer("toy", paper="arXiv:0000.00000")(Toy) is Toy  # its module run once more
    with pytest.raises(ValueError, match="'toy' is already taken by Toy"):
        register_mixer("toy", paper="x")(type("Other", (Toy,), {"__qualname__": "Other"}))
    assert mixer_info("toy").cls is Toy


def test_only_mixers_are_registered() -> None:
    with pytest.raises(TypeError, match=r"Linear must be a subclass of seqzoo\.Mixer"):
        register_mixer("bad", paper="x")(torch.nn.Linear)  # type: ignore[type-var]
    assert "bad" not in list_mixers()


def test_list_by_pattern_and_by_state(toy: type[Toy]) -> None:
    register_mixer("a_toy", paper="x")(Toy)  # registered last, listed first
    names = list_mixers()
    assert names == sorted(names) and "toy" in names
    for pattern in PATTERNS:
        expected = [name for name in names if pattern in mixer_info(name).cls.patterns]
        assert list_mixers(pattern=pattern) == expected
    assert "toy" in list_mixers(pattern="causal", streaming=True)
    assert "toy" not in list_mixers(pattern="cross") and "toy" not in list_mixers(streaming=False)
    assert set(list_mixers(streaming=True)) | set(list_mixers(streaming=False)) == set(names)
    with pytest.raises(ValueError, match=r"unknown pattern 'casual'\. Did you mean .*causal"):
        list_mixers(pattern="casual")


@pytest.mark.parametrize(
    "given",
    ["toy", {"name": "toy"}, Toy, lambda dim, **options: Toy(dim, **options)],
    ids=["name", "dict", "class", "factory"],
)
def test_create_from_anything(toy: type[Toy], given: object) -> None:
    mixer = create_mixer(given, 6, gain=3.0, causal=True)  # type: ignore[arg-type]
    assert isinstance(mixer, Toy)
    assert (mixer.dim, mixer.gain, mixer.pattern) == (6, 3.0, "causal")


def test_create_from_a_dict_leaves_it_alone_and_options_win(toy: type[Toy]) -> None:
    config = {"name": "toy", "gain": 5.0, "causal": True}
    assert create_mixer(config, 4, gain=7.0).gain == 7.0
    assert create_mixer(config, 4).gain == 5.0
    assert config == {"name": "toy", "gain": 5.0, "causal": True}


def test_messages_name_the_nearest(toy: type[Toy]) -> None:
    with pytest.raises(ValueError, match=r"unknown mixer 'sofmax'\. Did you mean softmax"):
        create_mixer("sofmax", 8)
    with pytest.raises(ValueError, match=r"unknown mixer 'zzz'\. Known: .*linear.*toy"):
        mixer_info("zzz")
    with pytest.raises(ValueError, match=r"mixer 'toy' has no option 'gian'\. Did you mean gain\?"):
        create_mixer("toy", 8, gian=1.0)
    with pytest.raises(ValueError, match=r"mixer 'Toy' has no option 'self'"):
        create_mixer(Toy, 8, **{"self": 1})
    with pytest.raises(ValueError, match=r"needs the key 'name', got \['gain'\]"):
        create_mixer({"gain": 1.0}, 8)
    with pytest.raises(TypeError, match="not int"):
        create_mixer(3, 8)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"returned a Identity, not a seqzoo\.Mixer"):
        create_mixer(lambda dim: torch.nn.Identity(), 8)  # type: ignore[arg-type,return-value]


def test_a_refused_pattern_names_the_mixers_that_can(toy: type[Toy]) -> None:
    with pytest.raises(ValueError, match=r"Toy does not support the pattern 'causal-cross'.*self, causal") as refusal:
        create_mixer("toy", 8, causal=True, cross=True)
    for name in list_mixers(pattern="causal-cross"):
        assert name in str(refusal.value)


def test_did_you_mean() -> None:
    assert did_you_mean("sotfmax", ["softmax", "linear"]) == " Did you mean softmax?"
    assert did_you_mean("q", ["b", "a"]) == " Known: a, b."


def test_the_registry_is_public() -> None:
    for name in ("Mixer", "MixerOutput", "create_mixer", "list_mixers", "mixer_info", "register_mixer"):
        assert getattr(seqzoo, name) is not None and name in dir(seqzoo)


def test_the_file_of_a_mixer_has_its_name() -> None:
    for name in list_mixers():
        assert mixer_info(name).cls.__module__ == f"seqzoo.blocks.mixers.{name}"
        assert mixer_info(name).paper


@pytest.mark.parametrize("name", list_mixers())
def test_the_configuration_holds_every_option_with_its_default(name):
    """What a mixer is without options is written down twice, in its constructor and in conf/mixer; they agree."""
    path = Path(__file__).parents[2] / "conf" / "mixer" / f"{name}.yaml"
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = inspect.signature(mixer_info(name).cls).parameters.values()
    general = ("dim", "causal", "cross", "device", "dtype")
    assert written == {"name": name} | {p.name: p.default for p in known if p.name not in general}
    assert {p.name: p.default for p in known if p.name in general[1:]} == {
        "causal": False,
        "cross": False,
        "device": None,
        "dtype": None,
    }
