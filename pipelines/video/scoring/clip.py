"""CLIP and SigLIP as scorers, through transformers or open_clip, from files or from a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError, nearest
from .image_encoder import choose_device, hash_weights, scale_frames, unit
from .scorer import check_frames, check_query

LIBRARIES = ("auto", "transformers", "open_clip")
FRAMES = ("whole", "centre")


class ClipScorer:
    """The cosine of CLIP (arXiv:2103.00020), SigLIP (arXiv:2303.15343) or SigLIP 2 between a frame and a text.

    model: a folder of `save_pretrained` or an id on a hub for transformers; for open_clip "ViT-B-32" or "hf-hub:...".
    library: "auto" takes open_clip where `pretrained` is given or the model starts with hf-hub:, else transformers.
    pretrained: for open_clip, a tag or a file of weights. frames: "whole" squeezes a frame to the model's square, so
    that nothing is out of view; "centre" does what the model was trained with, which for CLIP leaves out what is left
    and right of the middle square. prompt: the text is put in the place of {}. device: "auto", "cpu", "cuda".
    Raises UserError where the package or the weights are missing.
    """

    def __init__(
        self,
        *,
        model: str | Path = "openai/clip-vit-base-patch32",
        library: str = "auto",
        pretrained: str | Path | None = None,
        frames: str = "whole",
        prompt: str = "{}",
        device: str = "auto",
    ) -> None:
        if library not in LIBRARIES:
            raise UserError(f"library={library!r} is unknown.{nearest(str(library), LIBRARIES)}")
        if frames not in FRAMES:
            raise UserError(f"frames={frames!r} is unknown.{nearest(str(frames), FRAMES)}")
        if "{}" not in prompt:
            raise UserError(f"prompt={prompt!r} has no place for the query: 'a photo of {{}}'")
        self.device, self.prompt = choose_device(device), prompt
        name = str(model)
        self._towers: Any = (
            _OpenClip(name, pretrained, frames, self.device)
            if _chosen(name, library, pretrained) == "open_clip"
            else _Transformers(name, frames, self.device)
        )
        self.size = self._towers.size
        self.dim = int(self.encode_frames(np.zeros((1, *self.size, 3), dtype=np.uint8)).shape[1])
        self.key = f"clip {frames} {self._towers.key}"

    def encode_frames(self, frames: np.ndarray) -> np.ndarray:
        """Vectors float32 (n, D) of frames uint8 (n, H, W, 3)."""
        if not len(check_frames(frames)):
            return np.zeros((0, self.dim), dtype=np.float32)
        with torch.inference_mode():
            return unit(self._towers.images(torch.from_numpy(np.ascontiguousarray(frames))))

    def encode_query(self, query: str | Path) -> np.ndarray:
        """The vector float32 (D,) of a text."""
        with torch.inference_mode():
            return unit(self._towers.texts([self.prompt.replace("{}", check_query(query))]))[0]


class _Transformers:
    """Both towers of a model of transformers, with its own processor."""

    def __init__(self, name: str, frames: str, device: torch.device) -> None:
        try:
            from transformers import AutoModel, AutoProcessor
        except ImportError:
            raise UserError("the scorer 'clip' needs transformers or open_clip: pip install transformers") from None
        try:
            self.model: Any = AutoModel.from_pretrained(name).to(device).eval().requires_grad_(False)
            self.processor: Any = AutoProcessor.from_pretrained(name)
        except Exception as error:  # transformers and its hub have many
            raise UserError(
                f"no CLIP or SigLIP model at {name!r}: {str(error).strip().splitlines()[0]}; give a folder of "
                "save_pretrained or an id of a hub that can be reached, or take the scorer 'concepts', which needs none"
            ) from None
        for part in ("get_image_features", "get_text_features"):
            if not hasattr(self.model, part):
                raise UserError(f"{name!r} is a {type(self.model).__name__}, not a CLIP or SigLIP model")
        self.device, self.frames = device, frames
        self.size = _square(self.processor.image_processor, name)
        config = self.model.config.text_config
        self.length = int(config.max_position_embeddings)
        # SigLIP was trained with texts filled up to their full length
        self.padding = "max_length" if "siglip" in str(self.model.config.model_type) else True
        images = self.processor.image_processor
        scaling = [getattr(images, key, None) for key in ("image_mean", "image_std", "rescale_factor", "resample")]
        self.key = f"{scaling} {self.size} {hash_weights(self.model)}"

    def images(self, frames: Tensor) -> Tensor:
        options: dict[str, Any] = {}
        if self.frames == "whole":
            frames = scale_frames(frames, self.size).to(torch.uint8).permute(0, 2, 3, 1)
            options = {"do_resize": False, "do_center_crop": False}
        pictures = list(frames.permute(0, 3, 1, 2))
        inputs = self.processor.image_processor(pictures, return_tensors="pt", **options)
        return _vectors(self.model.get_image_features(**inputs.to(self.device)))

    def texts(self, texts: list[str]) -> Tensor:
        inputs = self.processor.tokenizer(
            texts, padding=self.padding, truncation=True, max_length=self.length, return_tensors="pt"
        )
        known = {key: value.to(self.device) for key, value in inputs.items() if key in ("input_ids", "attention_mask")}
        if self.padding == "max_length":
            known.pop("attention_mask", None)  # its pads are read too, as in training
        return _vectors(self.model.get_text_features(**known))


class _OpenClip:
    """Both towers of a model of open_clip."""

    def __init__(self, name: str, pretrained: str | Path | None, frames: str, device: torch.device) -> None:
        try:
            import open_clip
        except ImportError:
            raise UserError("library='open_clip' needs the package open_clip_torch: pip install it") from None
        if not name.startswith("hf-hub:") and name not in open_clip.list_models():
            raise UserError(f"open_clip has no model {name!r}.{nearest(name, open_clip.list_models())}")
        if pretrained is None and not name.startswith("hf-hub:"):
            raise UserError(f"{name!r} of open_clip needs weights: pretrained=<tag or file>, such as laion2b_s34b_b79k")
        given = None if pretrained is None else str(pretrained)
        try:
            self.model: Any = open_clip.create_model(name, pretrained=given).to(device).eval().requires_grad_(False)
            self.tokenizer: Any = open_clip.get_tokenizer(name)
        except Exception as error:  # of its hub and of torch.load
            raise UserError(f"open_clip cannot load {name!r}: {str(error).strip().splitlines()[0]}") from None
        config = open_clip.get_model_preprocess_cfg(self.model)
        size = config["size"]
        self.size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        self.mean = torch.tensor(config["mean"], device=device).view(3, 1, 1)
        self.std = torch.tensor(config["std"], device=device).view(3, 1, 1)
        self.device = device
        self.crops = frames == "centre" and config["resize_mode"] != "squash"
        self.key = f"open_clip {config} {hash_weights(self.model)}"

    def images(self, frames: Tensor) -> Tensor:
        frames = frames.to(self.device)
        if self.crops:
            frames = _middle(frames, self.size)
        return self.model.encode_image((scale_frames(frames, self.size) / 255 - self.mean) / self.std)

    def texts(self, texts: list[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(texts).to(self.device))


def _middle(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """The largest part in the middle of frames (n, H, W, 3) that has the shape of `size`."""
    height, width = frames.shape[1:3]
    scale = min(height / size[0], width / size[1])
    high, wide = round(size[0] * scale), round(size[1] * scale)
    top, left = (height - high) // 2, (width - wide) // 2
    return frames[:, top : top + high, left : left + wide]


def _chosen(name: str, library: str, pretrained: object) -> str:
    if library != "auto":
        return library
    return "open_clip" if name.startswith("hf-hub:") or pretrained is not None else "transformers"


def _square(images: Any, name: str) -> tuple[int, int]:
    """The height and width that an image processor hands to its model."""
    for key in ("crop_size", "size"):
        given = getattr(images, key, None)
        if given is None or (key == "crop_size" and not getattr(images, "do_center_crop", False)):
            continue
        plain = dict(given) if not isinstance(given, int) else {"height": given, "width": given}
        edge = plain.get("shortest_edge")
        height, width = plain.get("height") or edge, plain.get("width") or edge
        if height and width:
            return int(height), int(width)
    raise UserError(f"{name!r} takes images of any shape (NaFlex), which is not supported: take one of a fixed size")


def _vectors(out: Any) -> Tensor:
    """Of transformers before 5 a tensor, of later ones an output that has it."""
    return out if isinstance(out, Tensor) else out.pooler_output
