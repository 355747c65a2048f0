"""Named models: registry, factory, saving and loading."""

if not __name__.startswith("seqzoo."):
    raise ImportError("import seqzoo.zoo, not zoo")

from ._files import load_model, read_config, save_model
from ._forecaster import Forecaster
from ._generate import TokenStep, generate, generate_tokens
from ._language import LanguageModel
from ._registry import ModelInfo, create_model, list_models, model_info, register_model

__all__ = [
    "Forecaster",
    "LanguageModel",
    "ModelInfo",
    "TokenStep",
    "create_model",
    "generate",
    "generate_tokens",
    "list_models",
    "load_model",
    "model_info",
    "read_config",
    "register_model",
    "save_model",
]
