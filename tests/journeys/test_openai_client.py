"""OpenAI's own client, unmodified: base URL and key alone. Generate, stream, list, and what it raises."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from PIL import Image, ImageChops

from tests.journeys.api import Api

PROMPT = "a red circle on a blue background"
# What the client does not name, for speed: steps of the workflow.
QUICK: dict[str, Any] = {"extra_body": {"steps": 2, "seed": 5}}


@pytest.fixture(scope="module")
def client(api: Api) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{api.http.base_url}/v1", api_key="anything", max_retries=0) as client:
        yield client


def open_b64(text: str | None) -> Image.Image:
    assert text
    picture = Image.open(io.BytesIO(base64.b64decode(text)))
    picture.load()
    return picture


def test_a_picture_comes_in_the_size_asked_for_by_bytes_and_by_url(client: openai.OpenAI) -> None:
    answer = client.images.generate(model="flux", prompt=PROMPT, size="320x256", **QUICK)
    assert answer.data is not None
    [picture] = answer.data
    assert open_b64(picture.b64_json).size == (320, 256)
    assert picture.url is not None
    assert httpx.get(picture.url).content == base64.b64decode(picture.b64_json or "")
    assert (answer.size, answer.output_format, answer.background, answer.quality) == ("320x256", "png", "opaque", "medium")
    assert answer.usage is not None
    assert answer.created > 1_700_000_000


@pytest.mark.parametrize(("form", "present", "absent"), [("url", "url", "b64_json"), ("b64_json", "b64_json", "url")])
def test_a_response_format_gives_that_and_no_other(client: openai.OpenAI, form: Any, present: str, absent: str) -> None:
    answer = client.images.generate(
        prompt=PROMPT, size="256x256", n=2, response_format=form, output_format="webp", output_compression=50, **QUICK
    )
    assert answer.data is not None
    assert len(answer.data) == 2
    for picture in answer.data:
        assert getattr(picture, present)
        assert getattr(picture, absent) is None
    if form == "b64_json":
        assert open_b64(answer.data[0].b64_json).format == "WEBP"


async def test_the_async_client_gets_the_same_picture(api: Api, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"prompt": PROMPT, "size": "256x256", "output_format": "webp", **QUICK}
    async with openai.AsyncOpenAI(base_url=f"{api.http.base_url}/v1", api_key="anything", max_retries=0) as other:
        answer = await other.images.generate(**asked)
    same = client.images.generate(**asked)
    assert answer.data is not None
    assert same.data is not None
    assert answer.data[0].b64_json == same.data[0].b64_json


def test_a_stream_brings_partial_pictures_and_the_whole_one(client: openai.OpenAI) -> None:
    stream = client.images.generate(prompt=PROMPT, size="512x512", stream=True, partial_images=2, extra_body={"steps": 20, "seed": 5})
    *partials, last = list(stream)
    assert [event.type for event in partials] == ["image_generation.partial_image"] * len(partials)
    assert 1 <= len(partials) <= 2
    for number, event in enumerate(partials):
        assert event.type == "image_generation.partial_image"
        assert event.partial_image_index == number
        assert min(open_b64(event.b64_json).size) > 16
    assert last.type == "image_generation.completed"
    assert open_b64(last.b64_json).size == (512, 512)
    assert (last.size, last.output_format, last.usage.total_tokens) == ("512x512", "png", 0)


async def test_the_async_client_streams_too(api: Api) -> None:
    async with openai.AsyncOpenAI(base_url=f"{api.http.base_url}/v1", api_key="anything", max_retries=0) as client:
        stream = await client.images.generate(prompt=PROMPT, size="256x256", n=2, stream=True, **QUICK)
        events = [event async for event in stream]
    assert [event.type for event in events] == ["image_generation.completed"] * 2
    assert [open_b64(event.b64_json).size for event in events] == [(256, 256)] * 2


def paint(color: tuple[int, int, int], size: tuple[int, int] = (256, 256), clear: tuple[int, int, int, int] | None = None) -> bytes:
    """One colour; `clear` is a box that is transparent."""
    picture = Image.new("RGBA", size, (*color, 255))
    if clear is not None:
        picture.paste((0, 0, 0, 0), clear)
    target = io.BytesIO()
    picture.save(target, "PNG")
    return target.getvalue()


def test_an_edit_begins_from_the_picture(client: openai.OpenAI, api: Api) -> None:
    asked: dict[str, Any] = {"image": ("photo.png", paint((0, 0, 255), (320, 256))), "prompt": PROMPT, "n": 2}
    answer = client.images.with_raw_response.edit(**asked, extra_body={"steps": 4, "seed": 5, "strength": 0.3})
    job = api.get(answer.headers["x-generation-id"])
    assert (job["workflow"], job["parameters"]["strength"], job["parameters"]["steps"]) == ("flux-img2img", 0.3, 4)
    data = answer.parse().data
    assert data is not None
    assert [open_b64(picture.b64_json).size for picture in data] == [(320, 256)] * 2
    blue = open_b64(data[0].b64_json).convert("RGB").resize((1, 1)).getpixel((0, 0))
    assert isinstance(blue, tuple)
    assert blue[2] > 1.5 * max(blue[:2])


def test_an_edit_with_a_mask_changes_what_is_transparent_there(client: openai.OpenAI, api: Api) -> None:
    before = Image.open(io.BytesIO(paint((0, 0, 255)))).convert("RGB")
    pictures: dict[str, Any] = {"image": paint((0, 0, 255)), "mask": paint((0, 0, 0), clear=(128, 0, 256, 256))}
    *_, last = list(client.images.edit(**pictures, prompt="a red square", stream=True, extra_body={"steps": 6, "seed": 5}))
    assert last.type == "image_edit.completed"
    after = open_b64(last.b64_json).convert("RGB")
    kept, changed = (
        max(ImageChops.difference(before.crop(box), after.crop(box)).tobytes()) for box in ((0, 0, 96, 256), (160, 0, 256, 256))
    )
    assert kept < 16
    assert changed > 60
    [newest] = api.http.get("/v1/generations", params={"limit": 1}).json()["data"]
    assert newest["workflow"] == "flux-fill"


async def test_the_async_client_edits_too(api: Api) -> None:
    async with openai.AsyncOpenAI(base_url=f"{api.http.base_url}/v1", api_key="anything", max_retries=0) as client:
        answer = await client.images.edit(
            model="flux-img2img+tok:0.4",
            image=[paint((0, 255, 0))],
            prompt="TOK",
            size="512x256",
            output_format="jpeg",
            extra_body={"steps": 2},
        )
    assert answer.data is not None
    picture = open_b64(answer.data[0].b64_json)
    assert (picture.format, picture.size) == ("JPEG", (512, 256))


def test_a_model_is_a_workflow_or_a_base_model_with_loras_behind_it(client: openai.OpenAI, api: Api) -> None:
    listed = client.models.list()
    assert {"tinyflux", "flux1-dev"} <= {model.id for model in listed}
    for name, weight in (("flux+tok:0.5", 0.5), ("tinyflux+tok", 1.0)):
        answer = client.images.with_raw_response.generate(model=name, prompt="TOK", size="256x256", user="u-17", **QUICK)
        job = api.get(answer.headers["x-generation-id"])
        assert (job["workflow"], job["base_model"], job["loras"]) == ("flux", "tinyflux", [{"name": "tok", "weight": weight}])
        assert job["metadata"] == {"user": "u-17"}


def test_quality_is_steps(client: openai.OpenAI, api: Api) -> None:
    steps = []
    for quality in ("low", "auto", "high"):
        answer = client.images.with_raw_response.generate(prompt=PROMPT, size="256x256", quality=quality, extra_body={"seed": 1})
        steps.append(api.get(answer.headers["x-generation-id"])["parameters"]["steps"])
    assert steps == [10, 20, 30]


@pytest.mark.parametrize(
    ("asked", "error", "code", "param"),
    [
        ({"size": "1000x1000"}, openai.BadRequestError, "invalid_parameter", "size"),
        ({"size": "large"}, openai.BadRequestError, "invalid_parameter", "size"),
        ({"n": 9}, openai.BadRequestError, "invalid_parameter", "n"),
        ({"n": 11}, openai.BadRequestError, "invalid_parameter", "n"),
        ({"background": "transparent"}, openai.BadRequestError, "invalid_parameter", "background"),
        ({"output_compression": 3}, openai.BadRequestError, "invalid_parameter", "output_compression"),
        ({"output_format": "gif"}, openai.BadRequestError, "invalid_parameter", "output_format"),
        ({"extra_body": {"stepz": 3}}, openai.BadRequestError, "unknown_parameter", "stepz"),
        ({"prompt": ""}, openai.BadRequestError, "invalid_parameter", "prompt"),
        ({"model": "dall-e-9"}, openai.NotFoundError, "model_not_found", "model"),
        ({"model": "flux+nobody"}, openai.NotFoundError, "lora_not_found", "model"),
    ],
)
def test_what_does_not_fit_is_refused_in_openais_shape(
    client: openai.OpenAI, asked: dict[str, Any], error: type[openai.APIStatusError], code: str, param: str
) -> None:
    with pytest.raises(error) as caught:
        client.images.generate(**{"prompt": PROMPT, **asked})
    assert (caught.value.code, caught.value.param, caught.value.type) == (code, param, "invalid_request_error")
    assert set(caught.value.response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("asked", "code", "param"),
    [
        ({"image": [paint((1, 1, 1)), paint((2, 2, 2))]}, "invalid_parameter", "image"),
        ({"image": b"no picture"}, "picture_refused", "image"),
        ({"mask": paint((0, 0, 0), (64, 128))}, "picture_refused", "mask"),
        ({"model": "flux"}, "unknown_parameter", "image"),
        ({"n": 11}, "invalid_parameter", "n"),
        ({"extra_body": {"strength": 7}}, "invalid_parameter", "strength"),
        ({"mask": paint((0, 0, 0), clear=(0, 0, 9, 9)), "size": "512x512"}, "unknown_parameter", "size"),
    ],
)
def test_an_edit_that_does_not_fit_is_refused(client: openai.OpenAI, asked: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(**{"image": paint((0, 0, 255)), "prompt": PROMPT, **asked})
    assert (caught.value.code, caught.value.param) == (code, param)


def test_a_job_that_fails_is_an_error_that_the_client_does_not_try_again(client: openai.OpenAI, api: Api) -> None:
    failing: dict[str, Any] = {"model": "failing", "prompt": "x", "extra_body": {"kind": "error"}}
    with pytest.raises(openai.InternalServerError) as caught:
        client.with_options(max_retries=2).images.generate(**failing)
    assert (caught.value.code, caught.value.type) == ("node_error", "server_error")
    assert len(api.http.get("/v1/generations", params={"workflow": "failing"}).json()["data"]) == 1
    with pytest.raises(openai.APIError) as streamed:
        list(client.images.generate(stream=True, **failing))
    assert streamed.value.code == "node_error"


def test_the_same_idempotency_key_makes_one_job(client: openai.OpenAI) -> None:
    def ask(prompt: str) -> Any:
        headers = {"Idempotency-Key": "one"}
        return client.images.with_raw_response.generate(prompt=prompt, size="256x256", extra_headers=headers, extra_body={"steps": 1})

    first, again = ask(PROMPT), ask(PROMPT)
    assert first.headers["x-generation-id"] == again.headers["x-generation-id"]
    assert first.parse().data[0].b64_json == again.parse().data[0].b64_json
    with pytest.raises(openai.BadRequestError) as caught:
        ask("another")
    assert caught.value.code == "idempotency_key_reuse"


DEEP = b"[" * 9000 + b"]" * 9000
HOSTILE = [
    b"",
    b"[]",
    b"\x00",
    b'{"prompt": 3}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "x", "seed": NaN}',
    b'{"prompt": "x", "a": %s}' % DEEP,
]


@pytest.mark.parametrize(("body", "status"), [*((body, 400) for body in HOSTILE), (b'{"prompt": "%s"}' % (b"x" * (1 << 20)), 413)])
def test_a_hostile_body_is_refused_in_openais_shape(api: Api, body: bytes, status: int) -> None:
    for headers in ({}, {"Idempotency-Key": "hostile"}):
        answer = api.http.post("/v1/images/generations", content=body, headers={"Content-Type": "application/json", **headers})
        assert answer.status_code == status, answer.text
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert api.http.post("/v1/images/edits", content=body).json()["error"]["type"] == "invalid_request_error"
