"""How well the shape metric does on drawn pictures, plain and through the codec. `python -m local.tinyflux.make.ceiling`"""

import argparse
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image

from local.tinyflux.make.drawing import draw_shape
from local.tinyflux.make.metrics import COLOUR_NAMES, border_colour, find_foreground, make_templates, match_shape
from local.tinyflux.make.words import COLOURS, SHAPES
from local.tinyflux.pictures import to_picture
from local.tinyflux.pipeline import Pipeline
from local.tinyflux.weights import MODEL_DIR


@torch.no_grad()
def measure_ceiling(pipeline: Pipeline, pictures: int = 72) -> dict[str, dict[str, int]]:
    """Percent of right shapes and of overlap with the right template."""
    rng, templates = Random(9), make_templates()
    scores: dict[str, list[tuple[bool, float]]] = {"plain": [], "codec": []}
    for index in range(pictures):
        shape, (colour, ground) = SHAPES[index % 9], rng.sample(COLOUR_NAMES, 2)
        image = Image.new("RGB", (256, 256), COLOURS[ground])
        draw_shape(image, shape, 128, 128, 74, COLOURS[colour])
        native = image.resize((128, 128), Image.Resampling.BOX)
        decoded = to_picture(pipeline.codec.decode(pipeline.encode_picture(native, 16, 16))[0], 256, 256)
        for kind, seen in (("plain", native.resize((256, 256), Image.Resampling.BICUBIC)), ("codec", decoded)):
            picture = np.asarray(seen, float)
            found, overlaps = match_shape(find_foreground(picture, border_colour(picture)), templates)
            scores[kind].append((found == shape, overlaps[shape]))
    return {
        kind: dict(zip(("shape", "IoU"), (100 * np.array(rows, float).mean(0)).round().astype(int).tolist(), strict=True))
        for kind, rows in scores.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    torch.set_num_threads(1)
    print(measure_ceiling(Pipeline.load(parser.parse_args().model)))


if __name__ == "__main__":
    main()
