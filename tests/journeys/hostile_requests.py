"""Hostile bodies, URLs, files and names, each with the answer it gets: one row a request. Texts hold places to fill in: `{upload}` is an
upload of the caller's, `{foreign}` a generation of somebody else's, `{job}` one of its own, `{dataset}` its data set, `{site}` a site that
redirects. `hostile.py` has all of them."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.dataset_files import lie_about_size, picture, png_of_size, png_with_text_bomb, zip_of, zip_with_mode

Json = dict[str, Any]
GENERATIONS, BATCHES, LORAS, DATASETS = "/v1/generations", "/v1/batches", "/v1/loras", "/v1/datasets"
TRAININGS, UPLOADS, ASSETS, JOBS = "/v1/trainings", "/v1/uploads", "/api/v2/assets", "/api/v2/jobs"
JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "multipart/form-data; boundary=x"}
LARGE, BOTH = b" " * 70_000, [*JSON.items(), *FORM.items()]
PLAIN: Json = {"workflow": "trivial"}


@dataclass(frozen=True)
class Row:
    """A request, and the status and code that refuse it. `options` are httpx's; `who` sends it: user, admin or nobody."""

    title: str
    method: str
    path: str
    status: int
    code: str
    options: Json = field(default_factory=dict)
    who: str = "user"


def to_data_url(body: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(body).decode()}"


def img2img(image: Any) -> Json:
    return {"json": {"workflow": "flux-img2img", "prompt": "x", "image": image}}


def nest(levels: int) -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = [value]
    return value


def load(file: Any) -> Json:
    """A graph that loads a file by its name."""
    save = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}}
    return {"json": {"workflow": {"1": {"class_type": "LoadImage", "inputs": {"image": file}}, "2": save}}}


def save_as(prefix: Any) -> Json:
    empty = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 1}}
    return {"json": {"workflow": {"1": empty, "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": prefix}}}}}


# -- where a URL leads -----------------------------------------------------------------------------------------
URLS = {
    "loopback": "https://127.0.0.1/x.png",
    "a decimal address": "https://2130706433/x.png",
    "a hexadecimal one": "https://0x7f.1/x.png",
    "IPv6": "https://[::1]:6379/x.png",
    "IPv4 in IPv6": "https://[::ffff:169.254.169.254]/latest/meta-data/",
    "metadata": "https://169.254.169.254/latest/meta-data/iam/",
    "a name of this machine": "https://localhost:6379/x.png",
    "a password": "https://user:secret@example.com/x.png",
    "a file": "file:///etc/passwd",
    "another protocol": "gopher://127.0.0.1:6379/_FLUSHALL",
    "an octal address": "https://0177.0.0.1/x.png",
    "a short address": "https://127.1/x.png",
    "digits that look like digits": "https://\uff11\uff12\uff17.0.0.1/x.png",
    "all addresses": "https://0.0.0.0/x.png",
    "a private address": "https://10.0.0.7/x.png",
    "metadata as a decimal": "https://2852039166/latest/meta-data/",
    "metadata in IPv6": "https://[fd00:ec2::254]/latest/meta-data/",
    "metadata by its name": "https://metadata.google.internal/computeMetadata/v1/",
    "IPv6 in full": "https://[0:0:0:0:0:0:0:1]/x.png",
    "IPv4 in IPv6, in hexadecimal": "https://[::ffff:7f00:1]/x.png",
    "IPv4 behind NAT64": "https://[64:ff9b::a9fe:a9fe]/x.png",
    "6to4": "https://[2002:7f00:1::]/x.png",
    "link-local IPv6": "https://[fe80::1%25lo]/x.png",
    # What a name server of somebody's says to these stands in tests/rebinding.py.
    "a rebound name that is private": "https://private.rebound.test/x.png",
    "a rebound name with public and private addresses": "https://both.rebound.test/x.png",
}


def read_doors(url: str) -> Iterator[tuple[str, str, Json]]:
    """Every request that takes a URL from its caller."""
    hook = {"url": url, "secret": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"}
    yield "image", GENERATIONS, img2img(url)
    yield "webhook", GENERATIONS, {"json": {**PLAIN, "webhook": hook}}
    yield "webhook of a batch", BATCHES, {"json": {**PLAIN, "items": [{}], "webhook": hook}}
    yield "LoRA", LORAS, {"json": {"name": "taken", "url": url}}


def refuse(door: str, url: str) -> str:
    """The code: what is no https URL at all is no picture's address, whatever it leads to."""
    return "invalid_parameter" if door == "image" and not url.startswith("https:") else "url_refused"


OUTSIDE = [
    Row(f"{kind} as {door}", "POST", path, 422, refuse(door, url), options)
    for kind, url in URLS.items()
    for door, path, options in read_doors(url)
]
OUTSIDE += [
    Row(f"a redirect to {place}", "POST", GENERATIONS, 422, "url_refused", img2img(f"{{site}}/{place}"))
    for place in ("metadata", "loopback", "file", "rebound", "decimal")
]
# The first answer of the name server may be gone to, and nobody is there; the second is the site, and would have answered.
OUTSIDE += [
    Row("a rebound name at its second look-up", "POST", GENERATIONS, 422, "url_failed", img2img("http://second.rebound.test:{port}/x"))
]

# -- what a file is --------------------------------------------------------------------------------------------
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/><script>alert(1)</script></svg>'
PICTURES = {
    "an SVG": SVG,
    "an SVG that says it is a PNG": b"\x89PNG\r\n\x1a\n" + SVG,
    "a page": b"<html><script>alert(1)</script></html>",
    "a zip": zip_of({"a.png": b"x"}),
    "ImageMagick's script": b"push graphic-context\nviewbox 0 0 640 480\nimage over 0,0 0,0 'https://127.0.0.1/x'\npop graphic-context",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
    "3.6 billion pixels": png_of_size(60_000, 60_000),
    "a bomb of text": png_with_text_bomb(),
    "a polyglot of GIF and script": b"GIF89a/*" + bytes(20) + b"*/=1;alert(1)//",
    "a polyglot of JPEG and page": b"\xff\xd8\xff\xe0<html><script>alert(1)</script></html>",
    "a polyglot of PDF and PNG": b"%PDF-1.7\n" + picture(7),
    "a polyglot of WebP and script": b"RIFF\x00\x00\x00\x00WEBP<script>alert(1)</script>",
    "a picture cut off": picture(1)[:2000],
    "nothing": b"",
}
FILES = [
    Row(f"{title} as picture", "POST", GENERATIONS, 422, "picture_refused", img2img(to_data_url(body))) for title, body in PICTURES.items()
]


def edit(picture: bytes, **fields: str) -> Json:
    return {"files": {"image": ("a.png", picture)}, "data": {"prompt": "x", **fields}}


EDITS = "/v1/images/edits"
FILES += [
    Row("a page as an edit's picture", "POST", EDITS, 400, "picture_refused", edit(b"<html>" * 20)),
    Row("an edit's picture for no model", "POST", EDITS, 404, "model_not_found", edit(picture(5), model="../../x")),
    Row("an edit's picture of no size", "POST", EDITS, 400, "invalid_parameter", edit(picture(6), size="1x1x1")),
]


def send_archive(body: bytes) -> Json:
    return {"files": [("files", ("a.zip", body, "application/zip"))], "data": {"trigger_word": "TOK"}}


BOMB = zip_of({f"{number}.txt": bytes(40 << 20) for number in range(3)}, compresslevel=9)
FILES += [
    Row("a zip bomb", "POST", DATASETS, 422, "archive_bomb", send_archive(BOMB)),
    Row(
        "a zip that lies about its size",
        "POST",
        DATASETS,
        422,
        "archive_broken",
        send_archive(lie_about_size(zip_of({"a.txt": b"x" * 99}), 1)),
    ),
    Row("a zip that leads out", "POST", DATASETS, 422, "archive_path", send_archive(zip_of({"../../etc/cron.d/x": b"x"}))),
    Row("a zip with an absolute path", "POST", DATASETS, 422, "archive_path", send_archive(zip_of({"/etc/passwd": b"x"}))),
    Row("a pixel bomb as an edit's picture", "POST", EDITS, 400, "picture_refused", edit(png_of_size(60_000, 60_000))),
    Row("a zip with a link", "POST", DATASETS, 422, "archive_link", send_archive(zip_with_mode("a.png", b"/etc/passwd", 0o120777))),
]

# -- names that are paths --------------------------------------------------------------------------------------
UP = "../../etc/passwd"
NAMES = [
    Row("a workflow", "POST", GENERATIONS, 404, "workflow_not_found", {"json": {"workflow": UP, "prompt": "x"}}),
    Row("a workflow's page", "GET", "/v1/workflows/..%2f..%2fetc%2fpasswd", 404, "not_found"),
    Row("a base model", "POST", GENERATIONS, 422, "base_model_not_found", {"json": {"workflow": "flux", "prompt": "x", "base_model": UP}}),
    Row("a LoRA", "POST", GENERATIONS, 404, "lora_not_found", {"json": {"workflow": "flux", "prompt": "x", "loras": [{"name": UP}]}}),
    Row("a LoRA's page", "GET", "/v1/loras/..%2f..%2fetc%2fpasswd", 404, "lora_not_found"),
    Row("a LoRA to be", "POST", LORAS, 422, "invalid_parameter", {"json": {"name": UP, "url": "https://example.com/x"}}),
    Row("a LoRA's upload", "POST", LORAS, 404, "asset_not_found", {"json": {"name": "x", "upload": UP}}),
    Row("a picture", "POST", GENERATIONS, 422, "invalid_parameter", img2img(UP)),
    Row("a picture in ComfyUI's folder", "POST", GENERATIONS, 422, "invalid_parameter", img2img("x.png [output]")),
    Row("a training", "POST", TRAININGS, 422, "invalid_parameter", {"json": {"name": UP, "dataset": "{dataset}", "base": "tinyflux"}}),
    Row("a training's data set", "POST", TRAININGS, 404, "dataset_not_found", {"json": {"name": "x", "dataset": UP, "base": "tinyflux"}}),
    Row("a training's base", "POST", TRAININGS, 422, "base_model_not_found", {"json": {"name": "x", "dataset": "{dataset}", "base": UP}}),
    Row("a data set's file", "DELETE", "/v1/datasets/{dataset}/files/..%2f..%2fa.png", 404, "dataset_file_not_found"),
    Row("an upload's page", "GET", "/v1/uploads/..%2f..%2fx", 404, "not_found"),
    Row("an asset's content", "GET", "/api/v2/assets/..%2fx/content", 404, "not_found"),
    Row("the gateway's own files", "GET", "/../../etc/passwd", 404, "not_found", who="nobody"),
    Row("a route behind another", "GET", "/v1/health/../../metrics", 401, "unauthorized", who="nobody"),
    Row("two slashes", "GET", "//v1/keys", 404, "not_found", who="admin"),
    Row("a model of OpenAI's", "POST", "/v1/images/generations", 404, "model_not_found", {"json": {"prompt": "x", "model": UP}}),
    Row("an output of another", "POST", JOBS, 422, "missing_asset", load({"__type": "core/ASSET", "info": {"id": "{job}.0"}}), "admin"),
]
NAMES += [
    Row(f"LoadImage of {path!r}", "POST", JOBS, 422, "invalid_workflow", load(path), "admin")
    for path in (UP, "/etc/passwd", "..\\..\\x", "C:\\x.png", "x.png [output]", "https://127.0.0.1/x.png", "x\0.png", {"__value__": UP})
]
NAMES += [
    Row(f"SaveImage to {path!r}", "POST", JOBS, 422, "invalid_workflow", save_as(path), "admin")
    for path in (UP, "/tmp/x", "a/../../b", ["1", 0])
]


# -- JSON ------------------------------------------------------------------------------------------------------
def body(content: bytes, **headers: str) -> Json:
    return {"content": content, "headers": {**JSON, **{name.replace("_", "-"): value for name, value in headers.items()}}}


DEEP, NUMBER = b"[" * 60_000, b"1" * 5000
BODIES = [
    Row("60,000 lists in one another", "POST", GENERATIONS, 400, "invalid_json", body(DEEP)),
    Row("the same at a door of others", "POST", JOBS, 400, "invalid_json", body(DEEP), "admin"),
    Row("the same in a field", "POST", GENERATIONS, 422, "invalid_parameter", {"json": {**PLAIN, "metadata": {"a": nest(100)}}}),
    Row("the same in a graph", "POST", JOBS, 422, "invalid_parameter", load(nest(100)), "admin"),
    Row("a number of 5,000 digits", "POST", GENERATIONS, 400, "invalid_json", body(b'{"workflow":"trivial","color":' + NUMBER + b"}")),
    Row("NaN as parameter", "POST", GENERATIONS, 422, "invalid_parameter", body(b'{"workflow":"trivial","color":NaN}')),
    Row(
        "infinity as parameter",
        "POST",
        GENERATIONS,
        422,
        "invalid_parameter",
        body(b'{"workflow":"flux","prompt":"x","guidance_scale":1e999}'),
    ),
    Row("NaN in metadata", "POST", GENERATIONS, 422, "invalid_parameter", body(b'{"workflow":"trivial","metadata":{"a":NaN}}')),
    Row("infinity as time limit", "POST", GENERATIONS, 422, "invalid_parameter", body(b'{"workflow":"trivial","timeout_s":Infinity}')),
    Row(
        "NaN in a graph",
        "POST",
        JOBS,
        422,
        "invalid_workflow",
        {"content": json.dumps(save_as(float("nan"))["json"]), "headers": JSON},
        "admin",
    ),
    Row(
        "half an emoji in metadata", "POST", GENERATIONS, 422, "invalid_parameter", body(b'{"workflow":"trivial","metadata":{"\\ud83d":1}}')
    ),
    Row("half an emoji as workflow", "POST", GENERATIONS, 404, "workflow_not_found", body(b'{"workflow":"\\ud83d"}')),
    Row("NUL in a prompt", "POST", GENERATIONS, 422, "invalid_parameter", body(b'{"workflow":"flux","prompt":"a\\u0000b"}')),
    Row("a prototype", "POST", GENERATIONS, 422, "unknown_parameter", body(b'{"workflow":"trivial","__proto__":{"admin":true}}')),
    Row("another's caller id", "POST", GENERATIONS, 422, "unknown_parameter", {"json": {**PLAIN, "caller": "admin"}}),
    Row("a scope that nobody gave", "POST", "/v1/keys", 403, "scope_missing", {"json": {"scopes": ["admin"]}}),
    Row("too large", "POST", TRAININGS, 413, "payload_too_large", body(b" " * 70_000)),
    Row(
        "too large, without a length", "POST", TRAININGS, 413, "payload_too_large", {"content": iter([b" " * 40_000] * 2), "headers": JSON}
    ),
    Row(
        "JSON that says it is files",
        "POST",
        "/v1/datasets/x/captions",
        413,
        "payload_too_large",
        {"content": b" " * 70_000, "headers": FORM},
    ),
    Row(
        "files that say they are JSON",
        "POST",
        UPLOADS,
        413,
        "payload_too_large",
        {"content": LARGE, "headers": BOTH},
    ),
    Row("gzip", "POST", GENERATIONS, 400, "invalid_json", body(b"\x1f\x8b\x08\x00junk", Content_Encoding="gzip")),
    Row("a form for JSON", "POST", GENERATIONS, 415, "unsupported_media_type", {"data": {"workflow": "trivial"}}),
    Row(
        "text that a page may send",
        "POST",
        GENERATIONS,
        415,
        "unsupported_media_type",
        {"content": b"{}", "headers": {"Content-Type": "text/plain"}},
    ),
    Row(
        "a form that never ends",
        "POST",
        UPLOADS,
        400,
        "invalid_multipart",
        {"content": b"--x\r\n", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
    ),
    Row("a list for an object", "POST", JOBS, 422, "invalid_workflow", {"json": {"workflow": []}}, "admin"),
]

TEMPLATE = "{{ 7*7 }}${jndi:ldap://127.0.0.1/x}"
BODIES += [
    Row("a template as workflow", "POST", GENERATIONS, 404, "workflow_not_found", {"json": {"workflow": TEMPLATE}}),
    Row("a template as number", "POST", GENERATIONS, 422, "invalid_parameter", {"json": {**PLAIN, "color": TEMPLATE}}),
    Row("a template as parameter", "POST", GENERATIONS, 422, "unknown_parameter", {"json": {**PLAIN, TEMPLATE: 1}}),
    Row("a template as LoRA", "POST", GENERATIONS, 404, "lora_not_found", {"json": {"prompt": "x", "loras": [{"name": TEMPLATE}]}}),
    Row("a template as a LoRA to be", "POST", LORAS, 422, "invalid_parameter", {"json": {"name": TEMPLATE, "upload": "{upload}"}}),
    Row(
        "a template as node class", "POST", JOBS, 422, "invalid_workflow", {"json": {"workflow": {"1": {"class_type": TEMPLATE}}}}, "admin"
    ),
]
