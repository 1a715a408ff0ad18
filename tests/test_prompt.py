"""One prompt whose instance is asked in vain while its socket speaks. The real servers' ways to fail are in journeys/test_faults.py."""

from __future__ import annotations

import asyncio
import json
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gateway.comfy.messages import Message, Preview, parse_text
from gateway.dispatch.changeover import Changeover
from gateway.dispatch.instance import Instance
from gateway.dispatch.prompt import Prompt
from gateway.errors import InstanceUnreachable
from gateway.settings import Settings

END: tuple[tuple[str, dict[str, Any]], ...] = (
    ("executed", {"node": "9", "output": {"images": [{"filename": "a.png", "subfolder": "", "type": "output"}]}}),
    ("execution_success", {}),
    ("executing", {"node": None}),
)


class Deaf:
    """An instance whose HTTP side answers late, `held`, or not at all, while its socket tells everything."""

    id = "deaf"

    def __init__(self, *, answers: bool) -> None:
        self._answers = answers
        self.asked = asyncio.Event()
        self.client, self.socket, self.changeover = self, self, Changeover()
        self.is_connected, self.client_id = True, "ours"
        self.tell: Any = None

    def listen(self, prompt_id: str, listener: Any) -> None:
        self.tell = listener

    def forget(self, prompt_id: str) -> None: ...

    async def submit(self, *given: object) -> None: ...

    async def queue(self) -> Any:
        self.asked.set()
        await asyncio.sleep(0.1)
        if not self._answers:
            raise InstanceUnreachable("502 from a proxy")
        return SimpleNamespace(pending=(), holds=lambda prompt_id: True)

    async def history(self, prompt_id: str) -> None:
        return None


@pytest.mark.parametrize("answers", [False, True], ids=["in vain", "too early"])
async def test_an_end_that_is_heard_while_the_instance_is_asked_counts_at_once(answers: bool) -> None:
    deaf, heard = Deaf(answers=answers), list[Message | Preview]()
    settings = Settings(poll_s=0.1, instance_lost_s=3600, stall_timeout_s=3600)
    prompt = Prompt("p", b"{}", ["9"], cast(Instance, deaf), settings, heard.append)
    following = asyncio.create_task(prompt.follow(resumed=False, deadline=time.monotonic() + 3600))
    await deaf.asked.wait()
    for kind, data in END:
        message = parse_text(json.dumps({"type": kind, "data": {"prompt_id": "p", **data}}))
        assert message is not None
        deaf.tell(message)
    entry = await asyncio.wait_for(following, 30)
    assert entry is not None
    assert entry.has_succeeded
    assert len(entry.files()) == 1
    assert len(heard) == len(END)
