"""The picture codec: diffusers' AutoencoderKL without attention and quant convolutions, 8x smaller sides, 16 channels.

The encoder's weights are computed (a linear map of 8x8 patches, see make/patch_codec.py); only the decoder was trained.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from local.tinyflux.grid import LATENT_CHANNELS

CHANNELS = (12, 24, 48, 64)  # block_out_channels
GROUPS = 4
CELL_PX = 8  # side of the patch that one latent cell describes


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(GROUPS, inputs, eps=1e-6), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(GROUPS, outputs, eps=1e-6), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return change + (self.conv_shortcut(x) if self.conv_shortcut is not None else x)


class Downsampler(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsampler(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Stage(nn.Module):
    """Residual blocks, then at most one change of size."""

    def __init__(self, resnets: list[ResidualBlock], down: Downsampler | None = None, up: Upsampler | None = None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.downsamplers = nn.ModuleList([down]) if down else None
        self.upsamplers = nn.ModuleList([up]) if up else None

    def forward(self, x: Tensor) -> Tensor:
        for module in (*self.resnets, *(self.downsamplers or ()), *(self.upsamplers or ())):
            x = module(x)
        return x


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, CHANNELS[0], 3, padding=1)
        inputs, last = (CHANNELS[0], *CHANNELS), len(CHANNELS) - 1
        stages = [
            Stage([ResidualBlock(inputs[level], channels)], down=Downsampler(channels) if level < last else None)
            for level, channels in enumerate(CHANNELS)
        ]
        self.down_blocks = nn.ModuleList(stages)
        self.mid_block = Stage([ResidualBlock(CHANNELS[-1], CHANNELS[-1]) for _ in range(2)])
        self.conv_norm_out = nn.GroupNorm(GROUPS, CHANNELS[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(CHANNELS[-1], 2 * LATENT_CHANNELS, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for stage in self.down_blocks:
            x = stage(x)
        moments: Tensor = self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))
        return moments[:, :LATENT_CHANNELS]  # the means; the variances are nil


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        channels = CHANNELS[::-1]
        inputs, last = (channels[0], *channels), len(channels) - 1
        self.conv_in = nn.Conv2d(LATENT_CHANNELS, channels[0], 3, padding=1)
        self.mid_block = Stage([ResidualBlock(channels[0], channels[0]) for _ in range(2)])
        stages = [
            Stage([ResidualBlock(inputs[level], width), ResidualBlock(width, width)], up=Upsampler(width) if level < last else None)
            for level, width in enumerate(channels)
        ]
        self.up_blocks = nn.ModuleList(stages)
        self.conv_norm_out, self.conv_out = nn.GroupNorm(GROUPS, channels[-1], eps=1e-6), nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(latents))
        for stage in self.up_blocks:
            x = stage(x)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return out


class Codec(nn.Module):
    """Between pixels (batch, 3, height, width) in -1..1 and latents (batch, 16, height / 8, width / 8) of variance near 1."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder()

    def encode(self, pixels: Tensor) -> Tensor:
        latents: Tensor = self.encoder(pixels)
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        pixels: Tensor = self.decoder(latents)
        return pixels
