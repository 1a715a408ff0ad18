"""The folder that LoRAs are put into: there, writable, and the one that the instances list."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from pathlib import Path

import aiohttp

from gateway.comfy.client import ComfyClient
from gateway.doctor.finding import Finding, fault, skip, warn, well
from gateway.errors import InstanceError
from gateway.settings import Settings


async def examine_loras(settings: Settings, session: aiohttp.ClientSession, urls: Sequence[str]) -> list[Finding]:
    folder = settings.lora_dir
    if folder is None:
        remedy = "Set LORA_DIR to ComfyUI's models/loras folder as the dispatcher sees it."
        return [warn("loras.folder", "LORA_DIR is not set: trained LoRAs are brought to no instance", remedy)]
    if not folder.is_dir():
        remedy = f"Make {folder}, or set LORA_DIR to ComfyUI's models/loras folder (a volume that both sides mount)."
        return [fault("loras.folder", f"LORA_DIR={folder} is no folder", remedy)]
    probe = folder / f"fluxgate-doctor-{secrets.token_hex(4)}.safetensors"
    try:
        await asyncio.to_thread(probe.touch)
    except OSError as error:
        remedy = f"Give the user of the dispatcher the right to write into {folder}."
        return [fault("loras.folder", f"LORA_DIR={folder} cannot be written: {error.strerror}", remedy)]
    try:
        findings = [well("loras.folder", f"{folder} is writable")]
        findings += [await _judge_listing(probe, ComfyClient(url, session)) for url in urls]
        return findings
    finally:
        probe.unlink(missing_ok=True)


async def _judge_listing(probe: Path, client: ComfyClient) -> Finding:
    try:
        names = await client.model_names("loras")
    except InstanceError:
        return skip("loras.listed", f"{client.url} does not say what it lists")
    if probe.name in names:
        return well("loras.listed", f"{client.url} lists what lies there")
    remedy = f"Let ComfyUI and the dispatcher use one folder: mount it into both, or add {probe.parent} to extra_model_paths.yaml."
    return fault("loras.listed", f"{client.url} does not list what is put into {probe.parent}", remedy)
