"""Pictures in: img2img and fill with an upload, a URL and a data URL; what ComfyUI gets, what is left there, and who may use what."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image, ImageChops, ImageDraw

from tests.conftest import OpenGateway
from tests.dataset_api import read_error
from tests.deployment import WORKFLOWS_DIR
from tests.journeys.api import Api, Job, fetch, open_picture, wait_until
from tests.web_site import Site, running_site

STAR = Path(__file__).parents[1] / "data" / "tinyflux" / "red_circle.png"
QUICK: dict[str, Any] = {"prompt": "a green star on a yellow background", "steps": 6, "seed": 5}
# Below the limit of 64 kB that other bodies have here.
MAX_PICTURE_BODY_BYTES = 400_000
# Two of them fit into what one request may have fetched, three do not.
HEAVY_BYTES = 50 << 20
ALBUM = ("first", "second", "third", "fourth", "fifth")


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    def answer(path: str) -> bytes:
        body = STAR.read_bytes() if path.startswith(("/star.png", "/heavy.png")) else b"<html>no</html>"
        return body + bytes(HEAVY_BYTES if path.startswith("/heavy.png") else 0)

    with running_site(answer) as site:
        yield site


def write_album(folder: Path) -> None:
    """A workflow that takes five pictures and gives them back."""
    nodes: dict[str, Any] = {}
    for number, name in enumerate(ALBUM):
        nodes[str(number)] = {"class_type": "LoadImage", "inputs": {"image": "x.png"}, "_meta": {"title": name}}
        save = {"filename_prefix": "x", "images": [str(number), 0]}
        nodes[str(number + 10)] = {"class_type": "SaveImage", "inputs": save, "_meta": {"title": f"save {name}"}}
    bindings = 'title = "Album"\ndescription = "Five pictures."\noutputs = ["save first"]\n'
    bindings += "".join(f'[parameters.{name}]\ntype = "image"\nhelp = "A picture."\n' for name in ALBUM)
    bindings += "[bindings]\n" + "".join(
        f'"{name}.image" = "{{{{ {name} }}}}"\n"save {name}.filename_prefix" = "{{{{ job_id }}}}/{name}"\n' for name in ALBUM
    )
    folder.mkdir()
    (folder / "graph.json").write_text(json.dumps(nodes))
    (folder / "bindings.toml").write_text(bindings)
    (folder / "example.json").write_text(json.dumps(dict.fromkeys(ALBUM, "https://example.com/a.png")))


@pytest.fixture(scope="module")
def api(open_gateway: OpenGateway, site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    workflows = tmp_path_factory.mktemp("workflows")
    shutil.copytree(WORKFLOWS_DIR, workflows, dirs_exist_ok=True)
    write_album(workflows / "album")
    changes = {
        "WORKFLOWS_DIR": str(workflows),
        "ALLOW_PRIVATE_URLS": site.url.removeprefix("http://"),
        "CACHE_TTL_S": "3600",
        "MAX_BODY_BYTES": "65536",
        "MAX_PICTURE_BODY_BYTES": str(MAX_PICTURE_BODY_BYTES),
    }
    with open_gateway(**changes) as gateway, Api(gateway.url) as caller:
        yield caller


def upload(api: Api, body: bytes) -> str:
    answer = api.http.post("/v1/uploads", files={"file": ("a.png", body)})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def to_data_url(body: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(body).decode()}"


def to_png(image: Image.Image) -> bytes:
    target = io.BytesIO()
    image.save(target, "PNG")
    return target.getvalue()


def star() -> Image.Image:
    return open_picture(STAR.read_bytes())


def middle_mask() -> Image.Image:
    width, height = star().size
    mask = Image.new("L", (width, height), 0)
    ImageDraw.Draw(mask).ellipse((width // 4, height // 4, 3 * width // 4, 3 * height // 4), fill=255)
    return mask


def distance(one: Image.Image, other: Image.Image) -> float:
    """Mean difference of two pictures, 0 to 255."""
    return float(np.abs(np.asarray(one, float) - np.asarray(other, float)).mean())


def result(job: Job) -> Image.Image:
    return open_picture(fetch(job["outputs"][0]))


def files_of(api: Api, job: Job) -> dict[str, str]:
    """Title -> file of every picture the graph loads."""
    graph = api.graph(job["id"])
    return {node["_meta"]["title"]: node["inputs"]["image"] for node in graph.values() if node["class_type"].startswith("LoadImage")}


def left_on(engine: str, file: str) -> bytes | None:
    folder, _, name = file.rpartition("/")
    answer = httpx.get(f"{engine}/view", params={"filename": name, "subfolder": folder, "type": "input"})
    return answer.content if answer.status_code == 200 else None


# -- what comes of it ----------------------------------------------------------------------------------------------


def test_the_more_strength_the_less_is_left_of_the_picture(api: Api) -> None:
    picture = upload(api, STAR.read_bytes())
    made = [result(api.run(workflow="flux-img2img", image=picture, strength=strength, **QUICK)) for strength in (0.1, 0.5, 1.0)]
    assert {image.size for image in made} == {star().size}
    near, half, far = (distance(image, star()) for image in made)
    assert near < half < far
    assert near < 12


def test_another_size_cuts_what_is_too_much_and_a_batch_differs(api: Api) -> None:
    picture = upload(api, STAR.read_bytes())
    job = api.run(workflow="flux-img2img", image=picture, width=256, height=128, num_images=2, strength=0.9, **QUICK)
    one, two = (open_picture(fetch(output)) for output in job["outputs"])
    assert one.size == two.size == (256, 128)
    assert distance(one, two) > 1


def test_a_fill_changes_nothing_outside_of_its_mask(api: Api) -> None:
    picture, mask = upload(api, STAR.read_bytes()), middle_mask()
    job = api.run(workflow="flux-fill", image=picture, mask=upload(api, to_png(mask)), **QUICK)
    changed = ImageChops.difference(result(job), star()).convert("L")
    assert ImageChops.multiply(changed, ImageChops.invert(mask)).getbbox() is None
    assert np.asarray(changed)[np.asarray(mask) > 0].mean() > 20
    assert [given["parameter"] for given in job["inputs"]] == ["image", "mask"]
    assert httpx.get(job["inputs"][0]["url"]).status_code == 200


def test_without_a_mask_the_transparent_part_is_filled(api: Api) -> None:
    clear = star().convert("RGBA")
    clear.putalpha(ImageChops.invert(middle_mask()))
    by_alpha = api.run(workflow="flux-fill", image=to_data_url(to_png(clear)), **QUICK)
    again = api.run(workflow="flux-fill", **{**by_alpha["parameters"], "base_model": by_alpha["base_model"]}, cache="off")
    assert distance(result(by_alpha), result(again)) == 0
    error = read_error(
        api.http.post("/v1/generations", json={"workflow": "flux-fill", "image": upload(api, STAR.read_bytes()), **QUICK}),
        422,
        "picture_refused",
    )
    assert error["details"] == {"parameter": "mask", "reason": "no_transparency"}


def test_an_upload_a_url_and_a_data_url_are_the_same_picture(api: Api, site: Site) -> None:
    given = {"upload": upload(api, STAR.read_bytes()), "url": f"{site.url}/star.png?key=secret", "data": to_data_url(STAR.read_bytes())}
    answers = [
        api.http.post("/v1/generations?", json={"workflow": "flux-img2img", "image": image, **QUICK}, headers={"Prefer": "wait=30"})
        for image in given.values()
    ]
    jobs = [answer.json() for answer in answers]
    assert [answer.status_code for answer in answers] == [200] * 3, [answer.text for answer in answers]
    assert [job["cached"] for job in jobs] == [False, True, True]
    assert len({job["inputs"][0]["sha256"] for job in jobs}) == 1
    assert "secret" not in answers[1].text
    assert jobs[0]["parameters"]["image"] == given["upload"]
    # What stands in the record makes the same picture again, whatever the request said.
    assert api.run(workflow="flux-img2img", **{**QUICK, "image": jobs[2]["parameters"]["image"]}, cache="off")["cached"] is False


# -- what ComfyUI gets, and keeps ------------------------------------------------------------------------------------


def test_comfyui_sees_names_of_ours_and_keeps_no_picture(api: Api, engine: str) -> None:
    body = to_png(star()) + b"<?php secret ?>"
    jobs = [api.run(workflow="flux-img2img", image=to_data_url(body), cache="off", **QUICK) for _ in range(2)]
    names = [files_of(api, job)["Picture"] for job in jobs]
    assert len(set(names)) == 2
    for job, name in zip(jobs, names, strict=True):
        folder, _, file = name.partition("/")
        assert (folder, len(file), file[-4:]) == ("fluxgate", 36, ".png")
        assert job["inputs"][0]["sha256"] not in name
        wait_until(lambda name=name: not left_on(engine, name), f"{name} being taken away")  # type: ignore[misc]
    stored = httpx.get(jobs[0]["inputs"][0]["url"]).content
    assert b"secret" not in stored
    assert hashlib.sha256(stored).hexdigest() == jobs[0]["inputs"][0]["sha256"]


def test_a_job_that_fails_leaves_no_picture_either(api: Api, engine: str) -> None:
    made = api.create(workflow="flux-img2img", image=to_data_url(STAR.read_bytes()), sampler="dpm_fast", **QUICK)
    job = api.wait(made["id"])
    assert job["status"] == "failed"
    wait_until(lambda: not left_on(engine, files_of(api, job)["Picture"]), "the picture being taken away")


# -- what is refused -------------------------------------------------------------------------------------------------


def ask(api: Api, **body: Any) -> httpx.Response:
    return api.http.post("/v1/generations", json={"workflow": "flux-img2img", **QUICK, **body})


def test_pictures_that_are_refused(api: Api, site: Site) -> None:
    for image, reason in (
        (to_data_url(b"<svg/>"), "not_a_picture"),
        ("data:image/png;base64,!!!", "data_url_broken"),
        (to_data_url(STAR.read_bytes()[:500]), "picture_broken"),
        (f"{site.url}/page.html", "not_a_picture"),
        (upload(api, b"PK\x03\x04 a zip"), "not_a_picture"),
    ):
        assert read_error(ask(api, image=image), 422, "picture_refused")["details"] == {"parameter": "image", "reason": reason}
    mask = upload(api, to_png(middle_mask().resize((200, 100))))
    error = read_error(ask(api, workflow="flux-fill", image=upload(api, STAR.read_bytes()), mask=mask), 422, "picture_refused")
    assert error["details"] == {"parameter": "mask", "reason": "mask_of_another_size"}


def test_a_request_is_no_way_to_have_many_things_fetched(api: Api, site: Site) -> None:
    site.asked.clear()
    same = api.http.post("/v1/generations", json={"workflow": "album", **dict.fromkeys(ALBUM, f"{site.url}/star.png?same")})
    assert (same.status_code, site.asked) == (202, ["/star.png?same"]), same.text
    site.asked.clear()
    urls = {name: f"{site.url}/star.png?{name}" for name in ALBUM}
    error = read_error(api.http.post("/v1/generations", json={"workflow": "album", **urls}), 422, "picture_refused")
    assert error["details"] == {"parameter": "fifth", "reason": "too_many_urls"}
    assert len(site.asked) == 4
    heavy = {name: f"{site.url}/heavy.png?{name}" for name in ALBUM}
    error = read_error(api.http.post("/v1/generations", json={"workflow": "album", **heavy}), 422, "url_failed")
    assert (error["details"]["parameter"], "larger than" in error["message"]) == ("third", True)


def test_in_a_batch_pictures_are_uploads_alone(api: Api, site: Site) -> None:
    """A thousand items would be a thousand downloads."""
    site.asked.clear()
    for image in (f"{site.url}/star.png", to_data_url(STAR.read_bytes())):
        body = {"workflow": "flux-img2img", "parameters": QUICK, "items": [{"image": image}]}
        error = read_error(api.http.post("/v1/batches", json=body), 422, "upload_needed")
        assert (error["details"]["parameter"], error["details"]["allowed"]) == ("image", "an upload id")
    assert site.asked == []
    body = {"workflow": "flux-img2img", "parameters": QUICK, "items": [{"image": upload(api, STAR.read_bytes())}]}
    assert api.http.post("/v1/batches", json=body).status_code == 202


def test_places_that_are_not_gone_to(api: Api) -> None:
    for url in ("http://169.254.169.254/latest/meta-data", "https://localhost/x.png", "https://127.1/x.png", "http://[::1]:6379/x.png"):
        assert read_error(ask(api, image=url), 422, "url_refused")["details"]["parameter"] == "image"
    for value in ("../../etc/passwd", "file:///etc/passwd", "/etc/passwd", "fluxgate/x.png"):
        assert read_error(ask(api, image=value), 422, "invalid_parameter")["details"]["parameter"] == "image"


def test_an_upload_that_is_not_there_and_one_that_was_not_sent(api: Api) -> None:
    error = read_error(ask(api, image="nobodys"), 404, "asset_not_found")
    assert error["details"] == {"parameter": "image", "value": "nobodys"}
    body = STAR.read_bytes()
    wanted = {"content_type": "image/png", "size_bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}
    promise = api.http.post("/v1/uploads", json=wanted).json()
    read_error(ask(api, image=promise["id"]), 422, "upload_not_sent")
    assert httpx.put(promise["url"], content=body, headers=promise["headers"]).status_code == 200
    assert api.wait(ask(api, image=promise["id"]).json()["id"])["status"] == "succeeded"
    assert api.http.get(f"/v1/uploads/{promise['id']}").json()["status"] == "ready"
    gone = api.http.delete(f"/v1/uploads/{promise['id']}")
    assert gone.status_code == 200
    read_error(ask(api, image=promise["id"]), 404, "asset_not_found")


def test_only_generations_may_be_as_large_as_a_picture(api: Api) -> None:
    large = to_data_url(bytes(MAX_PICTURE_BODY_BYTES // 2))
    assert ask(api, image=large).status_code == 422
    typed = api.http.post("/v1/workflows/flux-img2img/generations", json={"prompt": "x", "image": large})
    assert typed.status_code == 422
    assert ask(api, image=large + large).status_code == 413
    assert api.http.post("/v1/trainings", json={"name": large}).status_code == 413
