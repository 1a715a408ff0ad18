#!/bin/sh
# Starts ComfyUI on /data: start.sh [ComfyUI flags]
set -eu
mkdir -p /data/custom_nodes /data/models /data/input /data/output /data/temp
ln -sfn /opt/comfy/fluxgate /data/custom_nodes/fluxgate
cd /opt/comfy/ComfyUI
exec python3 main.py --base-directory /data --listen "${LISTEN:-0.0.0.0}" --port 8188 --disable-auto-launch "$@"
