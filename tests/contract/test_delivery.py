"""Who hears what: addressing by client id, broadcasts, and clients that come back."""

from tests.contract.wire import Wire, empty_to_save, kinds, of_kind, probe_to_save

PRIVATE = {"execution_start", "execution_cached", "executing", "executed", "progress", "progress_state", "execution_success"}


async def test_only_status_reaches_other_clients(probe: Wire, prefix: str) -> None:
    bystander = await probe.listen("somebody-else")
    nameless = await probe.listen(None)
    _, messages = await probe.run(probe_to_save(prefix))
    assert set(kinds(messages)) >= PRIVATE
    for listener in (bystander, nameless):
        while (await listener.receive()).data["status"]["exec_info"]["queue_remaining"]:
            pass
        assert kinds(listener.messages) == ["status", "status", "status"]


async def test_status_counts_what_waits_and_runs(wire: Wire, prefix: str) -> None:
    _, messages = await wire.run(empty_to_save(prefix))
    assert [status["status"]["exec_info"]["queue_remaining"] for status in of_kind(messages, "status")] == [1, 1, 0]


async def test_without_client_id_progress_is_broadcast_and_the_end_is_not(probe: Wire, prefix: str) -> None:
    listener = await probe.listen("anybody")
    answer = await probe.post("/prompt", {"prompt": probe_to_save(prefix, steps=2)})
    entry = await probe.wait_for_history(answer.body["prompt_id"])
    assert entry["status"]["status_str"] == "success"
    while (await listener.until("status")).data["status"]["exec_info"]["queue_remaining"]:
        pass
    assert set(kinds(listener.messages)) == {"status", "progress", "progress_state"}


async def test_a_failure_without_client_id_is_told_to_nobody(probe: Wire, prefix: str) -> None:
    listener = await probe.listen("anybody")
    answer = await probe.post("/prompt", {"prompt": probe_to_save(prefix, mode="raise")})
    entry = await probe.wait_for_history(answer.body["prompt_id"])
    assert entry["status"]["messages"][-1][0] == "execution_error"
    while (await listener.until("status")).data["status"]["exec_info"]["queue_remaining"]:
        pass
    assert "execution_error" not in kinds(listener.messages)


async def test_an_interrupt_without_client_id_is_broadcast(probe: Wire, prefix: str) -> None:
    listener = await probe.listen("anybody")
    answer = await probe.post("/prompt", {"prompt": probe_to_save(prefix, steps=500)})
    await listener.until("progress")
    await probe.post("/interrupt", {"prompt_id": answer.body["prompt_id"]})
    assert (await listener.until("execution_interrupted")).data["prompt_id"] == answer.body["prompt_id"]


async def test_the_client_id_may_stand_in_extra_data(wire: Wire, prefix: str) -> None:
    listener = await wire.listen()
    body = {"prompt": empty_to_save(prefix), "extra_data": {"client_id": wire.client_id, "mykey": {"a": 1}}}
    prompt_id = (await wire.post("/prompt", body)).body["prompt_id"]
    messages = await listener.until_end(prompt_id)
    assert "execution_success" in kinds(messages)
    assert (await wire.history_of(prompt_id))["prompt"][3] == {"client_id": wire.client_id, "mykey": {"a": 1}}


async def test_the_server_gives_an_id_to_a_socket_without_one(wire: Wire, prefix: str) -> None:
    listener = await wire.listen(None)
    assert len(listener.sid) == 32
    prompt_id = await wire.submit(empty_to_save(prefix), client_id=listener.sid)
    assert "executed" in kinds(await listener.until_end(prompt_id))


async def test_a_new_socket_is_greeted_with_its_id_and_the_queue(wire: Wire) -> None:
    listener = await wire.listen()
    assert listener.first.kind == "status"
    assert listener.first.data == {"status": {"exec_info": {"queue_remaining": 0}}, "sid": wire.client_id}


async def test_who_comes_back_is_told_the_running_node_and_no_past_event(probe: Wire, prefix: str) -> None:
    before = await probe.listen()
    prompt_id = await probe.submit(probe_to_save(prefix, steps=40, delay_s=0.05))
    await before.until("progress", value=2)
    await before.socket.close()
    again = await probe.listen()
    told = await again.receive()
    assert (told.kind, told.data) == ("executing", {"node": "5"})
    following = await again.until("progress")
    assert following.data["value"] > 2
    messages = await again.until_end(prompt_id)
    assert "execution_start" not in kinds(messages)
    assert "execution_success" in kinds(messages)


async def test_who_comes_after_the_end_finds_it_in_history_alone(wire: Wire, prefix: str) -> None:
    prompt_id, _ = await wire.run(empty_to_save(prefix))
    late = await wire.listen()
    following = await wire.submit(empty_to_save(prefix))
    messages = await late.until_end(following)
    assert messages[0].kind == "status"
    assert all(message.data.get("prompt_id") != prompt_id for message in messages)
    assert (await wire.history_of(prompt_id))["status"]["completed"] is True


async def test_of_two_sockets_with_one_id_the_newer_hears(wire: Wire, prefix: str) -> None:
    older = await wire.listen()
    newer = await wire.listen()
    prompt_id = await wire.submit(empty_to_save(prefix))
    assert "execution_success" in kinds(await newer.until_end(prompt_id))
    await newer.socket.close()
    assert older.messages == []


async def test_history_is_written_when_the_end_marker_arrives(wire: Wire, prefix: str) -> None:
    for _ in range(30):
        prompt_id, _ = await wire.run(empty_to_save(prefix))
        assert (await wire.history_of(prompt_id))["outputs"]["9"]["images"]


async def test_no_event_is_lost_in_a_flood(probe: Wire, prefix: str) -> None:
    _, messages = await probe.run(probe_to_save(prefix, steps=2000, delay_s=0.0))
    ticks = [tick["value"] for tick in of_kind(messages, "progress")]
    assert ticks == list(range(1, 2001))
