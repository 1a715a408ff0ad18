"""Runs a caption provider in this process: `launcher.py CONFIG`, a JSON file with entry_point, pictures, options and webhook_url.

Run by file name with the trainer environment's interpreter. Each caption goes to the webhook as it comes. Ends with 0 done, 1 failed,
130 interrupted.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import traceback
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

DONE, FAILED, INTERRUPTED = 0, 1, 130
POST_TIMEOUT_S = 10

Describe = Callable[[Sequence[Path], Mapping[str, str]], Iterator[str]]


def load(entry_point: str) -> Describe:
    """`module:function`. ImportError says which of the two is missing."""
    module, _, function = entry_point.partition(":")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise ImportError(f"The caption provider {entry_point!r} cannot be imported: {error}") from error
    if not callable(found):
        raise ImportError(f"The caption provider {entry_point!r} cannot be imported: {module} has no function {function!r}")
    provider: Describe = found
    return provider


def post(url: str, payload: Mapping[str, object]) -> None:
    body = json.dumps(payload).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    # The loopback is never behind a proxy.
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=POST_TIMEOUT_S).close()


def run(config: Mapping[str, Any]) -> None:
    pictures = [Path(path) for path in config["pictures"]]
    captions = load(config["entry_point"])(pictures, config["options"])
    for path, caption in zip(pictures, captions, strict=True):
        post(config["webhook_url"], {"type": "caption", "picture": path.name, "caption": caption})


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(config_path: str) -> None:
    signal.signal(signal.SIGINT, interrupt)
    status = FAILED
    try:
        run(json.loads(Path(config_path).read_text("utf-8")))
        status = DONE
    except KeyboardInterrupt:
        status = INTERRUPTED
    except Exception:  # noqa: BLE001  boundary: the exit code and the log are all that is left to say it with
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # Libraries leave threads that would keep a process which has ended otherwise.
    os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1])
