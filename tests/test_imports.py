"""What importing the gateway does, seen from outside: nothing. The rules on its source stand in test_house_rules.py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.test_house_rules import ROOT, find_files, module_of

# urllib3 binds a socket once to learn whether the machine speaks IPv6; that is not a connection.
PROBE = """
import importlib, sys, threading
seen = []
sys.addaudithook(lambda event, args: seen.append(event) if event in ("socket.connect", "subprocess.Popen", "os.system") else None)
for name in sys.argv[1:]:
    importlib.import_module(name)
seen += [f"module {name}" for name in ("torch", "local", "trainer_worker", "fluxgate") if name in sys.modules]
seen += [f"thread {thread.name}" for thread in threading.enumerate() if thread is not threading.main_thread()]
print("\\n".join(seen))
"""


def watch_imports(modules: Iterable[str], folder: Path) -> list[str]:
    """What a fresh process does besides reading code when it imports the modules."""
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", PROBE, *modules]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True, timeout=120).stdout.split("\n")[:-1]


def test_importing_the_gateway_does_nothing() -> None:
    modules = [module_of(path) for path in find_files("gateway", "comfy_workflows")]
    assert watch_imports(modules, ROOT) == [""]


def test_work_at_import_is_seen(tmp_path: Path) -> None:
    (tmp_path / "busy.py").write_text("import socket, subprocess\nsocket.socket().connect_ex(('127.0.0.1', 9))\nsubprocess.run(['true'])\n")
    assert watch_imports(["busy"], tmp_path) == ["socket.connect", "subprocess.Popen"]
