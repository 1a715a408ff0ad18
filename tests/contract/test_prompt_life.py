"""The messages of one prompt, in order, and the history they leave."""

import pytest

from tests.contract.wire import Wire, empty_to_save, kinds, of_kind, output_names, probe_to_save

LIFE_OF_TWO_NODES = [
    "status", "status", "execution_start", "execution_cached",
    "progress_state", "executing", "progress_state",
    "progress_state", "executing", "executed", "progress_state",
    "execution_success", "status", "end",
]  # fmt: skip


async def test_messages_come_in_the_recorded_order(wire: Wire, prefix: str) -> None:
    prompt_id, messages = await wire.run(empty_to_save(prefix))
    assert kinds(messages) == LIFE_OF_TWO_NODES
    assert [message.data["node"] for message in messages if message.kind == "executing"] == ["1", "9", None]
    assert of_kind(messages, "executing")[0] == {"node": "1", "display_node": "1", "prompt_id": prompt_id}
    assert all(message.data.get("prompt_id", prompt_id) == prompt_id for message in messages)


async def test_history_holds_prompt_outputs_status_and_meta(wire: Wire, prefix: str) -> None:
    graph = empty_to_save(prefix)
    prompt_id, messages = await wire.run(graph)
    entry = await wire.history_of(prompt_id)
    number, told_id, told_graph, extra_data, outputs = entry["prompt"]
    assert (told_id, told_graph, extra_data, outputs) == (prompt_id, graph, {"client_id": wire.client_id}, ["9"])
    assert isinstance(number, int)
    item = entry["outputs"]["9"]["images"][0]
    assert item == {"filename": "image_00001_.png", "subfolder": prefix.removesuffix("/image"), "type": "output"}
    assert of_kind(messages, "executed")[0]["output"] == entry["outputs"]["9"]
    assert entry["meta"]["9"] == {"node_id": "9", "display_node": "9", "parent_node": None, "real_node_id": "9"}
    assert entry["status"]["status_str"] == "success"
    assert entry["status"]["completed"] is True
    assert [kind for kind, _ in entry["status"]["messages"]] == ["execution_start", "execution_cached", "execution_success"]


async def test_progress_state_carries_all_nodes_that_began(wire: Wire, prefix: str) -> None:
    prompt_id, messages = await wire.run(empty_to_save(prefix))
    states = [state["nodes"] for state in of_kind(messages, "progress_state")]
    assert [list(nodes) for nodes in states] == [["1"], ["1"], ["1", "9"], ["1", "9"]]
    assert states[0]["1"] == {
        "value": 0.0, "max": 1.0, "state": "running", "node_id": "1", "prompt_id": prompt_id,
        "display_node_id": "1", "parent_node_id": None, "real_node_id": "1",
    }  # fmt: skip
    assert (states[-1]["9"]["state"], states[-1]["9"]["value"]) == ("finished", 1.0)


async def test_each_step_sends_progress_state_and_then_progress(probe: Wire, prefix: str) -> None:
    prompt_id, messages = await probe.run(probe_to_save(prefix, steps=3))
    first = next(index for index, message in enumerate(messages) if message.kind == "progress")
    assert kinds(messages[first - 1 : first + 5]) == ["progress_state", "progress"] * 3
    ticks = of_kind(messages, "progress")
    assert ticks == [{"value": step, "max": 3, "prompt_id": prompt_id, "node": "5"} for step in (1, 2, 3)]


async def test_a_failing_node_is_named_with_its_inputs(probe: Wire, prefix: str) -> None:
    prompt_id, messages = await probe.run(probe_to_save(prefix, mode="raise", tag="boom"))
    assert kinds(messages)[-3:] == ["execution_error", "status", "end"]
    error = of_kind(messages, "execution_error")[0]
    assert (error["node_id"], error["node_type"], error["executed"]) == ("5", "ProbeSteps", ["1"])
    assert (error["exception_type"], error["exception_message"]) == ("ValueError", "probe failure boom\n")
    assert error["current_inputs"]["tag"] == ["boom"]
    assert isinstance(error["current_inputs"]["image"][0], str)
    assert "raise ValueError" in error["traceback"][-1]
    assert set(error["current_outputs"]) == {"1", "5", "9"}
    entry = await probe.history_of(prompt_id)
    assert (entry["status"]["status_str"], entry["status"]["completed"], entry["outputs"]) == ("error", False, {})
    assert entry["status"]["messages"][-1] == ["execution_error", error]


async def test_a_failure_does_not_disturb_the_next_prompt(probe: Wire, prefix: str) -> None:
    await probe.run(probe_to_save(prefix, mode="raise"))
    prompt_id, _ = await probe.run(probe_to_save(prefix))
    assert output_names(await probe.history_of(prompt_id)) == ["image_00001_.png"]


async def test_a_prefix_that_leaves_the_output_folder_fails_at_run_time(wire: Wire) -> None:
    prompt_id, messages = await wire.run(empty_to_save("../../evil"))
    error = of_kind(messages, "execution_error")[0]
    assert error["node_id"] == "9"
    assert "Saving image outside the output folder is not allowed" in error["exception_message"]
    assert error["current_inputs"]["filename_prefix"] == ["../../evil"]
    assert "SaveImage" in error["current_inputs"]["prompt"][0]
    assert (await wire.history_of(prompt_id))["outputs"] == {}


@pytest.mark.parametrize("batch_size", [1, 3])
async def test_a_batch_gives_one_item_per_picture_in_order(wire: Wire, prefix: str, batch_size: int) -> None:
    prompt_id, _ = await wire.run(empty_to_save(prefix, batch_size=batch_size))
    names = output_names(await wire.history_of(prompt_id))
    assert names == [f"image_{number:05}_.png" for number in range(1, batch_size + 1)]


async def test_counters_continue_from_the_files_on_disk(wire: Wire, prefix: str) -> None:
    await wire.run(empty_to_save(prefix, batch_size=2))
    prompt_id, _ = await wire.run(empty_to_save(prefix))
    assert output_names(await wire.history_of(prompt_id)) == ["image_00003_.png"]


async def test_preview_image_writes_temporary_files(wire: Wire, prefix: str) -> None:
    graph = empty_to_save(prefix)
    graph["9"] = {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}
    prompt_id, _ = await wire.run(graph)
    item = (await wire.history_of(prompt_id))["outputs"]["9"]["images"][0]
    assert (item["type"], item["subfolder"]) == ("temp", "")
    assert item["filename"].startswith("ComfyUI_temp_")
    assert (await wire.get("/view", **item)).status == 200
