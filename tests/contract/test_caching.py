"""What is not run again, and what is told about it."""

import uuid
from typing import Any

import pytest

from tests.contract.conftest import StartEngine
from tests.contract.forms import encode_png, upload
from tests.contract.wire import Graph, Message, Wire, empty_to_save, kinds, of_kind, output_names


def cached(messages: list[Message]) -> list[str]:
    nodes: list[str] = of_kind(messages, "execution_cached")[0]["nodes"]
    return sorted(nodes)


def rename_nodes(graph: Graph) -> Graph:
    def rename(value: Any) -> Any:
        return [f"n{value[0]}", value[1]] if isinstance(value, list) else value

    return {
        f"n{node_id}": {**node, "inputs": {name: rename(value) for name, value in node["inputs"].items()}}
        for node_id, node in graph.items()
    }


async def test_a_repeated_prompt_runs_nothing_and_shows_the_old_file(wire: Wire, prefix: str) -> None:
    graph = empty_to_save(prefix)
    first, _ = await wire.run(graph)
    second, messages = await wire.run(graph)
    assert kinds(messages) == [
        "status", "status", "execution_start", "execution_cached", "executed", "progress_state", "execution_success", "status", "end",
    ]  # fmt: skip
    assert cached(messages) == ["1", "9"]
    assert (await wire.history_of(second))["outputs"] == (await wire.history_of(first))["outputs"]
    nodes = of_kind(messages, "progress_state")[0]["nodes"]
    assert (list(nodes), nodes["9"]["state"], nodes["9"]["value"]) == (["9"], "finished", 1)


async def test_only_what_changed_and_its_consumers_run_again(wire: Wire, prefix: str) -> None:
    graph = empty_to_save(prefix)
    await wire.run(graph)
    graph["9"]["inputs"]["filename_prefix"] = f"{prefix}-other"
    _, messages = await wire.run(graph)
    assert cached(messages) == ["1"]
    assert [message["node"] for message in of_kind(messages, "executing")] == ["9", None]


async def test_node_ids_do_not_count(wire: Wire, prefix: str) -> None:
    graph = empty_to_save(prefix)
    first, _ = await wire.run(graph)
    second, messages = await wire.run(rename_nodes(graph))
    assert cached(messages) == ["n1", "n9"]
    assert output_names(await wire.history_of(second), "n9") == output_names(await wire.history_of(first))


async def test_one_other_prompt_in_between_evicts_everything(wire: Wire, prefix: str) -> None:
    graph = empty_to_save(prefix)
    await wire.run(graph)
    await wire.run(empty_to_save(prefix))
    _, messages = await wire.run(graph)
    assert cached(messages) == []


async def test_freeing_memory_empties_the_cache(wire: Wire, prefix: str) -> None:
    graph = empty_to_save(prefix)
    await wire.run(graph)
    assert (await wire.post("/free", {"free_memory": True, "unload_models": True})).status == 200
    # Whether the flag is taken before or after the next prompt is open; one of the next two has to run, and only one.
    await wire.run(graph)
    prompt_id, _ = await wire.run(graph)
    assert output_names(await wire.history_of(prompt_id)) == ["image_00002_.png"]


async def test_an_overwritten_input_is_noticed(wire: Wire, prefix: str) -> None:
    name = f"{uuid.uuid4().hex}.png"
    graph = empty_to_save(prefix)
    graph["1"] = {"class_type": "LoadImage", "inputs": {"image": name}}
    await upload(wire, name, encode_png((255, 0, 0)))
    await wire.run(graph)
    _, unchanged = await wire.run(graph)
    await upload(wire, name, encode_png((0, 255, 0)), overwrite="true")
    _, changed = await wire.run(graph)
    assert (cached(unchanged), cached(changed)) == (["1", "9"], [])


@pytest.mark.parametrize(("flags", "expected"), [(["--cache-lru", "50"], ["1", "9"]), (["--cache-none"], [])])
async def test_the_cache_flags_of_the_engine(
    start_engine: StartEngine, wire: Wire, prefix: str, flags: list[str], expected: list[str]
) -> None:
    client = Wire(wire.http, start_engine(*flags).url)
    graph = empty_to_save(prefix)
    await client.run(graph)
    _, again = await client.run(graph)
    await client.run(empty_to_save(prefix))
    _, after_another = await client.run(graph)
    assert (cached(again), cached(after_another)) == (expected, expected)


async def test_the_lru_cache_of_the_engine_forgets_the_oldest(start_engine: StartEngine, wire: Wire, prefix: str) -> None:
    client = Wire(wire.http, start_engine("--cache-lru", "2").url)
    graph = empty_to_save(prefix)
    await client.run(graph)
    for _ in range(3):
        await client.run(empty_to_save(prefix))
    _, messages = await client.run(graph)
    assert cached(messages) == []
