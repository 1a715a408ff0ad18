"""What a dead server forgets, and what it leaves behind. Only the engine may be killed here."""

import signal
import uuid

import aiohttp
import pytest

from tests.contract.conftest import StartEngine
from tests.contract.wire import Wire, empty_to_save, output_names, probe_to_save


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
async def test_a_killed_engine_forgets_all_but_its_files(
    start_engine: StartEngine, http: aiohttp.ClientSession, stop: signal.Signals
) -> None:
    engine = start_engine()
    before = Wire(http, engine.url)
    await before.run(empty_to_save("kept/image"))
    listener = await before.listen()
    lost = await before.submit(probe_to_save("kept/image", steps=1000), prompt_id="job-1")
    await listener.until("progress")
    engine.process.send_signal(stop)
    assert engine.process.wait() == -stop  # at once, without a drain
    with pytest.raises(ConnectionError, match="socket closed"):
        await listener.until_end(lost)
    assert listener.socket.close_code == aiohttp.WSCloseCode.ABNORMAL_CLOSURE
    with pytest.raises(aiohttp.ClientConnectorError):
        await before.get("/prompt")

    after = Wire(http, start_engine().url)
    assert (await after.get("/history")).body == {}
    assert (await after.get("/queue")).body == {"queue_running": [], "queue_pending": []}
    again, _ = await after.run(empty_to_save("kept/image"), prompt_id="job-1")
    entry = await after.history_of(again)
    assert (entry["prompt"][0], output_names(entry)) == (0, ["image_00002_.png"])


async def test_the_temporary_folder_is_empty_after_a_restart(start_engine: StartEngine, http: aiohttp.ClientSession) -> None:
    engine = start_engine()
    left = engine.base / "temp" / f"{uuid.uuid4().hex}.png"
    left.write_bytes(b"old")
    start_engine()
    assert not left.exists()
