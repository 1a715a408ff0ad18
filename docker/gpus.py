"""`python docker/gpus.py 4 > compose.gpus.yaml`: one ComfyUI for each GPU beside compose.yaml's first, and a gateway that knows all.
`--trainer GPU` gives the trainer that GPU; it takes turns with the instances only when that is GPU 0, which compose.yaml names gpu0."""

from __future__ import annotations

import argparse

HEADER = """\
# Made by docker/gpus.py for {count} GPUs: docker compose --env-file docker/versions.env -f compose.yaml -f compose.gpus.yaml up
x-urls: &urls
  COMFYUI_URLS: {urls}
{shared}
services:
  gateway: {{ environment: {{ <<: *urls }} }}
  trainer: {{ environment: {{ <<: *urls }} }}
"""
INSTANCE = """\
  comfyui-{gpu}:
    extends: {{ file: compose.yaml, service: comfyui }}
    deploy: {{ resources: {{ reservations: {{ devices: !override [{{ driver: nvidia, device_ids: ["{gpu}"], capabilities: [gpu] }}] }} }} }}
"""


def describe(count: int, trainer_gpu: int) -> str:
    """The override file for `count` GPUs, the trainer on one of them."""
    names = ["comfyui", *(f"comfyui-{gpu}" for gpu in range(1, count))]
    shared = "" if trainer_gpu == 0 else '  SHARED_GPU: ""\n'
    text = HEADER.format(count=count, urls=",".join(f"http://{name}:8188" for name in names), shared=shared)
    return text + "".join(INSTANCE.format(gpu=gpu) for gpu in range(1, count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, choices=range(1, 65), metavar="COUNT", help="GPUs on this machine, 1 to 64")
    parser.add_argument("--trainer", type=int, default=0, metavar="GPU", help="the trainer's GPU (default 0)")
    given = parser.parse_args()
    print(describe(given.count, given.trainer), end="")


if __name__ == "__main__":
    main()
