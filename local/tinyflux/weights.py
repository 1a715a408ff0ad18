"""Weight files: each network from its single safetensors file, remembered per process until the file changes."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from local.tinyflux.codec import Codec
from local.tinyflux.lora import Lora, read_lora
from local.tinyflux.text import CLIP, T5
from local.tinyflux.tokenizer import Tokenizer
from local.tinyflux.transformer import Flux

MODEL_DIR = Path(__file__).parent / "model"
LORA_DIR = Path(__file__).parent / "loras"
TRANSFORMER_FILE = MODEL_DIR / "transformer" / "diffusion_pytorch_model.safetensors"
CODEC_FILE = MODEL_DIR / "vae" / "diffusion_pytorch_model.safetensors"
TOKENIZER_FILE = MODEL_DIR / "tokenizer" / "tokenizer.json"

NetworkType = TypeVar("NetworkType", bound=nn.Module)
FileStamp = tuple[Path, int, int]  # path, mtime in ns, size in bytes


def stamp(path: Path) -> FileStamp:
    status = path.stat()
    return path, status.st_mtime_ns, status.st_size


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path, "pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - the file is not a mapping


def fill(build: Callable[[], NetworkType], path: Path, dtype: torch.dtype | None = None) -> NetworkType:
    """Build a network on no memory, then give it the file's weights in float32, rounded through `dtype` first if given.

    Raises ValueError when the file holds other weights than the network's, and safetensors' own error when it is unreadable.
    """
    with torch.device("meta"):
        network = build()
    wanted = {key: tuple(weight.shape) for key, weight in network.state_dict().items()}
    found = read_shapes(path)  # before the weights: a foreign file may hold gigabytes
    if wanted != found:
        odd = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
        name = type(network).__name__
        raise ValueError(f"{path.name} is not a {name} of the built-in small model: {len(odd)} tensors differ, the first is {odd[0]}")
    tensors = load_file(path)
    network.load_state_dict({key: (weight.to(dtype) if dtype else weight).float() for key, weight in tensors.items()}, assign=True)
    return network.requires_grad_(False).eval()


@lru_cache(maxsize=4)
def remember_transformer(at: FileStamp, dtype: torch.dtype | None) -> Flux:
    return fill(Flux, at[0], dtype)


def load_transformer(path: Path = TRANSFORMER_FILE, dtype: torch.dtype | None = None) -> Flux:
    """`dtype` rounds the weights as a loader's fp8 choice would; the arithmetic stays float32."""
    return remember_transformer(stamp(path), dtype)


@lru_cache(maxsize=4)
def remember_codec(at: FileStamp) -> Codec:
    return fill(Codec, at[0])


def load_codec(path: Path = CODEC_FILE) -> Codec:
    return remember_codec(stamp(path))


@lru_cache(maxsize=8)
def remember_text_encoder(at: FileStamp) -> T5 | CLIP:
    is_clip = any(key.startswith("text_model.") for key in read_shapes(at[0]))
    words = len(load_tokenizer().vocabulary)
    return fill(lambda: CLIP(words), at[0]) if is_clip else fill(lambda: T5(words), at[0])


def load_text_encoder(path: Path) -> T5 | CLIP:
    """Either encoder; the file's keys tell which."""
    return remember_text_encoder(stamp(path))


@lru_cache(maxsize=1)
def load_tokenizer() -> Tokenizer:
    """The tokenizer comes with the package, not with a weight file."""
    return Tokenizer.load(TOKENIZER_FILE)


@lru_cache(maxsize=32)
def remember_lora(at: FileStamp, transformer: Flux) -> Lora:
    return read_lora(at[0], transformer)


def load_lora(path: Path, transformer: Flux) -> Lora:
    return remember_lora(stamp(path), transformer)
