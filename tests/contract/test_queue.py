"""Waiting, ordering, deleting and interrupting prompts."""

import asyncio

from tests.contract.wire import Listener, Wire, empty_to_save, kinds, of_kind, probe_to_save


async def start_slow(wire: Wire, listener: Listener, prefix: str, *, mode: str = "ok") -> str:
    """Submits a prompt that runs for long, and returns when its slow node has begun."""
    prompt_id = await wire.submit(probe_to_save(prefix, steps=1000, delay_s=0.03, mode=mode))
    await listener.until("executing", node="5", prompt_id=prompt_id)
    return prompt_id


async def ids_in_queue(wire: Wire) -> tuple[list[str], list[str]]:
    queue = (await wire.get("/queue")).body
    return [item[1] for item in queue["queue_running"]], [item[1] for item in queue["queue_pending"]]


async def test_the_queue_shows_what_runs_and_what_waits(probe: Wire, prefix: str) -> None:
    listener = await probe.listen()
    running = await start_slow(probe, listener, prefix)
    graph = empty_to_save(prefix)
    waiting = await probe.submit(graph)
    queue = (await probe.get("/queue")).body
    assert [item[1] for item in queue["queue_running"]] == [running]
    number, prompt_id, told_graph, extra_data, outputs = queue["queue_pending"][0]
    assert (prompt_id, told_graph, extra_data, outputs) == (waiting, graph, {"client_id": probe.client_id}, ["9"])
    assert number > queue["queue_running"][0][0]
    assert (await probe.get("/prompt")).body == {"exec_info": {"queue_remaining": 2}}


async def test_interrupting_by_id_stops_that_prompt_alone(probe: Wire, prefix: str) -> None:
    listener = await probe.listen()
    running = await start_slow(probe, listener, prefix)
    following = await probe.submit(probe_to_save(prefix, steps=2))
    assert (await probe.post("/interrupt", {"prompt_id": following})).status == 200  # waits, so nothing happens
    await listener.until("progress", prompt_id=running)
    assert await ids_in_queue(probe) == ([running], [following])
    assert (await probe.post("/interrupt", {"prompt_id": running})).status == 200
    told = await listener.until_end(running)
    assert kinds(told, without=("progress", "progress_state"))[-3:] == ["execution_interrupted", "status", "end"]
    interrupted = of_kind(told, "execution_interrupted")[0]
    assert (interrupted["node_id"], interrupted["node_type"], interrupted["executed"]) == ("5", "ProbeSteps", ["1"])
    assert "execution_success" in kinds(await listener.until_end(following))


async def test_an_interrupt_without_an_id_stops_whatever_runs(probe: Wire, prefix: str) -> None:
    listener = await probe.listen()
    running = await start_slow(probe, listener, prefix)
    assert (await probe.post("/interrupt", data=b"no json")).status == 200
    assert "execution_interrupted" in kinds(await listener.until_end(running))


async def test_an_interrupted_prompt_is_an_error_whose_last_message_tells(probe: Wire, prefix: str) -> None:
    listener = await probe.listen()
    running = await start_slow(probe, listener, prefix)
    await probe.post("/interrupt", {"prompt_id": running})
    await listener.until_end(running)
    entry = await probe.history_of(running)
    assert (entry["status"]["status_str"], entry["status"]["completed"], entry["outputs"]) == ("error", False, {})
    assert entry["status"]["messages"][-1][0] == "execution_interrupted"


async def test_a_node_without_progress_ends_before_the_interrupt_counts(probe: Wire, prefix: str) -> None:
    listener = await probe.listen()
    prompt_id = await probe.submit(probe_to_save(prefix, steps=20, delay_s=0.05, mode="quiet"))
    await listener.until("executing", node="5")
    # It is told of before it begins, and one last look at the wish to stop lies between.
    await asyncio.sleep(0.3)
    await probe.post("/interrupt", {"prompt_id": prompt_id})
    told = await listener.until_end(prompt_id)
    assert of_kind(told, "execution_interrupted")[0]["node_id"] == "9"
    finished = [state["nodes"]["5"]["state"] for state in of_kind(told, "progress_state") if "5" in state["nodes"]]
    assert finished[-1] == "finished"


async def test_an_interrupt_while_idle_does_not_reach_the_next_prompt(wire: Wire, prefix: str) -> None:
    await wire.post("/interrupt", {})
    _, messages = await wire.run(empty_to_save(prefix))
    assert "execution_success" in kinds(messages)


async def test_a_deleted_prompt_leaves_no_message_and_no_history(probe: Wire, prefix: str) -> None:
    listener = await probe.listen()
    running = await start_slow(probe, listener, prefix)
    dropped = await probe.submit(empty_to_save(prefix))
    kept = await probe.submit(empty_to_save(prefix))
    assert (await probe.post("/queue", {"delete": [dropped, running, "never-heard-of"]})).status == 200
    assert await ids_in_queue(probe) == ([running], [kept])
    await probe.post("/interrupt", {"prompt_id": running})
    messages = await listener.until_end(kept)
    assert all(message.data.get("prompt_id") != dropped for message in messages)
    assert (await probe.get(f"/history/{dropped}")).body == {}


async def test_clearing_drops_all_that_waits_and_nothing_that_runs(probe: Wire, prefix: str) -> None:
    listener = await probe.listen()
    running = await start_slow(probe, listener, prefix)
    for _ in range(3):
        await probe.submit(empty_to_save(prefix))
    assert (await probe.post("/queue", {"clear": True})).status == 200
    assert await ids_in_queue(probe) == ([running], [])


async def test_lower_numbers_run_first_and_ids_break_ties(probe: Wire, prefix: str) -> None:
    listener = await probe.listen()
    running = await start_slow(probe, listener, prefix)
    plain = await probe.submit(empty_to_save(prefix))
    front = await probe.submit(empty_to_save(prefix), front=True)
    last = await probe.submit(empty_to_save(prefix), number=1e9)
    first = await probe.submit(empty_to_save(prefix), number=-1e9)
    tie_b = await probe.submit(empty_to_save(prefix), number=5e8, prompt_id=f"b-{prefix}")
    tie_a = await probe.submit(empty_to_save(prefix), number=5e8, prompt_id=f"a-{prefix}")
    await probe.post("/interrupt", {"prompt_id": running})
    started = [start["prompt_id"] for start in of_kind(await listener.until_end(last), "execution_start")]
    assert started == [running, first, front, plain, tie_a, tie_b, last]


async def test_equal_number_and_id_answers_500_and_runs_nevertheless(probe: Wire, prefix: str) -> None:
    listener = await probe.listen()
    running = await start_slow(probe, listener, prefix)
    twin = f"twin-{prefix}"
    await probe.submit(empty_to_save(prefix), number=7e8, prompt_id=twin)
    again = await probe.post("/prompt", {"prompt": empty_to_save(prefix), "client_id": probe.client_id, "number": 7e8, "prompt_id": twin})
    assert again.status == 500
    assert await ids_in_queue(probe) == ([running], [twin, twin])
    await probe.post("/interrupt", {"prompt_id": running})
    await listener.until_end(twin)
    messages = await listener.until_end(twin)
    assert [start["prompt_id"] for start in of_kind(messages, "execution_start")] == [running, twin, twin]


async def test_bodies_that_change_nothing(wire: Wire) -> None:
    assert (await wire.post("/queue", data=b"{")).status == 500
    assert (await wire.post("/queue", {"delete": "abc"})).status == 200
    assert (await wire.post("/interrupt", [1])).status == 500
    assert (await wire.post("/free", data=b"{")).status == 500
    assert (await wire.post("/free", {})).status == 200
