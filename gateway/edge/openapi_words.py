"""What `/docs` says beside the routes' own words: an introduction, the groups in the order in which one needs them, and requests to try."""

from __future__ import annotations

from typing import Any

INTRODUCTION = """\
A request in, a picture in S3 out: Fluxgate stands in front of ComfyUI.

Begin with `POST /v1/generations` and follow its `urls`. Every POST that changes something takes an `Idempotency-Key`. Errors are
`{"error": {"code", "message", "hint", "details"}}`, times RFC 3339 in UTC, sizes bytes. With keys set, send `Authorization: Bearer KEY`:
*Authorize* keeps one for this page."""

GROUPS = {
    "generations": "Pictures: make, read, cancel, run again.",
    "events": "What happens to a job while it runs, as a stream, page by page, or for browsers with a ticket.",
    "batches": "Thousands of pictures under one id, as a list or a sweep.",
    "uploads": "Files that later requests name by id.",
    "catalog": "Workflows, base models and LoRAs: what a request may name, and where it is ready.",
    "datasets": "Pictures and captions to train on, and what a training would make of them.",
    "trainings": "LoRA trainings and the captioning of data sets.",
    "webhooks": "Being told of a job's end once more.",
    "keys": "API keys for admins; everybody's own usage.",
    "instances": "The ComfyUIs behind this gateway, for admins.",
    "openai images": "OpenAI's image routes, for its clients.",
    "comfy api v2": "The Comfy API v2, for its official clients: raw graphs and their files.",
    "health": "Whether the process and what it stands on are well.",
}

_PICTURE = {"prompt": "a red circle on a blue background", "width": 512, "height": 512, "seed": 7}
_UPLOAD_ID = "00000000-0000-4000-8000-000000000000"
_TRAINING = {"name": "mytok", "dataset": "ds_0", "trigger_word": "TOK", "steps": 300, "rank": 8, "resolution": 128}
_GRAPH = {"1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 255}}}

# By method and path. Those of single workflows bring their own.
EXAMPLES: dict[str, dict[str, Any]] = {
    "POST /v1/generations": _PICTURE,
    "POST /v1/generations/preview": _PICTURE,
    "POST /v1/workflows/{name}/generations": _PICTURE,
    "POST /v1/generations/{job_id}/ticket": {"ttl_s": 600},
    "POST /v1/trainings/{job_id}/ticket": {"ttl_s": 600},
    "POST /v1/batches": {"parameters": _PICTURE, "sweep": {"seed": {"from": 1, "to": 4}, "steps": [4, 8]}},
    "POST /v1/datasets": {"uploads": [{"id": _UPLOAD_ID, "caption": "a photo of TOK"}], "name": "toks", "trigger_word": "TOK"},
    "PUT /v1/datasets/{dataset_id}/files": {"uploads": [{"id": _UPLOAD_ID, "caption": "a photo of TOK"}]},
    "PUT /v1/workflows/{name}": {"graph": _GRAPH, "bindings": 'title = "Mine"\n', "example": {"prompt": "a red circle"}},
    "POST /v1/models/load": {"base_model": "flux1-dev"},
    "POST /v1/models/unload": {"instance": None},
    "POST /v1/loras": {"name": "style", "url": "https://example.com/style.safetensors", "trigger_word": "STYLE"},
    "PATCH /v1/loras/{name}": {"shared": True},
    "POST /v1/trainings": _TRAINING,
    "POST /v1/datasets/{dataset_id}/captions": {"overwrite": False},
    "POST /v1/uploads": {"content_type": "image/png", "size_bytes": 204800, "sha256": "0" * 64, "name": "photo.png"},
    "POST /v1/instances": {"url": "http://127.0.0.1:8188"},
    "POST /v1/images/generations": {"prompt": "a red circle on a blue background", "size": "512x512"},
    "POST /api/v2/jobs": {"workflow": _GRAPH, "metadata": {"project": "posters"}},
    "POST /api/v2/assets/from-hash": {"hash": f"blake3:{'0' * 64}"},
    "POST /v1/keys": {"name": "app", "scopes": ["generate"], "limits": {"requests_per_minute": 600, "jobs_in_flight": 50}},
    "PATCH /v1/keys/{key_id}": {"name": "app", "limits": {"jobs_in_flight": 10}},
}
