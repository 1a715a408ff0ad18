"""The pictures of a request on their way to ComfyUI: fetched or decoded, checked, made anew, kept, and given names of ours.

A picture is made once for each caller and way; no string of a caller's becomes a path or a file's name.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

from comfy_workflows.parameters import Parameter
from gateway.datasets.intake import MAX_PICTURE_BYTES, Refused
from gateway.errors import NotFound, Unprocessable
from gateway.inputs.asset_records import Asset
from gateway.inputs.assets import AssetStore, absent
from gateway.inputs.pictures import Made, Recipe, make
from gateway.jobs.model import JobInput, JobSpec, new_input_file
from gateway.outside.urls import Outside

# A picture of 64 megapixels takes half a gigabyte while it is converted.
AT_ONCE = 2
FETCH_S = 30.0
# What one request may have fetched, and how many such requests of one caller are served at once by a process; others wait.
MAX_FETCHES = 4
MAX_FETCHED_BYTES = 2 * MAX_PICTURE_BYTES
FETCHING_PER_CALLER = 2
PICTURE_TYPES = ("image/png", "image/jpeg", "image/webp", "application/octet-stream", "binary/octet-stream")


@dataclass(frozen=True, slots=True)
class Brought:
    """What became of a request's pictures: the files its graph names, and what its record shows, by parameter."""

    inputs: tuple[JobInput, ...] = ()
    files: dict[str, str] = field(default_factory=dict)
    shown: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Source:
    """Bytes of a stranger's, known by their sha256 before they are read. `upload`: the id the request names."""

    sha256: str
    read: Callable[[], Awaitable[bytes]]
    upload: str | None = None


@dataclass(slots=True)
class _Fetches:
    """Of one request: the URLs that it named so far, each fetched once, and the bytes that it may still have."""

    bytes_left: int = MAX_FETCHED_BYTES
    known: dict[str, Source] = field(default_factory=dict)


NOTHING = Brought()


def refuse(parameter: str, refused: Refused) -> Unprocessable:
    """Why a picture is not taken, as an answer."""
    problem = refused.problem
    details = {"parameter": parameter, "reason": problem.code}
    return Unprocessable(f"{parameter}: {problem.message}", code="picture_refused", hint=problem.remedy, details=details)


class Inputs:
    """Raises Unprocessable, NotFound, RedisUnavailable and StorageUnavailable."""

    def __init__(self, assets: AssetStore, outside: Outside, *, keep_s: int) -> None:
        """`keep_s`: how long the pictures of a job are kept."""
        self._assets, self._outside, self._keep_ms = assets, outside, keep_s * 1000
        self._turn = asyncio.Semaphore(AT_ONCE)
        self._fetching = WeakValueDictionary[str, asyncio.Semaphore]()

    async def bring(self, caller: str, images: Sequence[Parameter], values: Mapping[str, Any]) -> Brought:
        """Make ready what a request names for these parameters, masks behind their pictures. A mask that is absent is its picture's own."""
        if not images:
            return NOTHING
        if not any(_is_url(values.get(parameter.name)) for parameter in images):
            return await self._bring(caller, images, values)
        async with self._fetching.setdefault(caller, asyncio.Semaphore(FETCHING_PER_CALLER)):
            return await self._bring(caller, images, values)

    async def _bring(self, caller: str, images: Sequence[Parameter], values: Mapping[str, Any]) -> Brought:
        sources: dict[str, Source] = {}
        made: dict[str, Asset] = {}
        fetches = _Fetches()
        for parameter in images:
            name, of, given = parameter.name, parameter.mask_of, values.get(parameter.name)
            sources[name] = sources[of or name] if given is None else await self._find(caller, name, given, fetches)
            made[name] = await self._make(caller, name, sources[name], _choose_recipe(parameter, images, given))
            if of is not None:
                _require_same_size(name, of, made)
        inputs = tuple(_describe(name, asset) for name, asset in made.items())
        shown = {name: sources[name].upload if values.get(name) else None for name in made}
        return Brought(
            inputs, {given.parameter: given.file for given in inputs}, {name: shown[name] or asset.id for name, asset in made.items()}
        )

    async def bring_whole(self, caller: str, sources: Mapping[str, Source]) -> tuple[JobInput, ...]:
        """Make ready pictures for graphs that read their transparency as well, by parameter."""
        recipe = Recipe("whole", None, 1)
        return tuple([_describe(name, await self._make(caller, name, source, recipe)) for name, source in sources.items()])

    async def keep(self, spec: JobSpec) -> None:
        """A job was made of them: they stay for as long as it may be read, and run again."""
        for given in spec.inputs:
            await self._assets.keep(given.asset, self._keep_ms)

    async def _find(self, caller: str, name: str, given: str, fetches: _Fetches) -> Source:
        if given.startswith("data:"):
            return await self._hold(await asyncio.to_thread(_decode_data_url, name, given))
        if _is_url(given):
            return fetches.known.get(given) or await self._fetch(name, given, fetches)
        return await self.find_upload(caller, name, given)

    async def _fetch(self, name: str, url: str, fetches: _Fetches) -> Source:
        if len(fetches.known) == MAX_FETCHES:
            remedy = "POST /v1/uploads first, and name the upload's id."
            raise refuse(
                name, Refused("too_many_urls", name, f"At most {MAX_FETCHES} pictures of a request are fetched from URLs.", remedy)
            )
        options: dict[str, Any] = {"timeout_s": FETCH_S, "content_types": PICTURE_TYPES}
        most = min(MAX_PICTURE_BYTES, fetches.bytes_left)
        content = (await self._outside.fetch(url, parameter=name, max_bytes=most, **options)).content
        fetches.bytes_left -= len(content)
        fetches.known[url] = source = await self._hold(content)
        return source

    async def find_upload(self, caller: str, name: str, given: str) -> Source:
        """The picture of an upload. Raises NotFound that names the parameter."""
        try:
            asset = await self._assets.ready(caller, given)
        except NotFound as error:
            raise absent(given, parameter=name) from error
        if asset.size_bytes > MAX_PICTURE_BYTES:
            remedy = "Scale it down, or save it as JPEG."
            raise refuse(name, Refused("file_too_large", name, f"{given} has more than {MAX_PICTURE_BYTES} bytes.", remedy))

        async def read() -> bytes:
            try:
                return await self._assets.read(asset)
            except NotFound as error:
                raise absent(given, parameter=name) from error

        return Source(asset.sha256, read, given)

    async def _hold(self, body: bytes) -> Source:
        async def read() -> bytes:
            return body

        return Source((await asyncio.to_thread(hashlib.sha256, body)).hexdigest(), read)

    async def _make(self, caller: str, name: str, source: Source, recipe: Recipe) -> Asset:
        how = f"{recipe.name}:{source.sha256}"
        if (known := await self._assets.find_made(caller, how)) is not None:
            return known
        async with self._turn:
            made = await self._convert(name, await source.read(), recipe)
        return await self._assets.put_made(caller, how, made.body, "image/png")

    async def _convert(self, name: str, body: bytes, recipe: Recipe) -> Made:
        try:
            return await asyncio.to_thread(make, body, name, recipe)
        except Refused as refused:
            raise refuse(name, refused) from refused


def _is_url(given: Any) -> bool:
    return isinstance(given, str) and given.startswith(("http://", "https://"))


def _choose_recipe(parameter: Parameter, images: Sequence[Parameter], given: str | None) -> Recipe:
    """A mask has the limits of its picture."""
    limits = next((image for image in images if image.name == parameter.mask_of), parameter)
    if parameter.mask_of is None:
        return Recipe("picture", limits.max_pixels, limits.multiple_of or 1)
    return Recipe("transparency" if given is None else "mask", limits.max_pixels, limits.multiple_of or 1)


def _require_same_size(name: str, of: str, made: Mapping[str, Asset]) -> None:
    mask, picture = made[name], made[of]
    if (mask.width, mask.height) != (picture.width, picture.height):
        sizes = f"{mask.width}x{mask.height} pixels, {of} {picture.width}x{picture.height}"
        remedy = "Make both of the same size."
        raise refuse(name, Refused("mask_of_another_size", name, f"The mask has {sizes} (after scaling).", remedy))


def _describe(name: str, asset: Asset) -> JobInput:
    return JobInput(
        parameter=name,
        asset=asset.id,
        file=new_input_file(),
        key=asset.key,
        sha256=asset.sha256,
        size_bytes=asset.size_bytes,
        width=asset.width,
        height=asset.height,
    )


def _decode_data_url(name: str, given: str) -> bytes:
    try:
        return base64.b64decode(given.partition(",")[2], validate=True)
    except (binascii.Error, ValueError) as error:
        remedy = "Write it as data:image/png;base64,... in standard base64."
        raise refuse(name, Refused("data_url_broken", name, "The data URL holds no base64.", remedy)) from error
