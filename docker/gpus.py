"""`python docker/gpus.py 4 > compose.gpus.yaml`: one ComfyUI for each GPU beside compose.yaml's first, and a gateway that knows all.
`--trainer 3` keeps that GPU for the trainer alone; without it a training takes turns with the first instance, and the others go on."""

from __future__ import annotations

import argparse

HEADER = """\
# Made by docker/gpus.py for {count} GPUs: docker compose --env-file docker/versions.env -f compose.yaml -f compose.gpus.yaml up
x-settings: &settings
  COMFYUI_URLS: {urls}
{shared}
services:
  gateway: {{ environment: *settings }}
  trainer:
    environment: *settings
"""
DEVICE = """\
    deploy:
      resources:
        reservations: {{ devices: !override [{{ driver: nvidia, device_ids: ["{gpu}"], capabilities: [gpu] }}] }}
"""
INSTANCE = """\
  comfyui-{gpu}:
    extends: {{ file: compose.yaml, service: comfyui }}
"""
# GPU 0 is the trainer's too: TRAINER_GPU of compose.yaml.
SHARED = "  SHARED_GPU_URLS: http://comfyui:8188\n"
MOST = 64


def describe(count: int, trainer_gpu: int | None) -> str:
    """The override file for `count` GPUs, one of them for the trainer alone, or none."""
    gpus = [gpu for gpu in range(1, count) if gpu != trainer_gpu]
    urls = ",".join(f"http://{name}:8188" for name in ["comfyui", *(f"comfyui-{gpu}" for gpu in gpus)])
    text = HEADER.format(count=count, urls=urls, shared=SHARED if trainer_gpu is None else '  SHARED_GPU: ""\n')
    if trainer_gpu is not None:
        text += DEVICE.format(gpu=trainer_gpu)
    return text + "".join((INSTANCE + DEVICE).format(gpu=gpu) for gpu in gpus)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, metavar="COUNT", help=f"GPUs on this machine, 1 to {MOST}")
    parser.add_argument("--trainer", type=int, metavar="GPU", help="a GPU for the trainer alone, 1 to COUNT - 1")
    given = parser.parse_args()
    if not 1 <= given.count <= MOST:
        parser.error(f"COUNT is {given.count}; allowed is 1 to {MOST}")
    if given.trainer is not None and not 1 <= given.trainer < given.count:
        parser.error(f"--trainer is {given.trainer}; allowed is 1 to COUNT - 1: the first instance has GPU 0")
    print(describe(given.count, given.trainer), end="")


if __name__ == "__main__":
    main()
