"""Tells a training's progress as SimpleTuner 3.1.6 does: JSON posted to one address, and a progress bar on the standard error.

An address that does not answer never stops a training.
"""

from __future__ import annotations

import http.client
import json
import sys
import traceback
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

POST_TIMEOUT_S = 5
BAR_CELLS = 10

Json = dict[str, Any]


class Reporter:
    def __init__(self, url: str) -> None:
        self._url = url
        # The address is on this machine; a proxy is not.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def post(self, payload: Json) -> None:
        if not self._url:
            return
        body = json.dumps({"severity": "info", "job_id": None, **payload}).encode()
        request = urllib.request.Request(self._url, body, {"Content-Type": "application/json"})
        try:
            with self._opener.open(request, timeout=POST_TIMEOUT_S):
                pass
        except (OSError, http.client.HTTPException) as error:
            print(f"The webhook did not take an event: {error}", file=sys.stderr)

    def tell_stage(self, key: str, status: str, current: int = 0, total: int = 0) -> None:
        label = key.removeprefix("init_").replace("_", " ").capitalize()
        progress: Json = {"label": label}
        if total:
            progress |= {"current": current, "total": total, "percent": 100 * current // total}
        self.post({"type": "lifecycle.stage", "stage": {"key": key, "label": label, "status": status, "progress": progress}})

    def tell_note(self, message: str) -> None:
        print(message, file=sys.stderr)
        self.post({"type": "notification", "message": message, "title": message})

    def tell_start(self, step: int, steps: int) -> None:
        data = {"status": "running", "total_num_steps": steps, "global_step": step, "remaining_num_steps": steps - step}
        self.post({"type": "training.status", "title": "Running", "data": data})

    def tell_step(self, step: int, steps: int, loss: float, rate: float, epoch: int) -> None:
        share = step / steps
        bar = ("#" * round(share * BAR_CELLS)).ljust(BAR_CELLS)
        line = f"Epoch {epoch}/{epoch} Steps: {share:4.0%}|{bar}| {step}/{steps} [lr={rate:.3g}, step_loss={loss:.4g}]"
        print(f"\r{line}", end="", file=sys.stderr, flush=True)
        metrics = {"loss": loss, "parent_loss": None, "learning_rate": rate, "epoch": epoch}
        data = {"status": "running", "global_step": step, "total_num_steps": steps, "current_epoch": epoch}
        progress = {"current": step, "total": steps, "metrics": metrics}
        self.post({"type": "training.status", "title": "Running", "data": data, "progress": progress})

    def tell_checkpoint(self, folder: Path) -> None:
        self.tell_stage("checkpoint_save", "completed")
        self.post({"type": "training.checkpoint", "checkpoint": {"path": str(folder), "label": folder.name, "is_final": False}})

    def tell_sample(self, step: int, prompt: str, picture: str) -> None:
        """`picture` is a PNG in base64."""
        payload = {"type": "training.validation", "message": f"Validation: {prompt}", "images": [picture]}
        self.post({**payload, "data": {"global_step": step}})

    def tell_completed(self, steps: int) -> None:
        print(file=sys.stderr)
        self.post(
            {
                "type": "lifecycle.stage",
                "stage": {"key": "training_complete", "label": "Training Complete", "status": "completed", "progress": {"percent": 100}},
                "message": "Training run complete.",
                "data": {"state": {"global_step": steps}},
            }
        )

    def tell_interrupted(self) -> None:
        self.post({"type": "training.status", "status": "interrupted"})

    def tell_failed(self, error: Exception) -> None:
        """`status` at the top, unlike a running one's: so SimpleTuner does."""
        payload = {"type": "training.status", "status": "failed", "error": str(error), "traceback": traceback.format_exc()}
        self.post({**payload, "severity": "error"})
