"""Florence-2 by transformers (its own class there, so no code of the repository is run). Weights of some 0.5 to 1.5 GB are fetched once.

Written after transformers' documentation and not run here, where no weights are. `options["model"]` names another checkpoint or a folder.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

MODEL = "florence-community/Florence-2-large"
TASK = "<DETAILED_CAPTION>"
MOST_TOKENS = 200


def describe(pictures: Sequence[Path], options: Mapping[str, str]) -> Iterator[str]:
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    image_module: Any = importlib.import_module("PIL.Image")
    name = options.get("model") or MODEL
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.float16 if device == "cuda" else torch.float32
    processor = transformers.AutoProcessor.from_pretrained(name)
    model = transformers.Florence2ForConditionalGeneration.from_pretrained(name, torch_dtype=kind).to(device).eval()
    for path in pictures:
        with image_module.open(path) as file:
            picture = file.convert("RGB")
        inputs = processor(text=TASK, images=picture, return_tensors="pt").to(device, kind)
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=MOST_TOKENS, num_beams=3, do_sample=False)
        text = processor.batch_decode(tokens, skip_special_tokens=False)[0]
        yield str(processor.post_process_generation(text, task=TASK, image_size=picture.size)[TASK])
