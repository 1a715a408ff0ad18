#!/bin/sh
# The built-in engine in ComfyUI's place: puts the small model into DATA_DIR/models, then listens.
set -eu
data=${DATA_DIR:-/data}
python -m local.tinyflux.install "$data/models"
exec python -m local.engine --listen "${LISTEN:-0.0.0.0}" --port "${ENGINE_PORT:-8188}" --base-directory "$data" --preview-method auto
