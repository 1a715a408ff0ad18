"""The linear half of the codec: a PCA of 8x8 patches in two stages, and its translation into the encoder's convolutions.

`python -m local.tinyflux.make.patch_codec` fits it to generated scenes and writes codec.npz.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from local.tinyflux.codec import CHANNELS, GROUPS, Encoder, ResidualBlock, Stage
from local.tinyflux.grid import LATENT_CHANNELS
from local.tinyflux.make.scenes import draw_scene

Array = NDArray[Any]

SCENES, SEED = 1500, 1
KEPT = 24  # of the 48 directions of a 4x4 RGB patch; the second stage keeps 16 of 4 x 24
PIN = 64.0  # constant channels of this size hold the encoder's last GroupNorm still


@dataclass(frozen=True)
class PatchCodec:
    """first (48, 24); mean (96,); encode (96, 16); decode (16, 96)."""

    first: Array
    mean: Array
    encode: Array
    decode: Array

    @classmethod
    def load(cls, folder: Path) -> "PatchCodec":
        with np.load(folder / "codec.npz") as stored:
            return cls(stored["u4"], stored["mu"], stored["enc"], stored["dec"])

    def save(self, folder: Path) -> None:
        np.savez(folder / "codec.npz", u4=self.first, mu=self.mean, enc=self.encode, dec=self.decode)

    def project(self, pixels: Array) -> Array:
        """uint8 (batch, height, width, 3) -> latents (batch, 16, height / 8, width / 8)."""
        quarter = split_cells(pixels.astype(np.float32) / 127.5 - 1, 4) @ self.first
        latents: Array = ((split_cells(quarter, 2) - self.mean) @ self.encode).transpose(0, 3, 1, 2)
        return latents


def split_cells(array: Array, side: int) -> Array:
    """(batch, h, w, c) -> (batch, h / side, w / side, side * side * c), each cell in the order row, column, channel."""
    batch, height, width, channels = array.shape
    cut = array.reshape(batch, height // side, side, width // side, side, channels).transpose(0, 1, 3, 2, 4, 5)
    return cut.reshape(batch, height // side, width // side, side * side * channels)


def principal_directions(rows: Array, kept: int) -> tuple[Array, Array, Array]:
    """Mean, variances and directions (columns), the largest variance first."""
    mean = rows.mean(0)
    variances, directions = np.linalg.eigh(np.cov((rows - mean).T))
    return mean, variances[::-1][:kept], directions[:, ::-1][:, :kept]


def fit(scenes: int = SCENES) -> PatchCodec:
    """Half-whitened: large directions are damped by the fourth root of their variance; the mean variance is 1."""
    rng = Random(SEED)
    pixels = np.stack([np.asarray(draw_scene(rng)[0], np.float32) / 127.5 - 1 for _ in range(scenes)])
    first = principal_directions(split_cells(pixels, 4).reshape(scenes, -1, 48)[:, ::7].reshape(-1, 48), 48)[2][:, :KEPT]
    rows = split_cells(split_cells(pixels, 4) @ first, 2).reshape(scenes, -1, 4 * KEPT)[:, ::3]
    mean, variances, directions = principal_directions(rows.reshape(-1, 4 * KEPT), LATENT_CHANNELS)
    scale = variances**0.25
    scale = scale * np.sqrt((variances / scale**2).mean())
    print("latent deviations", (np.sqrt(variances) / scale).round(2))
    codec = PatchCodec(*(array.astype(np.float32) for array in (first, mean, directions / scale, (directions * scale).T)))
    print("linear PSNR", round(linear_psnr(codec, pixels[:100]), 2))
    return codec


def linear_psnr(codec: PatchCodec, pixels: Array) -> float:
    patches = split_cells(pixels, 4)
    batch, height, width, _ = patches.shape
    restored = (split_cells(patches @ codec.first, 2) - codec.mean) @ codec.encode @ codec.decode + codec.mean
    cells = restored.reshape(batch, height // 2, width // 2, 2, 2, KEPT).transpose(0, 1, 3, 2, 4, 5)
    error = (cells.reshape(batch, height, width, KEPT) @ codec.first.T - patches) ** 2
    return 10 * math.log10(4 / float(error.mean()))


@torch.no_grad()
def compile_encoder(encoder: Encoder, codec: PatchCodec) -> None:
    """Write the linear map into an AutoencoderKL encoder: residual blocks become identities, the strided convolutions do the patches."""
    for parameter in encoder.parameters():
        parameter.zero_()
    stages = [cast(Stage, stage) for stage in encoder.down_blocks]
    for channel in range(3):
        encoder.conv_in.weight[channel, channel, 1, 1] = 1
    gather = strided(stages[0])
    for row in range(2):
        for column in range(2):
            for channel in range(3):
                gather.weight[(row * 2 + column) * 3 + channel, channel, row, column] = 1
    shortcut(stages[1]).weight[: CHANNELS[0], :, 0, 0] = torch.eye(CHANNELS[0])
    first = torch.from_numpy(codec.first).view(2, 2, 2, 2, 3, KEPT).permute(0, 2, 1, 3, 4, 5).reshape(2, 2, 12, KEPT)
    strided(stages[1]).weight[:KEPT, :12, :2, :2] = first.permute(3, 2, 0, 1)
    shortcut(stages[2]).weight[:KEPT, :, 0, 0] = torch.eye(KEPT)
    write_second_stage(strided(stages[2]), codec)
    undo_normalisation(encoder, shortcut(stages[3]))


def strided(stage: Stage) -> nn.Conv2d:
    return cast(nn.Conv2d, stage.get_submodule("downsamplers.0.conv"))


def shortcut(stage: Stage) -> nn.Conv2d:
    return cast(nn.Conv2d, cast(ResidualBlock, stage.resnets[0]).conv_shortcut)


def write_second_stage(conv: nn.Conv2d, codec: PatchCodec) -> None:
    """Latents in the first 16 channels, their negatives in the next 16."""
    encode = torch.from_numpy(codec.encode)
    weight: Tensor = encode.view(2, 2, KEPT, LATENT_CHANNELS).permute(3, 2, 0, 1)
    bias: Tensor = -torch.from_numpy(codec.mean) @ encode
    assert conv.bias is not None
    for start, sign in ((0, 1), (LATENT_CHANNELS, -1)):
        conv.weight[start : start + LATENT_CHANNELS, :KEPT, :2, :2] = sign * weight
        conv.bias[start : start + LATENT_CHANNELS] = sign * bias


def undo_normalisation(encoder: Encoder, spread: nn.Conv2d) -> None:
    """Large constants +-PIN in every group make the last GroupNorm a fixed scale; silu(x) - silu(-x) = x undoes the activation."""
    per_group, step = LATENT_CHANNELS // GROUPS, CHANNELS[-1] // GROUPS
    assert spread.bias is not None
    assert encoder.conv_out.bias is not None
    for latent in range(LATENT_CHANNELS):
        group, place = divmod(latent, per_group)
        plus = group * step + place
        minus = plus + per_group
        spread.weight[plus, latent], spread.weight[minus, LATENT_CHANNELS + latent] = 1, 1
        spread.bias[plus + 2 * per_group], spread.bias[plus + 3 * per_group] = PIN, -PIN
        encoder.conv_norm_out.weight[plus] = encoder.conv_norm_out.weight[minus] = PIN * math.sqrt(0.5)
        encoder.conv_out.weight[latent, plus, 1, 1], encoder.conv_out.weight[latent, minus, 1, 1] = 1, -1
    encoder.conv_out.bias[LATENT_CHANNELS:] = -30  # log variance: none


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--scenes", type=int, default=SCENES)
    arguments = parser.parse_args()
    fit(arguments.scenes).save(arguments.folder)


if __name__ == "__main__":
    main()
