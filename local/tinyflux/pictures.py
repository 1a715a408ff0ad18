"""Between Pillow pictures and pixel tensors in -1..1."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_picture(pixels: Tensor, width_px: int, height_px: int) -> Image.Image:
    """(3, h, w) in -1..1 -> an RGB picture of exactly this size, bicubic where it differs."""
    levels = ((pixels.clamp(-1, 1) * 0.5 + 0.5).permute(1, 2, 0) * 255).round().byte()
    picture = Image.fromarray(levels.numpy())
    return picture if picture.size == (width_px, height_px) else picture.resize((width_px, height_px), Image.Resampling.BICUBIC)


def to_pixels(picture: Image.Image, width_px: int, height_px: int) -> Tensor:
    """A picture, resized -> (1, 3, height, width) in -1..1."""
    resized = picture.convert("RGB").resize((width_px, height_px), Image.Resampling.LANCZOS)
    levels = np.asarray(resized, np.float32) / 127.5 - 1
    return torch.from_numpy(levels).permute(2, 0, 1)[None]
