"""Text-to-frame scores without a download: what a classifier sees, as the vectors of the names of its classes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import UserError
from ...text_vectors import model_folder, text_vectors
from .image_encoder import choose_device, load_image_encoder, unit
from .scorer import check_frames, check_query


class ConceptScorer:
    """Convex combination of semantic embeddings (ConSE, arXiv:1312.5650) from EfficientNet-Lite0 and MiniLM.

    Of a frame's probabilities p over the 1000 classes of ImageNet the `top` largest weigh the vectors e of the names of
    those classes, v = sum p_k e_k / |sum p_k e_k|; a query is the MiniLM vector of its words. It tells apart what
    ImageNet has a class for (vehicles, animals, things of a household), seen as its photographs show it.

    top: classes that count. weights: a file for the classifier, None: that of the package. text_encoder: a folder with
    a BERT model, None: MiniLM of its package. cache: keeps the table of names (`FeatureCache`), None: computed anew.
    device: "auto", "cpu", "cuda". Raises UserError saying what to install.
    """

    # Queries for what none of our clips shows stay below it in all frames of them.
    floor = 0.4

    def __init__(
        self,
        *,
        top: int = 10,
        weights: str | Path | None = None,
        text_encoder: str | Path | None = None,
        cache: Any = None,
        device: str = "auto",
    ) -> None:
        if isinstance(top, bool) or not isinstance(top, int) or not 1 <= top <= 1000:
            raise UserError(f"top={top!r} must be a whole number from 1 to 1000")
        folder = model_folder(text_encoder)  # both are there, or nothing is loaded
        self.device = choose_device(device)
        self.encoder = load_image_encoder("packaged", weights, output="logits", device=self.device)
        self.top, self.text_encoder = top, text_encoder
        self.names = class_names()
        texts = hashlib.sha256()
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            with open(folder / name, "rb") as file:
                texts.update(hashlib.file_digest(file, "sha256").digest())
        key = f"class names {texts.hexdigest()[:16]} {hashlib.sha256(repr(self.names).encode()).hexdigest()[:16]}"
        table = None if cache is None else cache.get(key)
        if table is None:
            table = text_vectors(self.names, path=text_encoder).numpy()
            if cache is not None:
                cache.put(key, table)
        self.table = torch.from_numpy(np.asarray(table, dtype=np.float32)).to(self.device)
        self.size, self.dim = self.encoder.size, self.table.shape[1]
        self.key = f"concepts {top} {key} {self.encoder.key}"

    def encode_frames(self, frames: np.ndarray) -> np.ndarray:
        """Vectors float32 (n, 384) of frames uint8 (n, H, W, 3)."""
        if not len(check_frames(frames)):
            return np.zeros((0, self.dim), dtype=np.float32)
        logits = self.encoder(torch.from_numpy(frames))
        best = logits.softmax(-1).topk(self.top)
        return unit(torch.einsum("nk,nkd->nd", best.values, self.table[best.indices]))

    def encode_query(self, query: str | Path) -> np.ndarray:
        """The vector float32 (384,) of a text."""
        return text_vectors([check_query(query)], path=self.text_encoder)[0].numpy()


def class_names() -> list[str]:
    """The names of ImageNet's 1000 classes in their order, synonyms with commas, from timm's tables."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    return [info.index_to_description(number) for number in range(info.num_classes())]
