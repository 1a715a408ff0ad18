"""What ComfyUI said on its socket and in its history, as recorded, read by the gateway."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.comfy.client import HistoryEntry, OutputFile
from gateway.comfy.messages import (
    Executed,
    Executing,
    ExecutionCached,
    ExecutionError,
    ExecutionInterrupted,
    ExecutionStart,
    ExecutionSuccess,
    Message,
    Preview,
    ProgressState,
    ProgressStep,
    parse_binary,
    parse_text,
)

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "data/comfyui/messages.json").read_text())
JPEG = b"\xff\xd8\xff\xe0 picture"


def read(name: str) -> list[Message]:
    """A recording's text messages, those that concern no prompt left out."""
    parsed = [parse_text(json.dumps(message)) for message in RECORDED[name] if "binary" not in message]
    return [message for message in parsed if message is not None]


def test_a_run_with_steps_is_read_whole() -> None:
    messages = read("steps")
    assert [type(message) for message in messages[:3]] == [ExecutionStart, ExecutionCached, ProgressState]
    assert isinstance(messages[1], ExecutionCached)
    assert messages[1].data.nodes == ["1"]
    steps = [(message.data.value, message.data.max) for message in messages if isinstance(message, ProgressStep)]
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    [saved] = [message for message in messages if isinstance(message, Executed)]
    assert saved.data.node == "9"
    assert [type(message) for message in messages[-2:]] == [ExecutionSuccess, Executing]
    assert messages[-1].data == messages[-1].data.model_copy(update={"node": None}), "the end marker names no node"
    assert len({message.data.prompt_id for message in messages}) == 1


def test_only_what_concerns_a_prompt_is_read() -> None:
    kinds = {message["type"] for name in ("steps", "error", "cached", "interrupted") for message in RECORDED[name]}
    skipped = {kind for kind in kinds if all(parse_text(json.dumps(m)) is None for m in RECORDED["steps"] if m["type"] == kind)}
    assert "status" in kinds & skipped
    for other in (
        '{"type":"status","data":{}}',
        '{"type": "crystools.monitor", "data": {}}',
        '{"type": "b_preview"}',
        "[]",
        "",
        "not json",
    ):
        assert parse_text(other) is None


def test_an_error_is_read_without_tensors_graph_or_paths() -> None:
    [error] = [message for message in read("error") if isinstance(message, ExecutionError)]
    assert (error.data.node_id, error.data.node_type, error.data.exception_type) == ("5", "ProbeSteps", "ValueError")
    assert error.data.exception_message == "probe failure d\n"
    recorded = json.dumps([message for message in RECORDED["error"] if message["type"] == "execution_error"])
    kept = error.model_dump_json()
    for secret in ("tensor(", "/opt/ComfyUI", "traceback"):
        assert secret in recorded, "the recording has it"
        assert secret not in kept


def test_an_interrupt_is_no_error() -> None:
    messages = read("interrupted")
    assert [type(message) for message in messages] == [ProgressStep, ExecutionInterrupted, Executing]


def test_a_cached_run_has_outputs_but_executes_nothing() -> None:
    messages = read("cached")
    assert [message.data.node for message in messages if isinstance(message, Executing)] == [None]
    [saved] = [message for message in messages if isinstance(message, Executed)]
    assert saved.data.output == {"images": [{"filename": "trivial_00001_.png", "subfolder": "a", "type": "output"}]}


# -- previews --------------------------------------------------------------------------------------------------


def rebuild(frame: dict[str, Any]) -> bytes:
    """A recorded frame: its first bytes as they were, its picture's beginning, and its recorded length."""
    head = bytes.fromhex(frame["head_hex"])
    if frame["binary"] == 4:
        metadata = json.dumps(frame["metadata"]).encode()
        assert struct.unpack(">II", head[:8]) == (4, len(metadata)), "the recording's metadata is complete"
        head = head[:8] + metadata + bytes.fromhex(frame["image_magic"])
    return head + bytes(frame["len"] - len(head))


@pytest.mark.parametrize("name", ["previews_with_flag", "previews_without_flag"])
def test_recorded_previews_are_read(name: str) -> None:
    frames = [frame for frame in RECORDED[name] if "binary" in frame]
    assert len(frames) == 2
    for frame in frames:
        preview = parse_binary(rebuild(frame))
        assert preview is not None
        assert preview.content_type == "image/jpeg"
        assert preview.image.startswith(bytes.fromhex(frame["image_magic"]))
        assert preview.prompt_id == frame.get("metadata", {}).get("prompt_id")


def test_png_frames_say_so() -> None:
    assert parse_binary(struct.pack(">II", 1, 2) + b"\x89PNG") == Preview(None, "image/png", b"\x89PNG")


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\x00\x00\x00\x01",
        struct.pack(">II", 3, 1) + b"1text",
        struct.pack(">II", 4, 1 << 31) + b"{}",
        struct.pack(">II", 4, 4) + b"nope" + JPEG,
        struct.pack(">II", 99, 0) + JPEG,
    ],
)
def test_other_frames_are_none(frame: bytes) -> None:
    assert parse_binary(frame) is None


@given(st.binary(max_size=64))
def test_no_frame_breaks_the_reader(frame: bytes) -> None:
    preview = parse_binary(frame)
    assert preview is None or frame.endswith(preview.image)


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_no_message_breaks_the_reader(data: Any) -> None:
    for kind in ("executing", "progress", "progress_state", "executed", "execution_error"):
        message = parse_text(json.dumps({"type": kind, "data": data}))
        assert message is None or isinstance(data, dict)


# -- history ---------------------------------------------------------------------------------------------------


def history(name: str) -> HistoryEntry:
    [entry] = RECORDED["history"][name].values()
    return HistoryEntry.model_validate(entry)


def test_a_success_names_its_files() -> None:
    entry = history("success")
    assert entry.files() == [OutputFile("trivial_00001_.png", "a", "output", "9")]
    assert entry.error is None
    assert not entry.was_interrupted


def test_error_and_interrupt_are_told_apart() -> None:
    failed, stopped = history("error"), history("interrupted")
    assert failed.error is not None
    assert failed.error.node_type == "ProbeSteps"
    assert not failed.was_interrupted
    assert stopped.error is None
    assert stopped.was_interrupted
    assert failed.status is not None
    assert stopped.status is not None
    assert failed.status.status_str == stopped.status.status_str, "which is why the last message decides"


def test_pictures_of_previews_are_not_kept() -> None:
    images = [
        {"filename": "b.png", "subfolder": "", "type": "temp"},
        {"filename": "a.png", "subfolder": "x", "type": "output"},
        {"filename": "c.mp4", "subfolder": "", "type": "output"},
    ]
    entry = HistoryEntry.model_validate(
        {"outputs": {"7": {"images": images, "animated": [True]}, "8": {"text": ["said"]}, "9": {"images": None}}}
    )
    assert [file.filename for file in entry.files()] == ["a.png", "c.mp4"]
    assert [file.filename for file in entry.files(("output", "temp"))] == ["b.png", "a.png", "c.mp4"]
