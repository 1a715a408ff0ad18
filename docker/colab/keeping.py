"""The state on a machine that may go away at any time: brought back at the start, sent away every half minute and at the end.

The live files stay on the machine's own disk: an append-only file on a mounted Drive would be written anew as a whole at every change.
A copy of it that is cut off in the middle is one that Redis still reads: it forgets the last entry."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

PERIOD_S = 30.0
# What is made anew, and what belongs to this start alone.
LEFT_OUT = ("/lock", "/logs/**", "/rclone-cache/**", "/comfyui/**", "/connection.json", "*.part")
MARK = "fluxgate-state"


class KeepError(Exception):
    """The place where the state is kept could not be read or written; the message says what rclone said."""


class Keeper:
    """Keeps `state` in a folder (a mounted Drive) or in `s3://BUCKET/PREFIX`, there by S3_ENDPOINT_URL and AWS_* of the environment."""

    def __init__(self, rclone: str, state: Path, place: str) -> None:
        self._rclone, self._state = rclone, state
        self._env = {**os.environ, "RCLONE_CONFIG": os.devnull}
        self._target = place
        if place.startswith("s3://"):
            self._target = "keep:" + place.removeprefix("s3://").rstrip("/")
            self._env |= {"RCLONE_CONFIG_KEEP_TYPE": "s3", "RCLONE_CONFIG_KEEP_PROVIDER": "Other", "RCLONE_CONFIG_KEEP_ENV_AUTH": "true"}
            self._env["RCLONE_CONFIG_KEEP_ENDPOINT"] = os.environ.get("S3_ENDPOINT_URL", "")
        else:
            Path(place).mkdir(parents=True, exist_ok=True)

    def restore(self) -> bool:
        """Bring the state back; False where there is none, or where this machine has it still.

        Raises KeepError where the place cannot be read: then nobody knows whether there is any.
        """
        mark = self._state / MARK
        if mark.exists():
            return False
        self._state.mkdir(parents=True, exist_ok=True)
        self._run("copy", self._target, str(self._state))
        was_kept = mark.exists()
        mark.write_text("1\n")
        return was_kept

    def save(self) -> None:
        """Make the kept state like this one. What was not brought back first is never overwritten."""
        if not (self._state / MARK).exists():
            raise KeepError(f"{self._state} was never filled; nothing is written to {self._target}.")
        self._run("sync", str(self._state), self._target)

    def _run(self, verb: str, source: str, target: str) -> None:
        # Files grow while they are copied; that is no reason to leave them.
        flags = ["--local-no-check-updated", "--retries", "2", *(f"--exclude={name}" for name in LEFT_OUT)]
        done = subprocess.run([self._rclone, verb, source, target, *flags], env=self._env, capture_output=True, text=True, check=False)
        if done.returncode and "directory not found" not in done.stderr:
            raise KeepError(f"{target}: {' '.join(done.stderr.split())[-300:]}")
