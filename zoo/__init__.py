"""Named models: registry, factory, saving and loading."""

if not __name__.startswith("seqzoo."):
    raise ImportError("import seqzoo.zoo, not zoo")

from ._export import export_model
from ._exported import save_exported
from ._factory import create_model
from ._features import FeatureExtractor, FeatureInfo, ZooModel
from ._files import read_config
from ._forecaster import Forecaster
from ._generate import TokenStep, generate, generate_tokens
from ._hub import push_to_hub
from ._language import LanguageModel
from ._loading import load_backbone, load_model
from ._registry import ModelInfo, list_models, model_info, register_model
from ._saving import save_model
from ._weights import Weights, register_weights, weights_info

__all__ = [
    "FeatureExtractor",
    "FeatureInfo",
    "Forecaster",
    "LanguageModel",
    "ModelInfo",
    "TokenStep",
    "Weights",
    "ZooModel",
    "create_model",
    "export_model",
    "generate",
    "generate_tokens",
    "list_models",
    "load_backbone",
    "load_model",
    "model_info",
    "push_to_hub",
    "read_config",
    "register_model",
    "register_weights",
    "save_exported",
    "save_model",
    "weights_info",
]
