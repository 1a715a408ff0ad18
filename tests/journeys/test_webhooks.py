"""A customer that wants to be told: a real receiver hears of every end, verified by the standard's own library, whatever dies between."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gateway.jobs.store import JobStore
from gateway.redis_client import connect_redis
from local.child import Child, pick_free_port
from local.services import Gateway
from tests.conftest import OpenGateway
from tests.deployment import running
from tests.job_specs import create
from tests.journeys.api import Api, Job, fetch, strip_signatures, wait_until
from tests.webhook_receiver import SECRET, Receiver

DOCS = Path(__file__).parents[2] / "docs" / "webhooks.md"
OWN_SECRET = "whsec_" + "c2VjcmV0LW9mLXRoaXMtb25lLXJlcXVlc3Q="
TRIVIAL = {"workflow": "trivial"}


@dataclass
class Shop:
    """A deployment that may go to this machine, and the receiver there."""

    gateway: Gateway
    api: Api
    receiver: Receiver
    redis_url: str

    def told(self, job_id: str) -> dict[str, Any]:
        """What the receiver heard of the job, signature checked."""
        wait_until(lambda: bool(self.receiver.told(job_id)), f"word of {job_id}")
        return self.receiver.told(job_id)[-1].open()

    def delivered(self, job_id: str) -> Job:
        """The job once a try to tell it has succeeded."""
        wait_until(lambda: any(one["error"] is None for one in self.api.get(job_id)["webhook_deliveries"]), f"a delivery of {job_id}")
        return self.api.get(job_id)


@pytest.fixture(scope="module")
def shop(redis_server: str, open_gateway: OpenGateway, receiver: Receiver) -> Iterator[Shop]:
    changes = {"WEBHOOK_SECRET": SECRET, "SLOTS_PER_INSTANCE": "1", "QUEUE_TIMEOUT_S": "5", "ALLOW_PRIVATE_URLS": "127.0.0.0/8"}
    with open_gateway(**changes) as gateway, Api(gateway.url) as caller:
        yield Shop(gateway, caller, receiver, redis_server)


def test_every_end_is_told_as_the_job_says_it(shop: Shop) -> None:
    hook = shop.receiver.url()
    succeeded = shop.api.create(**TRIVIAL, webhook=hook)
    failed = shop.api.create(workflow="failing", kind="error", webhook={"url": hook})
    assert shop.told(succeeded["id"])["status"] == "succeeded"
    assert shop.told(failed["id"])["error"]["code"] == "node_error"
    # It has the only slot, so that the others wait: one until its time is up.
    blocker = shop.api.create(workflow="slow", steps=10_000, delay_ms=20, priority="high", webhook=hook)
    shop.api.wait(blocker["id"], "running")
    expired, canceled = (shop.api.create(**TRIVIAL, webhook=hook) for _ in range(2))
    shop.api.http.post(f"/v1/generations/{canceled['id']}/cancel")
    assert shop.told(canceled["id"])["status"] == "canceled"
    assert shop.told(expired["id"])["status"] == "expired"
    shop.api.http.post(f"/v1/generations/{blocker['id']}/cancel")
    assert shop.told(blocker["id"])["status"] == "canceled"
    for job in (succeeded, failed, expired, canceled, blocker):
        now = shop.delivered(job["id"])
        assert [(one["attempt"], one["status"], one["error"]) for one in now["webhook_deliveries"]] == [(1, 204, None)]
        assert strip_signatures(shop.told(job["id"])) == strip_signatures({**now, "webhook_deliveries": []})
    assert fetch(shop.told(succeeded["id"])["outputs"][0]), "the URL it was told can be read"


def test_a_receiver_that_was_down_and_a_gateway_that_was_killed_lose_nothing(shop: Shop) -> None:
    late = Receiver(port=pick_free_port())
    job = shop.api.create(**TRIVIAL, webhook=late.url())
    wait_until(lambda: bool(shop.api.get(job["id"])["webhook_deliveries"]), "a first try")
    shop.gateway.kill()
    with late.listening():
        shop.gateway.start()
        shop.gateway.wait_ready()
        log = shop.delivered(job["id"])["webhook_deliveries"]
    assert [(one["attempt"], one["status"], one["error"]) for one in log] == [(1, None, "it cannot be reached"), (2, 204, None)]
    assert [one.open()["status"] for one in late.received] == ["succeeded"]


def test_a_training_route_and_a_workflow_route_take_webhooks_too(shop: Shop) -> None:
    answer = shop.api.http.post("/v1/workflows/trivial/generations", json={"webhook": {"url": shop.receiver.url(), "secret": OWN_SECRET}})
    shop.delivered(answer.json()["id"])
    [told] = shop.receiver.told(answer.json()["id"])
    assert told.open(OWN_SECRET)["webhook"] == shop.receiver.url()
    schema = shop.api.http.get("/openapi.json").json()
    own = schema["paths"]["/v1/workflows/trivial/generations"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert own["properties"]["webhook"]["anyOf"] == schema["components"]["schemas"]["GenerationRequest"]["properties"]["webhook"]["anyOf"]
    assert "webhook" in schema["components"]["schemas"]["TrainingRequest"]["properties"]


@pytest.mark.parametrize(
    ("webhook", "code"),
    [
        ("https://169.254.169.254/latest", "url_refused"),
        ("https://hooks.invalid/", "url_failed"),
        ("nonsense", "url_refused"),
        (5, "invalid_parameter"),
        ({"url": 5, "secret": OWN_SECRET}, "invalid_parameter"),
        ({"secret": OWN_SECRET}, "invalid_parameter"),
        ({"url": "https://93.184.215.14", "secret": "whsec_tooshortAAAA"}, "invalid_parameter"),
        ({"url": "https://93.184.215.14", "secret": [OWN_SECRET]}, "invalid_parameter"),
        ({"url": "https://93.184.215.14", "secret": OWN_SECRET, "retries": 3}, "invalid_parameter"),
    ],
    ids=str,
)
def test_what_cannot_be_told_is_refused_and_no_secret_repeated(webhook: Any, code: str, shop: Shop) -> None:
    for path, body in (("generations", TRIVIAL), ("workflows/trivial/generations", {}), ("trainings", {"name": "x", "dataset": "ds_x"})):
        answer = shop.api.http.post(f"/v1/{path}", json={**body, "webhook": webhook})
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, code), path
        assert answer.json()["error"]["details"]["parameter"].startswith("webhook")
        assert OWN_SECRET not in answer.text
        assert "tooshort" not in answer.text


def test_no_secret_is_repeated_for_a_fault_beside_it(shop: Shop) -> None:
    answer = shop.api.http.post("/v1/trainings", json={"name": "x", "webhook": {"url": "https://a.example", "secret": OWN_SECRET}})
    assert (answer.status_code, answer.json()["error"]["details"]["parameter"]) == (422, "dataset")
    assert OWN_SECRET not in answer.text


def test_replay(shop: Shop) -> None:
    job = shop.api.create(**TRIVIAL, webhook=shop.receiver.url())
    shop.delivered(job["id"])
    answer = shop.api.http.post(f"/v1/generations/{job['id']}/webhook/replay")
    assert (answer.status_code, answer.json()["id"]) == (202, job["id"])
    wait_until(lambda: len(shop.receiver.told(job["id"])) == 2, "a second word")
    command = [sys.executable, "-c", "from fluxgate.cli import main; main()", "webhooks", "replay", job["id"]]
    said = subprocess.run(
        command, env={**os.environ, "FLUXGATE_URL": shop.gateway.url}, capture_output=True, text=True, check=True, timeout=60
    )
    assert job["id"] in said.stdout
    wait_until(lambda: len(shop.receiver.told(job["id"])) == 3, "a third word")
    assert len({one.headers["webhook-id"] for one in shop.receiver.told(job["id"])}) == 1, "the receiver can know that it has seen it"
    wait_until(lambda: len(shop.api.get(job["id"])["webhook_deliveries"]) == 3, "all three in the log")


def test_whose_end_is_not_to_be_told_again(shop: Shop) -> None:
    async def create_foreign() -> None:
        connection = connect_redis(shop.redis_url)
        await create(JobStore(connection, ttl_s=1000), "gen_foreign", caller="eve")
        await connection.aclose(close_connection_pool=True)

    asyncio.run(create_foreign())
    silent = shop.api.run(**TRIVIAL)["id"]
    for path, status, code in (
        ("generations/gen_foreign", 404, "job_not_found"),
        ("generations/gen_none", 404, "job_not_found"),
        ("trainings/trn_none", 404, "job_not_found"),
        (f"trainings/{silent}", 404, "job_not_found"),
        (f"generations/{silent}", 409, "no_webhook"),
    ):
        answer = shop.api.http.post(f"/v1/{path}/webhook/replay")
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), path


def test_the_receiver_of_the_docs_receives(shop: Shop, tmp_path: Path) -> None:
    source = re.search(r"```python\n(# receiver\.py.*?)```", DOCS.read_text(), re.S)
    assert source
    (tmp_path / "receiver.py").write_text(source[1])
    port = pick_free_port()
    output = tmp_path / "logs" / "receiver.log"
    command = [sys.executable, "-u", str(tmp_path / "receiver.py"), str(port)]
    child = Child("receiver", command, env={"WEBHOOK_SECRET": SECRET}, log_path=output, is_ready=lambda: None)
    with running(child):
        job = shop.api.create(**TRIVIAL, webhook=f"http://127.0.0.1:{port}/")
        shop.delivered(job["id"])
        assert f"{job['id']} succeeded" in output.read_text()
        other = shop.api.create(**TRIVIAL, webhook={"url": f"http://127.0.0.1:{port}/", "secret": OWN_SECRET})
        wait_until(lambda: bool(shop.api.get(other["id"])["webhook_deliveries"]), "a try")
        assert shop.api.get(other["id"])["webhook_deliveries"][0]["status"] == 401, "it checks the signature"
