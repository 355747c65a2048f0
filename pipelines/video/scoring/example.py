"""An image or a piece of video as the query: frames that look like it, by any image encoder of timm."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import UserError
from .image_encoder import choose_device, load_image_encoder, unit
from .scorer import check_frames, check_query

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Frames of an example that is a video, evenly over it.
EXAMPLE_FRAMES = 16
# path#t=3,5.5: the temporal fragment of W3C's Media Fragments URI
_FRAGMENT = re.compile(r"^(?P<path>.+)#t=(?P<start>\d+(?:\.\d+)?)?(?:,(?P<end>\d+(?:\.\d+)?))?$")


class ExampleScorer:
    """The cosine of a frame's vector with that of an image, or with the mean vector of a piece of video.

    encoder: "packaged" (EfficientNet-Lite0) or the name of a model of timm. weights: see `load_image_encoder`. center:
    a vector is taken from the encoder's own point of nothing, its vector of a grey frame, without which the vectors of
    all frames are close to each other, since what comes out of a rectifier is positive. device: "auto", "cpu", "cuda".
    """

    def __init__(
        self,
        *,
        encoder: str = "packaged",
        weights: str | Path | None = None,
        center: bool = True,
        device: str = "auto",
    ) -> None:
        self.encoder = load_image_encoder(encoder, weights, device=choose_device(device))
        self.size, self.dim = self.encoder.size, self.encoder.dim
        grey = torch.full((1, *self.size, 3), 127, dtype=torch.uint8)
        self._origin = self.encoder(grey) if center else torch.zeros(1, self.dim, device=self.encoder.mean.device)
        self.key = f"example {center} {self.encoder.key}"

    def encode_frames(self, frames: np.ndarray) -> np.ndarray:
        """Vectors float32 (n, D) of frames uint8 (n, H, W, 3)."""
        if not len(check_frames(frames)):
            return np.zeros((0, self.dim), dtype=np.float32)
        return unit(self.encoder(torch.from_numpy(np.ascontiguousarray(frames))) - self._origin)

    def encode_query(self, query: str | Path) -> np.ndarray:
        """The vector float32 (D,) of an image file, a video file, or of the seconds a to b of one: "clip.mp4#t=a,b".

        Raises UserError for a file that is not there or cannot be read.
        """
        frames = read_example(query, size=self.size)
        return unit(torch.from_numpy(self.encode_frames(frames)).mean(0, keepdim=True))[0]


def read_example(query: str | Path, *, size: tuple[int, int]) -> np.ndarray:
    """The frames of an example, uint8 (n, H, W, 3): one of an image, at most EXAMPLE_FRAMES of a video."""
    text = check_query(query)
    match = _FRAGMENT.match(text)
    path = Path(match["path"] if match else text).expanduser()
    if not path.is_file():
        raise UserError(f"no such file: {path}; with the scorer 'example' the query is an image or a video file")
    if path.suffix.lower() in IMAGES:
        return _image(path)
    from ..reader import open_video

    with open_video(path, size=size) as reader:
        start = float(match["start"] or 0) if match else 0.0
        end = float(match["end"]) if match and match["end"] else reader.duration
        if not 0 <= start < end or start >= reader.duration:
            raise UserError(f"{text}: no span within the {reader.duration:.6g} seconds of {path.name}")
        places = start + (np.arange(EXAMPLE_FRAMES) + 0.5) / EXAMPLE_FRAMES * (min(end, reader.duration) - start)
        return reader.read(np.unique(reader.index_at(places)))


def _image(path: Path) -> np.ndarray:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise UserError("images need the package pillow: pip install 'seqzoo[video]'") from None
    try:
        with Image.open(path) as file:
            image: Any = ImageOps.exif_transpose(file)
            return np.array(image.convert("RGB"), dtype=np.uint8)[None]
    except (OSError, ValueError, SyntaxError) as error:  # of a damaged file, by its format
        raise UserError(f"the image {path} cannot be read: {error}") from None
