"""Pictures out of the server and into it."""

import io
import uuid

import pytest
from PIL import Image

from tests.contract.forms import encode_png, upload
from tests.contract.wire import Wire, empty_to_save, of_kind


@pytest.fixture
async def item(wire: Wire, prefix: str) -> dict[str, str]:
    """The output item of a red picture of 64 x 48."""
    prompt_id, _ = await wire.run(empty_to_save(prefix, color=0xFF0000, height=48))
    found: dict[str, str] = (await wire.history_of(prompt_id))["outputs"]["9"]["images"][0]
    return found


@pytest.fixture
def name() -> str:
    return f"{uuid.uuid4().hex}.png"


def decode(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as picture:
        picture.load()
    return picture


async def test_view_returns_the_file_and_its_type(wire: Wire, item: dict[str, str]) -> None:
    answer = await wire.get("/view", **item)
    picture = decode(answer.raw)
    assert (answer.status, answer.content_type) == (200, "image/png")
    assert (picture.size, picture.getpixel((0, 0))) == ((64, 48), (255, 0, 0))


async def test_view_names_the_file_and_serves_ranges(wire: Wire, item: dict[str, str]) -> None:
    async with wire.http.get(wire.base_url + "/view", params=item, headers={"Range": "bytes=0-9"}) as response:
        assert response.status == 206
        assert response.headers["Content-Disposition"] == f'filename="{item["filename"]}"'
        assert (await response.read()).startswith(b"\x89PNG")
        assert response.content_length == 10


@pytest.mark.parametrize(
    ("preview", "expected"), [("webp", "WEBP"), ("jpeg;50", "JPEG"), ("bogus", "WEBP"), ("webp;abc", "WEBP"), ("jpeg", "JPEG")]
)
async def test_view_renders_previews(wire: Wire, item: dict[str, str], preview: str, expected: str) -> None:
    answer = await wire.get("/view", **item, preview=preview)
    picture = decode(answer.raw)
    assert (picture.format, picture.size, answer.content_type) == (expected, (64, 48), f"image/{expected.lower()}")


async def test_view_separates_channels(wire: Wire, name: str) -> None:
    await upload(wire, name, encode_png((10, 20, 30, 40), mode="RGBA"))
    colours = decode((await wire.get("/view", filename=name, type="input", channel="rgb")).raw)
    alpha = decode((await wire.get("/view", filename=name, type="input", channel="a")).raw)
    plain = decode((await wire.get("/view", filename=name, type="input", channel="bogus")).raw)
    assert (colours.mode, colours.getpixel((0, 0))) == ("RGB", (10, 20, 30))
    assert (alpha.mode, alpha.getpixel((0, 0))) == ("RGBA", (0, 0, 0, 40))
    assert plain.getpixel((0, 0)) == (10, 20, 30, 40)


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        pytest.param({"subfolder": None}, 404, id="no subfolder"),
        pytest.param({"filename": "absent.png"}, 404, id="absent"),
        pytest.param({"filename": None}, 404, id="no filename"),
        pytest.param({"filename": ""}, 400, id="empty filename"),
        pytest.param({"filename": "../x.png"}, 400, id="parent in filename"),
        pytest.param({"filename": "/etc/passwd"}, 400, id="absolute filename"),
        pytest.param({"subfolder": "../.."}, 403, id="parent subfolder"),
        pytest.param({"subfolder": "/etc"}, 403, id="absolute subfolder"),
        pytest.param({"subfolder": "../output_other"}, 403, id="sibling with the same beginning"),
        pytest.param({"type": "bogus"}, 400, id="unknown type"),
        pytest.param({"type": "input"}, 404, id="other type"),
    ],
)
async def test_view_refuses_what_is_not_an_output(wire: Wire, item: dict[str, str], changes: dict[str, str | None], status: int) -> None:
    query = {key: value for key, value in {**item, **changes}.items() if value is not None}
    assert (await wire.get("/view", **query)).status == status


async def test_view_hands_out_any_file_and_cannot_preview_it(wire: Wire) -> None:
    name = f"{uuid.uuid4().hex}.txt"
    await upload(wire, name, b"hello")
    answer = await wire.get("/view", filename=name, type="input")
    assert (answer.status, answer.content_type, answer.raw) == (200, "text/plain", b"hello")
    assert (await wire.get("/view", filename=f"{name} [input]")).raw == b"hello"
    assert (await wire.get("/view", filename=name, type="input", preview="webp")).status == 500


async def test_an_upload_keeps_other_files_of_its_name(wire: Wire, name: str) -> None:
    red, green, blue = encode_png((255, 0, 0)), encode_png((0, 255, 0)), encode_png((0, 0, 255))
    numbered = name.replace(".png", " (1).png")
    assert (await upload(wire, name, red)).body == {"name": name, "subfolder": "", "type": "input"}
    assert (await upload(wire, name, red)).body["name"] == name
    assert (await upload(wire, name, green)).body["name"] == numbered
    assert (await upload(wire, name, blue, overwrite="True")).body["name"] == name.replace(".png", " (2).png")
    assert (await upload(wire, name, blue, overwrite="true")).body["name"] == name
    assert (await wire.get("/view", filename=name, type="input")).raw == blue
    assert (await wire.get("/view", filename=numbered, type="input")).raw == green


@pytest.mark.parametrize("kind", ["input", "output", "temp"])
async def test_an_upload_may_go_to_any_folder_and_subfolder(wire: Wire, name: str, kind: str) -> None:
    data = encode_png((1, 2, 3))
    answer = await upload(wire, name, data, type=kind, subfolder="jobs/j1")
    assert answer.body == {"name": name, "subfolder": "jobs/j1", "type": kind}
    assert (await wire.get("/view", filename=name, type=kind, subfolder="jobs/j1")).raw == data


async def test_uploads_that_are_refused(wire: Wire, name: str) -> None:
    data = encode_png((1, 2, 3))
    assert (await upload(wire, name, data, subfolder="../..")).status == 400
    assert (await upload(wire, f"../{name}", data)).status == 400
    assert (await upload(wire, f"absent-{name}/x.png", data)).status == 500
    assert (await upload(wire, name, data, type="bogus")).status == 500
    assert (await upload(wire, "", data)).status == 500
    assert (await wire.get("/view", filename=name, type="input")).status == 404


async def test_an_uploaded_mask_becomes_transparency(wire: Wire, name: str) -> None:
    await upload(wire, name, encode_png((200, 100, 50)))
    reference = f'{{"filename": "{name}", "type": "input", "subfolder": ""}}'
    mask = encode_png((0, 0, 0, 99), mode="RGBA")
    answer = await upload(wire, f"masked-{name}", mask, path="/upload/mask", original_ref=reference)
    merged = decode((await wire.get("/view", filename=answer.body["name"], type="input")).raw)
    assert merged.getpixel((0, 0)) == (200, 100, 50, 99)


async def test_an_uploaded_picture_is_a_choice_and_can_be_loaded(wire: Wire, name: str, prefix: str) -> None:
    await upload(wire, name, encode_png((9, 8, 7), size=(40, 24)))
    choices = (await wire.get("/object_info/LoadImage")).body["LoadImage"]["input"]["required"]["image"][0]
    graph = empty_to_save(prefix)
    graph["1"] = {"class_type": "LoadImage", "inputs": {"image": name}}
    prompt_id, _ = await wire.run(graph)
    saved = (await wire.history_of(prompt_id))["outputs"]["9"]["images"][0]
    picture = decode((await wire.get("/view", **saved)).raw)
    assert name in choices
    assert (picture.size, picture.getpixel((0, 0))) == ((40, 24), (9, 8, 7))


async def test_load_image_reads_the_folder_that_the_name_says(wire: Wire, name: str, prefix: str) -> None:
    await upload(wire, name, encode_png((5, 6, 7)), type="output")
    graph = empty_to_save(prefix)
    graph["1"] = {"class_type": "LoadImage", "inputs": {"image": f"{name} [output]"}}
    _, messages = await wire.run(graph)
    assert of_kind(messages, "execution_success")


async def test_a_file_that_is_no_picture_fails_at_run_time(wire: Wire, prefix: str) -> None:
    name = f"{uuid.uuid4().hex}.txt"
    await upload(wire, name, b"hello")
    graph = empty_to_save(prefix)
    graph["1"] = {"class_type": "LoadImage", "inputs": {"image": name}}
    _, messages = await wire.run(graph)
    assert of_kind(messages, "execution_error")[0]["node_type"] == "LoadImage"


@pytest.mark.parametrize(
    ("inputs", "size"),
    [
        ({"class_type": "ImageScale", "width": 30, "height": 20, "crop": "disabled", "upscale_method": "bilinear"}, (30, 20)),
        ({"class_type": "ImageScale", "width": 32, "height": 0, "crop": "disabled", "upscale_method": "lanczos"}, (32, 24)),
        ({"class_type": "ImageScale", "width": 20, "height": 20, "crop": "center", "upscale_method": "area"}, (20, 20)),
        ({"class_type": "ImageScaleBy", "scale_by": 1.5, "upscale_method": "nearest-exact"}, (96, 72)),
        ({"class_type": "ImageInvert"}, (64, 48)),
    ],
)
async def test_pictures_are_scaled_and_inverted(wire: Wire, prefix: str, inputs: dict[str, object], size: tuple[int, int]) -> None:
    graph = empty_to_save(prefix, color=0xFF0000, height=48)
    class_type = inputs["class_type"]
    graph["2"] = {"class_type": class_type, "inputs": {"image": ["1", 0], **{k: v for k, v in inputs.items() if k != "class_type"}}}
    graph["9"]["inputs"]["images"] = ["2", 0]
    prompt_id, _ = await wire.run(graph)
    picture = decode((await wire.get("/view", **(await wire.history_of(prompt_id))["outputs"]["9"]["images"][0])).raw)
    assert (picture.size, picture.getpixel((5, 5))) == (size, (0, 255, 255) if class_type == "ImageInvert" else (255, 0, 0))
