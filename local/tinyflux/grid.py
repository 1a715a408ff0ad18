"""The grid of tokens that latents become, and the rotations that tell a token its place."""

from functools import lru_cache

import torch
from torch import Tensor

from local.tinyflux.tokenizer import TEXT_TOKENS

RopeTables = tuple[Tensor, Tensor]  # cosine and sine, each (tokens, 1, head size)

AXES = (4, 18, 18)  # share of a head's 40 numbers that tells kind (unused, 0), row and column
LATENT_CHANNELS = 16


def rotate(x: Tensor, tables: RopeTables) -> Tensor:
    """Turn neighbouring pairs of x (batch, tokens, heads, head size) by the angles of their token."""
    cosine, sine = tables
    real, imaginary = x.view(*x.shape[:-1], -1, 2).unbind(-1)
    return x * cosine + torch.stack([-imaginary, real], -1).flatten(-2) * sine


@lru_cache(maxsize=32)
def rope_tables(height: int, width: int, text_tokens: int = TEXT_TOKENS, theta: float = 10000.0) -> RopeTables:
    """Angles of `text_tokens` text tokens, all at position 0, then of a (height / 2) x (width / 2) grid; sides in latent cells."""
    rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    grid = torch.stack([torch.zeros_like(columns), rows, columns], -1).reshape(-1, 3).float()
    ids = torch.cat([torch.zeros(text_tokens, 3), grid])
    cosines, sines = [], []
    for axis, size in enumerate(AXES):
        speeds = 1 / theta ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
        angles = torch.outer(ids[:, axis].double(), speeds)
        cosines.append(angles.cos().repeat_interleave(2, 1))
        sines.append(angles.sin().repeat_interleave(2, 1))
    return torch.cat(cosines, 1).float()[:, None], torch.cat(sines, 1).float()[:, None]


def pack(latents: Tensor) -> Tensor:
    """(batch, 16, height, width) -> (batch, height * width / 4, 64): 2x2 cells become one token."""
    batch, channels, height, width = latents.shape
    cells = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(batch, height * width // 4, channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`."""
    batch = len(tokens)
    cells = tokens.view(batch, height // 2, width // 2, LATENT_CHANNELS, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(batch, LATENT_CHANNELS, height, width)
