"""Run by a ComfyUI's own Python: gives LoRA files to its own loader and writes down what that patches and what it logs.

usage: comfyui_lora_loader.py COMFYUI_FOLDER HIDDEN DOUBLE SINGLE FILE...      the answer is a line of JSON on stdout
The model has the real layers without their weights (torch's meta device), so it needs neither a checkpoint nor much memory.
"""

import json
import logging
import re
import sys
from typing import Any

LATER_BLOCK = re.compile(r"_blocks\.[1-9]")


class Lines(logging.Handler):
    """What was logged, from warnings upwards."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def make_model(hidden: int, double: int, single: int) -> Any:
    """ComfyUI's Flux model in its patcher, as its UNET loader returns one."""
    import torch
    from comfy import model_base, model_patcher, supported_models  # type: ignore[import-not-found]

    small = hidden != 3072
    config = supported_models.Flux(
        {
            "image_model": "flux",
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "vec_in_dim": 64 if small else 768,
            "context_in_dim": 128 if small else 4096,
            "hidden_size": hidden,
            "mlp_ratio": 4.0,
            "num_heads": hidden // (40 if small else 128),
            "depth": double,
            "depth_single_blocks": single,
            "axes_dim": [4, 18, 18] if small else [16, 56, 56],
            "theta": 10000,
            "qkv_bias": True,
            "guidance_embed": True,
        }
    )
    config.set_inference_dtype(torch.bfloat16, None)
    model = model_base.Flux(config, device=torch.device("meta"))
    return model_patcher.ModelPatcher(model, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


def load(model: Any, path: str, log: Lines) -> dict[str, Any]:
    """What LoraLoaderModelOnly does with one file, and how many of its patches change weights of zeros: those outside the later blocks,
    as a whole Flux would take minutes."""
    import torch
    from comfy import lora, sd, utils

    log.lines.clear()
    patched, _ = sd.load_lora_for_models(model, None, utils.load_torch_file(path, safe_load=True), 1.0, 0)
    shapes = {key: weight.shape for key, weight in model.model.state_dict().items()}
    changed = 0
    for key, patches in patched.patches.items():
        for patch in patches if not LATER_BLOCK.search(key if isinstance(key, str) else key[0]) else ():
            weight = lora.calculate_weight([patch], torch.zeros(shapes[key]), key)
            changed += bool(weight.any()) and bool(weight.isfinite().all())
    return {"patched": sum(map(len, patched.patches.values())), "changed": changed, "log": list(log.lines)}


def main(folder: str, hidden: str, double: str, single: str, *files: str) -> None:
    sys.path.insert(0, folder)
    from comfy.cli_args import args  # type: ignore[import-not-found]

    args.cpu = True
    log = Lines()
    logging.getLogger().addHandler(log)
    model = make_model(int(hidden), int(double), int(single))
    print(json.dumps([load(model, path, log) for path in files]))


if __name__ == "__main__":
    main(*sys.argv[1:])
