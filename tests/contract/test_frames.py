"""Pictures on the socket: previews of both binary kinds, and results that are sent instead of saved."""

import io
import json
import struct

import pytest
from PIL import Image

from tests.contract.conftest import StartEngine
from tests.contract.forms import upload
from tests.contract.wire import Graph, Wire, empty_to_save, kinds, of_kind, probe_to_save

WITH_METADATA = {"supports_preview_metadata": True}


def open_picture(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as picture:
        picture.load()
    return picture


def split_metadata(payload: bytes) -> tuple[dict[str, object], bytes]:
    length = struct.unpack(">I", payload[:4])[0]
    return json.loads(payload[4 : 4 + length]), payload[4 + length :]


async def test_a_plain_client_gets_the_picture_after_progress(probe: Wire, prefix: str) -> None:
    _, messages = await probe.run(probe_to_save(prefix, steps=2, mode="preview"))
    frames = [message for message in messages if message.frame_type]
    assert len(frames) == 2
    first = messages.index(frames[0])
    assert kinds(messages[first - 2 : first + 1]) == ["progress_state", "progress", "frame 1"]
    assert struct.unpack(">I", frames[0].payload[:4])[0] == 1  # JPEG
    picture = open_picture(frames[0].payload[4:])
    assert (picture.format, picture.size) == ("JPEG", (512, 512))


async def test_a_client_that_asks_gets_the_node_with_the_picture_before_progress(probe: Wire, prefix: str) -> None:
    listener = await probe.listen(features=WITH_METADATA)
    prompt_id = await probe.submit(probe_to_save(prefix, steps=2, mode="preview"))
    messages = await listener.until_end(prompt_id)
    assert [name for name in kinds(messages) if name.startswith("frame")] == ["frame 4", "frame 4"]
    frame = next(message for message in messages if message.frame_type)
    position = messages.index(frame)
    assert kinds(messages[position - 1 : position + 2]) == ["progress_state", "frame 4", "progress"]
    metadata, image = split_metadata(frame.payload)
    assert metadata == {
        "node_id": "5", "prompt_id": prompt_id, "display_node_id": "5",
        "parent_node_id": None, "real_node_id": "5", "image_type": "image/jpeg",
    }  # fmt: skip
    assert open_picture(image).size == (512, 512)


async def test_feature_flags_are_answered_and_count_only_as_the_first_message(wire: Wire) -> None:
    listener = await wire.listen()
    await listener.socket.send_str("this is no JSON")
    await listener.socket.send_json({"type": "feature_flags", "data": WITH_METADATA})
    answer = await listener.until("feature_flags")
    assert answer.data["supports_preview_metadata"] is True
    assert answer.data["max_upload_size"] == 100 * 1024 * 1024
    assert (await wire.get("/features")).body == answer.data


async def test_without_client_id_previews_are_broadcast_plainly(probe: Wire, prefix: str) -> None:
    listener = await probe.listen("anybody", features=WITH_METADATA)
    answer = await probe.post("/prompt", {"prompt": probe_to_save(prefix, steps=2, mode="preview")})
    await probe.wait_for_history(answer.body["prompt_id"])
    while (await listener.until("status")).data["status"]["exec_info"]["queue_remaining"]:
        pass
    assert [name for name in kinds(listener.messages) if name.startswith("frame")] == ["frame 1", "frame 1"]


async def test_the_engine_sends_no_preview_unless_told_to(start_engine: StartEngine, wire: Wire, prefix: str) -> None:
    client = Wire(wire.http, start_engine().url)
    _, messages = await client.run(probe_to_save(prefix, mode="preview"))
    assert not [message for message in messages if message.frame_type]


def to_websocket(graph: Graph) -> Graph:
    return {**graph, "9": {"class_type": "SaveImageWebsocket", "inputs": {"images": graph["9"]["inputs"]["images"]}}}


@pytest.fixture
async def websocket_saver(wire: Wire) -> Wire:
    if not (await wire.get("/object_info/SaveImageWebsocket")).body:
        pytest.skip("the server lacks SaveImageWebsocket: --base-directory hides ComfyUI's own custom_nodes")
    return wire


async def test_save_image_websocket_sends_png_frames_and_no_output(websocket_saver: Wire, prefix: str) -> None:
    graph = to_websocket(empty_to_save(prefix, color=0x123456, batch_size=2, width=80, height=48))
    prompt_id, messages = await websocket_saver.run(graph)
    frames = [message for message in messages if message.frame_type]
    assert [frame.frame_type for frame in frames] == [1, 1]
    assert struct.unpack(">I", frames[0].payload[:4])[0] == 2  # PNG
    picture = open_picture(frames[0].payload[4:])
    assert (picture.format, picture.size, picture.getpixel((0, 0))) == ("PNG", (80, 48), (0x12, 0x34, 0x56))
    assert [tick["value"] for tick in of_kind(messages, "progress")] == [0, 1]
    assert "executed" not in kinds(messages)
    assert (await websocket_saver.history_of(prompt_id))["outputs"] == {}


async def test_save_image_websocket_is_never_cached(websocket_saver: Wire, prefix: str) -> None:
    graph = to_websocket(empty_to_save(prefix))
    await websocket_saver.run(graph)
    _, messages = await websocket_saver.run(graph)
    assert of_kind(messages, "execution_cached")[0]["nodes"] == ["1"]
    assert "frame 1" in kinds(messages)


async def test_save_image_websocket_names_its_node_to_a_client_that_asks(websocket_saver: Wire, prefix: str) -> None:
    listener = await websocket_saver.listen(features=WITH_METADATA)
    prompt_id = await websocket_saver.submit(to_websocket(empty_to_save(prefix)))
    messages = await listener.until_end(prompt_id)
    metadata, image = split_metadata(next(message for message in messages if message.frame_type == 4).payload)
    assert (metadata["node_id"], metadata["image_type"]) == ("9", "image/png")
    assert open_picture(image).size == (64, 64)


async def test_a_frame_may_exceed_four_mebibytes(websocket_saver: Wire, prefix: str) -> None:
    """Nothing on the wire bounds a picture: a client has to lift its own limit."""
    noise = Image.effect_noise((1600, 1600), 120)
    picture = Image.merge("RGB", (noise, noise.rotate(90), noise.rotate(180)))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=0)
    name = f"{prefix.replace('/', '-')}.png"
    assert (await upload(websocket_saver, name, buffer.getvalue())).body["name"] == name
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": name}},
        "9": {"class_type": "SaveImageWebsocket", "inputs": {"images": ["1", 0]}},
    }
    prompt_id, messages = await websocket_saver.run(graph)
    frame = next(message for message in messages if message.frame_type)
    assert len(frame.payload) > 4 * 1024 * 1024
    assert (await websocket_saver.history_of(prompt_id))["status"]["completed"] is True
