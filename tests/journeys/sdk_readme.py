"""The README of the comfy-sdk that is installed here: its blocks, and what they leave to the reader."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import comfy_sdk
from PIL import Image

Graph = dict[str, Any]

# Of its Python blocks those that speak to this contract, by a line that no other has, in its order.
# The others are about Comfy Router, another service of other routes (`client.models`), or make a client and do nothing with it.
BLOCKS = {
    "getting started": "# Get outputs using the output node Id as a reference",
    "a graph in memory": "# bytes in memory, no file written\n",
    "partner key": "# or drive it yourself:",
    "deleting an asset": "# or, without holding a handle:",
    "live progress": "for event in job.events():",
    "the workflow again": "wf = job.get_workflow()",
    "labels": "for summary in client.list_jobs(",
    "downloads": "# range-aware: first 1 KiB only",
    "download address": "link = out.get_download_url()",
    "kinds": "match out.type:",
    "async": "async def main() -> None:",
    "typed errors": 'print("check your api_key")',
}


def read_blocks() -> dict[str, str]:
    """Every block of the list, as it stands there."""
    told = metadata("comfy-sdk")
    blocks = re.findall(r"^```python\n(.*?)^```", told["Description"], re.M | re.S)
    found = {name: [block for block in blocks if line in block] for name, line in BLOCKS.items()}
    assert all(len(those) == 1 for those in found.values()), found
    return {name: those[0] for name, those in found.items()}


def paint_again() -> Graph:
    """A picture painted over, with the node numbers that the README uses: 3 samples, 10 loads, 9 and 13 save."""
    text = {"class_type": "CLIPTextEncode", "inputs": {"text": "a red circle on a blue background", "clip": ["2", 0]}}
    samples = {"cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 0.8, "latent_image": ["7", 0]}
    clip = {"clip_name1": "tinyflux_clip_l.safetensors", "clip_name2": "tinyflux_t5.safetensors", "type": "flux"}
    return {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "tinyflux.safetensors", "weight_dtype": "default"}},
        "2": {"class_type": "DualCLIPLoader", "inputs": clip},
        "4": {"class_type": "VAELoader", "inputs": {"vae_name": "tinyflux_vae.safetensors"}},
        "3": {
            "class_type": "KSampler",
            "inputs": {"seed": 0, "steps": 20, "model": ["1", 0], "positive": ["6", 0], "negative": ["6", 0], **samples},
        },
        "5": text,
        "6": {"class_type": "FluxGuidance", "inputs": {"guidance": 3.5, "conditioning": ["5", 0]}},
        "7": {"class_type": "VAEEncode", "inputs": {"pixels": ["10", 0], "vae": ["4", 0]}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 0]}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "ComfyUI"}},
        "10": {"class_type": "LoadImage", "inputs": {"image": "photo.png"}},
        "13": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "again"}},
    }


def run_readme(folder: Path, graph: Graph, say: Callable[[str], None]) -> Graph:
    """Run its blocks one after the other in `folder`, which is the current one; COMFY_BASE_URL says where. What they left behind."""
    (folder / "workflow_api.json").write_text(json.dumps(graph))
    (folder / "partial").mkdir()
    Image.new("RGB", (128, 128), "green").save(folder / "photo.png")
    blocks, shown = read_blocks(), list[Image.Image]()
    # The README's own graph is abridged: it stands for one that runs.
    blocks["a graph in memory"] = re.sub(r"^graph = \{.*?^\}\n", "", blocks["a graph in memory"], flags=re.M | re.S)
    left: Graph = {
        **vars(comfy_sdk),
        "graph": graph,
        "show": shown.append,
        "shown": shown,
        "print": lambda *said: say(" ".join(map(str, said))),
    }
    for name, block in blocks.items():
        say(f"# {name}")
        if name == "deleting an asset":
            left["asset_id"] = left["client"].assets.from_bytes((folder / "photo.png").read_bytes(), filename="other.png").commit()
        elif name == "the workflow again":
            left |= {"job_id": left["job"].id, "submitted": left["wf"]}
        exec(compile(block, f"<README: {name}>", "exec"), left)  # the examples are the test
        if name == "getting started":
            graph["10"]["inputs"]["image"] = left["asset"]
        elif name == "deleting an asset":
            graph["10"]["inputs"]["image"] = left["client"].assets.from_file("photo.png")
        elif name == "the workflow again":
            left |= {"found": left["wf"], "wf": left["submitted"]}
        elif name == "labels":
            left["job"].wait(timeout=60)
        elif name == "async":
            asyncio.run(left["main"]())
    left["client"].close()
    return left
