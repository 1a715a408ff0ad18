"""Which server the suite speaks to: the ComfyUI at COMFYUI_URL, or else an engine started here.
COMFYUI_MODELS_DIR names the models folder of a ComfyUI, for the tests that write files into it."""

import os
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from tests.contract.wire import Wire

ROOT = Path(__file__).parents[2]
READY = "listening on "


@dataclass
class EngineProcess:
    url: str
    base: Path
    process: "subprocess.Popen[str]"


StartEngine = Callable[..., EngineProcess]


def launch_engine(base: Path, *flags: str) -> EngineProcess:
    command = [sys.executable, "-m", "local.engine", "--port", "0", "--base-directory", str(base), "--nodes", "tests.contract.probe_nodes"]
    log = (base / "engine.log").open("a")
    process = subprocess.Popen([*command, *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)
    log.close()
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith(READY), f"the engine did not start: {(base / 'engine.log').read_text()}"
    return EngineProcess(line.removeprefix(READY).strip(), base, process)


def stop_engine(engine: EngineProcess) -> None:
    engine.process.kill()
    engine.process.wait()
    assert engine.process.stdout is not None
    engine.process.stdout.close()


@pytest.fixture(scope="session")
def shared_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess | None]:
    if "COMFYUI_URL" in os.environ:
        yield None
        return
    engine = launch_engine(tmp_path_factory.mktemp("engine"), "--preview-method", "auto")
    yield engine
    stop_engine(engine)


@pytest.fixture(scope="session")
def comfyui(shared_engine: EngineProcess | None) -> str:
    """The base URL of the server under test, without a slash at its end."""
    return shared_engine.url if shared_engine else os.environ["COMFYUI_URL"].rstrip("/")


@pytest.fixture
def start_engine(shared_engine: EngineProcess | None, tmp_path: Path) -> Iterator[StartEngine]:
    """Starts an engine with other flags; skips the tests that would need to restart somebody's ComfyUI."""
    if shared_engine is None:
        pytest.skip("needs a server that the test may start and kill: only the engine is")
    started: list[EngineProcess] = []

    def start(*flags: str, base: Path = tmp_path) -> EngineProcess:
        started.append(launch_engine(base, *flags))
        return started[-1]

    yield start
    for engine in started:
        stop_engine(engine)


@pytest.fixture
def models_directory(shared_engine: EngineProcess | None) -> Path:
    """The models folder of the server under test."""
    if shared_engine:
        return shared_engine.base / "models"
    if "COMFYUI_MODELS_DIR" not in os.environ:
        pytest.skip("COMFYUI_MODELS_DIR does not name the models folder of the ComfyUI")
    return Path(os.environ["COMFYUI_MODELS_DIR"])


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
async def wire(http: aiohttp.ClientSession, comfyui: str) -> AsyncIterator[Wire]:
    """A client; whatever the test leaves in the queue is removed."""
    client = Wire(http, comfyui)
    yield client
    await client.post("/queue", {"clear": True})
    await client.post("/interrupt", {})
    await client.wait_until_idle()


@pytest.fixture
async def probe(wire: Wire) -> Wire:
    """A client of a server that has the slow node of this suite."""
    if not (await wire.get("/object_info/ProbeSteps")).body:
        pytest.skip("the server lacks ProbeSteps: copy tests/contract/comfyui_probe_node.py into its custom_nodes folder")
    return wire


@pytest.fixture
def prefix() -> str:
    """A filename prefix that no other test has used."""
    return f"contract/{uuid.uuid4().hex}/image"
