"""seqzoo: token mixers that compose into backbones, a model zoo, and pipelines for long sequences.

Public names load lazily, so that `import seqzoo` and the command line's help stay quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Backbone": "blocks.backbone",
    "Block": "blocks.block",
    "Mixer": "blocks.protocol",
    "MixerOutput": "blocks.protocol",
    "SequenceModel": "blocks.sequence_model",
    "create_mixer": "blocks.registry",
    "create_model": "zoo",
    "generate": "zoo",
    "generate_tokens": "zoo",
    "list_mixers": "blocks.registry",
    "list_models": "zoo",
    "load_backbone": "zoo",
    "load_model": "zoo",
    "mixer_info": "blocks.registry",
    "model_info": "zoo",
    "push_to_hub": "zoo",
    "register_mixer": "blocks.registry",
    "register_model": "zoo",
    "register_weights": "zoo",
    "save_model": "zoo",
}

__all__ = ["__version__", *_HOME]  # noqa: PLE0604 - the keys are strings

if TYPE_CHECKING:
    from .blocks.backbone import Backbone as Backbone
    from .blocks.block import Block as Block
    from .blocks.protocol import Mixer as Mixer
    from .blocks.protocol import MixerOutput as MixerOutput
    from .blocks.registry import create_mixer as create_mixer
    from .blocks.registry import list_mixers as list_mixers
    from .blocks.registry import mixer_info as mixer_info
    from .blocks.registry import register_mixer as register_mixer
    from .blocks.sequence_model import SequenceModel as SequenceModel
    from .zoo import create_model as create_model
    from .zoo import generate as generate
    from .zoo import generate_tokens as generate_tokens
    from .zoo import list_models as list_models
    from .zoo import load_backbone as load_backbone
    from .zoo import load_model as load_model
    from .zoo import model_info as model_info
    from .zoo import push_to_hub as push_to_hub
    from .zoo import register_model as register_model
    from .zoo import register_weights as register_weights
    from .zoo import save_model as save_model


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'seqzoo' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
