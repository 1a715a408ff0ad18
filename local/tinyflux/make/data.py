"""The training set: captioned scenes as float16 latents, and some pixels for the decoder. `python -m local.tinyflux.make.data`"""

import argparse
import multiprocessing
import time
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from local.tinyflux.codec import CELL_PX
from local.tinyflux.grid import LATENT_CHANNELS
from local.tinyflux.make.patch_codec import Array, PatchCodec
from local.tinyflux.make.scenes import draw_scene

SIZES = ((128, 128, 0.84), (160, 96, 0.08), (96, 160, 0.08))  # width and height in pixels, share of the samples
PARTS, SAMPLES, PIXEL_SAMPLES, SEED = 2, 40_000, 4000, 1000  # samples of each part


def draw_part(folder: Path, part: int, samples: int, pixel_samples: int) -> None:
    """Write latents_<part>_<size>.npy with captions_<part>_<size>.txt, and pixels_<part>.npy."""
    codec, rng, start = PatchCodec.load(folder), Random(SEED + part), time.time()
    for size, (width, height, share) in enumerate(SIZES):
        count = int(samples * share)
        latents = np.empty((count, LATENT_CHANNELS, height // CELL_PX, width // CELL_PX), np.float16)
        captions, pixels = [], []
        for index in range(count):
            image, caption, _ = draw_scene(rng, width, height)
            latents[index] = codec.project(as_batch(image))[0]
            captions.append(caption)
            if size == 0 and index < pixel_samples:
                pixels.append(np.asarray(image))
        np.save(folder / f"latents_{part}_{size}.npy", latents)
        (folder / f"captions_{part}_{size}.txt").write_text("\n".join(captions), "utf-8")
        if pixels:
            np.save(folder / f"pixels_{part}.npy", np.stack(pixels))
    print("part", part, "samples", samples, "seconds", round(time.time() - start, 1), flush=True)


def as_batch(image: Image.Image) -> Array:
    return np.asarray(image)[None]


def read_latents(folder: Path) -> list[tuple[Array, list[str]]]:
    """(latents, captions) for each picture size."""
    sizes = []
    for size in range(len(SIZES)):
        latents = np.concatenate([np.load(folder / f"latents_{part}_{size}.npy") for part in range(PARTS)])
        captions = [line for part in range(PARTS) for line in (folder / f"captions_{part}_{size}.txt").read_text("utf-8").split("\n")]
        if len(latents) != len(captions):
            raise ValueError(f"size {size} has {len(latents)} latents but {len(captions)} captions")
        sizes.append((latents, captions))
    return sizes


def read_pixels(folder: Path) -> Array:
    """uint8 (samples, 128, 128, 3)."""
    return np.concatenate([np.load(folder / f"pixels_{part}.npy") for part in range(PARTS)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--pixel-samples", type=int, default=PIXEL_SAMPLES)
    arguments = parser.parse_args()
    work = [(arguments.folder, part, arguments.samples, arguments.pixel_samples) for part in range(PARTS)]
    with multiprocessing.Pool(PARTS) as pool:
        pool.starmap(draw_part, work)


if __name__ == "__main__":
    main()
