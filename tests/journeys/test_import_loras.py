"""LoRAs from elsewhere, over HTTP and through the worker: by upload and by URL, taken, converted or refused with a reason, used by name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors import safe_open

from local.services import S3Server
from local.tinyflux.weights import MODEL_DIR
from tests.dataset_api import read_error
from tests.either_client import KINDS, opened
from tests.journeys.api import wait_until
from tests.journeys.studio import Studio, running_studio
from tests.lora_files import GOOD, REFUSED, Good, Write
from tests.web_site import running_site

LORAS = "/v1/loras"
TINY = MODEL_DIR.parent
Json = dict[str, Any]


@pytest.fixture(scope="module")
def studio(redis_server: str, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    with running_studio(redis_server, s3_server, tmp_path_factory.mktemp("studio"), TRAINER="tiny") as running:
        yield running


def upload(studio: Studio, path: Path, name: str = "style.safetensors") -> str:
    """By a promise, as large files come."""
    body = path.read_bytes()
    wanted = {"content_type": "application/octet-stream", "size_bytes": len(body), "sha256": hashlib.sha256(body).hexdigest(), "name": name}
    promise = studio.http.post("/v1/uploads", json=wanted).json()
    assert httpx.put(promise["url"], content=body, headers=promise["headers"]).status_code == 200
    return str(promise["id"])


def ask(studio: Studio, **body: object) -> httpx.Response:
    return studio.http.post(LORAS, json=body)


def settle(studio: Studio, name: str) -> Json:
    """The LoRA once it is ready or has failed."""
    found: Json = {}

    def has_settled() -> bool:
        found.update(studio.http.get(f"{LORAS}/{name}").json())
        return bool(found["status"] != "importing")

    wait_until(has_settled, f"an end of the import of {name}")
    return found


def of_title(title: str) -> Good:
    return next(good for good in GOOD if good.title == title)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Callable[[Path], str]]:
    """Serves files under a name of any kind; answers with their URLs."""
    served: dict[str, Path] = {}

    with running_site(lambda path: served[path.partition("?")[0]].read_bytes()) as somebodys:

        def serve(path: Path) -> str:
            served[f"/{path.name}"] = path
            return f"{somebodys.url}/{path.name}?token=secret"

        yield serve


@pytest.mark.parametrize("title", ["kohya", "diffusers without prefix"])
def test_a_lora_is_taken_and_converted_where_comfyui_would_ignore_it(studio: Studio, tmp_path: Path, title: str) -> None:
    good = of_title(title)
    name = f"taken-{len(title)}"
    answer = ask(studio, name=name, upload=upload(studio, good.write(tmp_path)), trigger_word="TOK")
    assert answer.status_code == 202, answer.text
    assert (answer.json()["status"], answer.headers["location"].rpartition("/")[2]) == ("importing", name)
    lora = settle(studio, name)
    assert lora["status"] == "ready", lora
    assert (lora["family"], lora["format"], lora["patched_layers"], lora["trigger_word"]) == ("flux1", good.naming, good.layers, "TOK")
    assert (lora["source"], lora["training"], bool(lora["ready_on"])) == ("upload", None, True)
    published = tmp_path / "published.safetensors"
    published.write_bytes(httpx.get(lora["url"]).content)
    assert hashlib.sha256(published.read_bytes()).hexdigest() == lora["sha256"]
    with safe_open(str(published), "numpy") as file:
        assert any(key.startswith(("transformer.", "lora_unet_")) for key in file.keys())  # noqa: SIM118
        assert file.metadata()["fluxgate.trigger_word"] == "TOK"


def test_a_lora_by_url_is_used_by_name(studio: Studio, site: Callable[[Path], str]) -> None:
    source = next(TINY.rglob("*tok*.safetensors"))
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    answer = ask(studio, name="tok", url=site(source), base_model="tinyflux", sha256=digest.upper(), trigger_word="TOK")
    assert answer.status_code == 202, answer.text
    lora = settle(studio, "tok")
    assert lora["status"] == "ready", lora
    assert (lora["base_model"], lora["family"]) == ("tinyflux", "tinyflux")
    job = studio.read(answer.json()["import"]["id"])
    assert (job["object"], job["status"], job["lora"]) == ("lora_import", "succeeded", "tok")
    assert "secret" not in str(job) + str(studio.events(job["id"])) + str(lora)
    assert studio.generate(0.0, "tok") != studio.generate(1.0, "tok")
    shown = studio.wait_for_pictures("tok")
    assert httpx.get(shown["before"]).content != httpx.get(shown["after"]).content


@pytest.mark.parametrize("title", ["truncated", "a pickle renamed", "NaN", "zero coverage", "another base: SDXL"])
def test_a_lora_is_refused_with_its_reason(studio: Studio, tmp_path: Path, title: str) -> None:
    code, write = REFUSED[title]
    name = f"refused-{len(title)}"
    ask(studio, name=name, upload=upload(studio, write(tmp_path)))
    lora = settle(studio, name)
    assert (lora["status"], lora["error"]["code"], lora["url"]) == ("failed", code, None)
    assert name in [item["name"] for item in studio.http.get(LORAS).json()["data"]]
    assert studio.http.delete(f"{LORAS}/{name}").json() == {"name": name, "file": None, "object": "lora.deleted"}
    read_error(studio.http.get(f"{LORAS}/{name}"), 404, "lora_not_found")


def of_a_good_file(folder: Path) -> Path:
    return of_title("kohya").write(folder)


@pytest.mark.parametrize(
    ("write", "changes", "code"),
    [
        (of_a_good_file, {"sha256": "0" * 64}, "lora_mismatch"),
        (of_a_good_file, {"base_model": "tinyflux"}, "lora_wrong_base"),
    ],
)
def test_a_file_that_is_not_what_was_said_is_refused(studio: Studio, tmp_path: Path, write: Write, changes: Json, code: str) -> None:
    ask(studio, name="other", upload=upload(studio, write(tmp_path)), **changes)
    lora = settle(studio, "other")
    assert (lora["status"], lora["error"]["code"]) == ("failed", code)


def test_a_name_with_another_extension_is_refused(studio: Studio, tmp_path: Path) -> None:
    ask(studio, name="checkpoint", upload=upload(studio, of_a_good_file(tmp_path), "style.ckpt"))
    assert settle(studio, "checkpoint")["error"]["code"] == "lora_extension"


def test_requests_that_are_refused_at_once(studio: Studio) -> None:
    for body, status, code in (
        ({"name": "x"}, 422, "invalid_parameter"),
        ({"name": "x", "upload": "a", "url": "https://example.com/x"}, 422, "invalid_parameter"),
        ({"name": "../x", "upload": "a"}, 422, "invalid_parameter"),
        ({"name": "x", "upload": "nobodys"}, 404, "asset_not_found"),
        ({"name": "x", "url": "http://169.254.169.254/latest"}, 422, "url_refused"),
        ({"name": "x", "url": "file:///etc/passwd"}, 422, "url_refused"),
        ({"name": "x", "upload": "a", "base_model": "flux2"}, 422, "base_model_not_found"),
    ):
        read_error(studio.http.post(LORAS, json=body), status, code)
    read_error(studio.http.get(f"{LORAS}/x"), 404, "lora_not_found")


def test_the_same_key_imports_once_and_what_it_made_is_taken_back(studio: Studio, tmp_path: Path) -> None:
    body = {"name": "keyed", "upload": upload(studio, of_a_good_file(tmp_path))}
    headers = {"Idempotency-Key": "import-1"}
    first = studio.http.post(LORAS, json=body, headers=headers)
    lora = settle(studio, "keyed")
    studio.http.delete(f"/v1/uploads/{body['upload']}")
    again = studio.http.post(LORAS, json=body, headers=headers)
    assert (again.status_code, again.headers["Idempotency-Replayed"], again.json()) == (202, "true", first.json()), "its upload is gone"
    assert again.headers["Location"] == first.headers["Location"]
    read_error(studio.http.post(LORAS, json=body | {"name": "other"}, headers=headers), 422, "idempotency_key_reuse")
    assert lora["status"] == "ready"
    assert studio.http.delete(f"{LORAS}/keyed").json()["file"] == lora["file"]
    assert httpx.get(lora["url"]).status_code == 404


def test_a_request_that_is_repeated_does_not_stand_before_a_later_one(studio: Studio, tmp_path: Path) -> None:
    body = {"name": "again", "upload": upload(studio, of_a_good_file(tmp_path))}
    studio.http.post(LORAS, json=body, headers={"Idempotency-Key": "import-again"})
    assert settle(studio, "again")["status"] == "ready"
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no tensors here")
    later = ask(studio, name="again", upload=upload(studio, broken)).json()["import"]["id"]
    wait_until(lambda: studio.read(later)["status"] == "failed", "the end of the later one")
    studio.http.post(LORAS, json=body, headers={"Idempotency-Key": "import-again"})
    assert studio.http.get(f"{LORAS}/again").json()["import"]["id"] == later
    studio.http.delete(f"{LORAS}/again")


def test_one_that_is_deleted_while_it_is_published_never_appears(studio: Studio, tmp_path: Path) -> None:
    """Whichever is first: the publication finds the cancel, or the DELETE finds a LoRA."""
    file, jobs = of_a_good_file(tmp_path), list[str]()
    for turn in range(5):
        name = f"late-{turn}"
        jobs.append(ask(studio, name=name, upload=upload(studio, file)).json()["import"]["id"])
        wait_until(lambda: "publish" in str(studio.read(jobs[-1])["progress"]), "its last stage")
        assert studio.http.delete(f"{LORAS}/{name}").json()["object"] == "lora.deleted"
    wait_until(lambda: all(studio.read(job)["finished_at"] for job in jobs), "their ends")
    assert not [lora["name"] for lora in studio.http.get(LORAS).json()["data"] if lora["name"].startswith("late-")]


@pytest.mark.parametrize("kind", KINDS)
def test_the_python_clients_bring_a_lora(kind: str, studio: Studio, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no tensors here")
    with opened(kind, str(studio.http.base_url)) as client:
        client.import_lora("brought", upload=client.upload(TINY / "loras" / "tok.safetensors").id, trigger_word="TOK")
        lora = client.settle_lora("brought")
        assert (lora.status, lora.owned, lora.trigger_word, bool(lora.ready_on)) == ("ready", True, "TOK", True)
        assert client.share_lora("brought", shared=False).name == "brought"
        client.delete_lora("brought")
        client.import_lora("broken", upload=client.upload(broken).id)
        failed = client.settle_lora("broken")
        assert (failed.status, failed.error and failed.error.code) == ("failed", "lora_not_safetensors")
        client.delete_lora("broken")
