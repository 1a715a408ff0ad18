"""Runs the small model's nodes against real folders, as the executor would, and keeps what they report."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from local.engine.flux_nodes import FLUX_NODES
from local.engine.folders import ModelFolders
from local.engine.nodes import NodeContext
from local.tinyflux.install import install_models


@dataclass
class Bench:
    folders: ModelFolders
    previews: bool = False
    stop_after: int = 10**9
    steps: list[tuple[int, int]] = field(default_factory=list)
    pictures: list[Image.Image | None] = field(default_factory=list)

    @classmethod
    def build(cls, base: Path) -> "Bench":
        install_models(base / "models")
        return cls(ModelFolders(base))

    @property
    def context(self) -> NodeContext:
        def report(value: int, maximum: int, picture: Image.Image | None, full_size: bool) -> None:
            self.steps.append((value, maximum))
            self.pictures.append(picture)

        return NodeContext(self.folders, "1", {}, {}, self.previews, True, lambda: len(self.steps) >= self.stop_after, report)

    def run(self, node: str, **inputs: Any) -> Any:
        outputs = FLUX_NODES[node]().run(self.context, **inputs)
        assert isinstance(outputs, tuple)
        assert len(outputs) == len(FLUX_NODES[node].RETURN_TYPES)
        return outputs[0]

    def model(self, *strengths: float) -> Any:
        model = self.run("UNETLoader", unet_name="tinyflux.safetensors", weight_dtype="default")
        for strength in strengths:
            model = self.run("LoraLoaderModelOnly", model=model, lora_name="tok.safetensors", strength_model=strength)
        return model

    def text(self, prompt: str) -> Any:
        names = {"clip_name1": "tinyflux_clip_l.safetensors", "clip_name2": "tinyflux_t5.safetensors"}
        return self.run("CLIPTextEncode", text=prompt, clip=self.run("DualCLIPLoader", type="flux", **names))

    @property
    def vae(self) -> Any:
        return self.run("VAELoader", vae_name="tinyflux_vae.safetensors")

    def decode(self, latent: Any) -> list[Image.Image]:
        pictures: list[Image.Image] = self.run("VAEDecode", samples=latent, vae=self.vae)
        return pictures

    def paint(self, prompt: str, seed: int, steps: int = 20, batch: int = 1, model: Any = None, **inputs: Any) -> list[Image.Image]:
        positive = self.run("FluxGuidance", conditioning=self.text(prompt), guidance=3.5)
        latent = self.run("EmptySD3LatentImage", width=128, height=128, batch_size=batch)
        usual = {"positive": positive, "negative": positive, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
        return self.decode(
            self.run("KSampler", model=model or self.model(), seed=seed, steps=steps, **{**usual, "latent_image": latent, **inputs})
        )
