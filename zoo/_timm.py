"""What is shared by all that uses image models of timm: the package, files of weights, maps of features."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Under which training scripts put the state dict.
_WRAPPERS = ("state_dict", "model", "module")


def import_timm() -> Any:
    """The package. Raises ImportError saying what to install."""
    try:
        import timm
        import timm.data
    except ImportError as error:
        raise ImportError("image models need timm: pip install 'seqzoo[video]'") from error
    return timm


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict of a .safetensors file, or of one that torch.load reads with weights_only, also wrapped as
    training scripts do. Raises ValueError for a file that is missing, cannot be read, or is none."""
    if not path.is_file():
        raise ValueError(f"no weights at {path}: a .safetensors or .pth file is expected")
    state: Any
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(str(path))
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, zip and pickle have errors of their own
        raise ValueError(f"the weights in {path} cannot be read: {str(error).splitlines()[0]}") from None
    for wrapper in _WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} is no state dict of tensors")
    return state


def fit_weights(model: nn.Module, state: dict[str, Tensor], path: Path, name: str) -> None:
    """Load all of the model's tensors; others, such as those of a classifier that it lacks, may be there too. Raises
    ValueError where one is missing or of another shape."""
    own = model.state_dict()
    wrong = [key for key in own if key not in state or state[key].shape != own[key].shape]
    if wrong:
        raise ValueError(
            f"the weights in {path} are not those of {name}: {len(own) - len(wrong)} of {len(own)} tensors fit, "
            f"{wrong[0]} does not"
        )
    model.load_state_dict({key: state[key] for key in own})


def feature_map(model: Any, features: Tensor, height: int, width: int) -> Tensor:
    """(N, h, w, D) of what `forward_features` gives for pictures of height x width: maps with the channels first or
    last, or tokens, without those before the patches, in rows of the picture's shape."""
    dim = int(model.num_features)
    if features.dim() == 4:
        return features.permute(0, 2, 3, 1) if features.shape[1] == dim else features
    tokens = features[:, int(getattr(model, "num_prefix_tokens", 0)) :]
    return tokens.unflatten(1, (round(math.sqrt(tokens.shape[1] * height / width)), -1))
