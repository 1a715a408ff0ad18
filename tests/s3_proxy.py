"""A proxy before an S3 server that tells another time, insists on a region, or lets nobody write. Signatures pass: the Host stays."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import aiohttp
from aiohttp import web
from yarl import URL

DROPPED = ("transfer-encoding", "content-length", "expect", "date", "connection")


@dataclass
class S3Proxy:
    """`url` is what clients are given; the rest is what is wrong with it."""

    upstream: str
    url: str = ""
    late_s: int = 0
    region: str | None = None
    read_only: bool = False
    rename_host: bool = False

    def refuse(self, request: web.Request) -> web.Response | None:
        """As AWS words it."""
        signed = re.search(r"Credential=[^/]+/\d+/([^/]+)/", request.headers.get("Authorization", ""))
        if self.region and signed and signed[1] != self.region:
            text = f"<Code>AuthorizationHeaderMalformed</Code><Message>the region is wrong</Message><Region>{self.region}</Region>"
            return web.Response(status=400, text=f"<Error>{text}</Error>", content_type="application/xml")
        if self.read_only and request.method == "PUT":
            text = "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
            return web.Response(status=403, text=text, content_type="application/xml")
        return None

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        date = {"Date": format_datetime(datetime.now(UTC) + timedelta(seconds=self.late_s), usegmt=True)}
        if refused := self.refuse(request):
            refused.headers.update(date)
            return refused
        headers = {name: value for name, value in request.headers.items() if name.lower() not in DROPPED}
        if self.rename_host:
            headers.pop("Host")
        target = URL(self.upstream + request.raw_path, encoded=True)
        async with aiohttp.ClientSession(auto_decompress=False) as session:
            async with session.request(request.method, target, data=body, headers=headers, allow_redirects=False) as answer:
                kept = {name: value for name, value in answer.headers.items() if name.lower() not in DROPPED}
                return web.Response(status=answer.status, body=await answer.read(), headers={**kept, **date})


@asynccontextmanager
async def running_proxy(proxy: S3Proxy) -> AsyncIterator[S3Proxy]:
    app = web.Application(client_max_size=1 << 24)
    app.router.add_route("*", "/{rest:.*}", proxy.handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    proxy.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield proxy
    finally:
        await runner.cleanup()
