"""The list of prompts that have run."""

from tests.contract.wire import Wire, empty_to_save


async def test_an_unknown_prompt_has_an_empty_history(wire: Wire) -> None:
    answer = await wire.get("/history/never-heard-of")
    assert (answer.status, answer.body) == (200, {})


async def test_history_is_paged_from_either_end(wire: Wire, prefix: str) -> None:
    await wire.post("/history", {"clear": True})
    prompt_ids = [(await wire.run(empty_to_save(prefix)))[0] for _ in range(4)]
    assert list((await wire.get("/history")).body) == prompt_ids
    assert list((await wire.get("/history", max_items="2")).body) == prompt_ids[2:]
    assert list((await wire.get("/history", max_items="2", offset="0")).body) == prompt_ids[:2]
    assert list((await wire.get("/history", max_items="2", offset="1")).body) == prompt_ids[1:3]
    assert (await wire.get("/history", max_items="abc")).status == 500


async def test_entries_are_deleted_by_id_or_all_at_once(wire: Wire, prefix: str) -> None:
    first, _ = await wire.run(empty_to_save(prefix))
    second, _ = await wire.run(empty_to_save(prefix))
    assert (await wire.post("/history", {"delete": [first, "never-heard-of"]})).status == 200
    assert (await wire.get(f"/history/{first}")).body == {}
    assert list((await wire.get(f"/history/{second}")).body) == [second]
    assert (await wire.post("/history", {"clear": True})).status == 200
    assert (await wire.get("/history")).body == {}
