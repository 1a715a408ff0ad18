"""Each ComfyUI: there, of a known version, with the nodes and files the workflows ask for, and open to nobody else."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from comfy_workflows.catalog import Catalog as Workflows
from comfy_workflows.render import render
from gateway.admission import needs_of
from gateway.comfy.client import ComfyClient
from gateway.comfy.companion import SAVE_NODE
from gateway.dispatch.fleet import missing
from gateway.doctor.finding import Finding, fault, skip, warn, well
from gateway.errors import InstanceError
from gateway.instances import Catalog, InstanceFacts, instance_id, reduce_catalog
from gateway.jobs.model import Needs
from gateway.outside.addresses import find_fault
from gateway.settings import Settings

TESTED_VERSION = "0.3.64"
CONNECT_S = 2.0


async def examine_instances(settings: Settings, workflows: Workflows, session: aiohttp.ClientSession, urls: Sequence[str]) -> list[Finding]:
    """All of them, and then what the deployment as a whole can run."""
    looked = await asyncio.gather(*(_examine(ComfyClient(url, session)) for url in urls))
    findings = [finding for found, _ in looked for finding in found]
    catalogs = {url: catalog for url, (_, catalog) in zip(urls, looked, strict=True) if catalog is not None}
    return findings + (_judge_workflows(settings, workflows, catalogs) if catalogs else [])


def examine_reports(reported: Sequence[InstanceFacts]) -> list[Finding]:
    """Where dispatchers run elsewhere and reach instances that we do not: what they say of them."""
    remedy = "Where a dispatcher runs: python -m gateway doctor; GET /v1/instances has the last error."
    told = {"up": well, "training": well}
    if not reported:
        return [skip("comfyui", "no dispatcher reports an instance: scaled to none, or none has started")]
    return [
        told[facts.state](f"comfyui.{facts.id}", f"is {facts.state}, says its dispatcher")
        if facts.state in told
        else warn(f"comfyui.{facts.id}", f"is {facts.state}, says its dispatcher", remedy)
        for facts in reported
    ]


async def _examine(client: ComfyClient) -> tuple[list[Finding], Catalog | None]:
    name = f"comfyui.{instance_id(client.url)}"
    try:
        stats, catalog = (await client.system_stats()).get("system") or {}, reduce_catalog(await client.object_info())
    except InstanceError as error:
        return [fault(name, error.message, f"Start ComfyUI there, or take {client.url} out of COMFYUI_URLS.")], None
    findings = [_judge_version(name, stats), *_judge_companion(name, stats, catalog), *_judge_flags(name, stats)]
    listens = read_listen([str(part) for part in stats.get("argv") or []])
    findings.append(await asyncio.to_thread(_judge_exposure, name, client.url, listens))
    return findings, catalog


def _judge_version(name: str, stats: Mapping[str, Any]) -> Finding:
    version = str(stats.get("comfyui_version") or "unknown")
    if version == TESTED_VERSION:
        return well(name, f"answers; version {version}")
    return warn(name, f"answers; version {version}, which was not tested", f"Where jobs fail oddly, install ComfyUI {TESTED_VERSION}.")


def _judge_companion(name: str, stats: Mapping[str, Any], catalog: Catalog) -> list[Finding]:
    if SAVE_NODE in catalog:
        return [well(name, "has the companion extension")]
    # The built-in engine does without.
    remedy = "Install it: docs/companion.md."
    said = "has no companion extension: pictures are encoded in turn with the sampling"
    return [] if stats.get("fluxgate_engine") else [warn(name, said, remedy)]


def _judge_flags(name: str, stats: Mapping[str, Any]) -> list[Finding]:
    argv, found = [str(part) for part in stats.get("argv") or []], list[Finding]()
    if "--preview-method" not in argv:
        found.append(warn(name, "sends no previews", "Start it with --preview-method auto."))
    if not stats.get("fluxgate_engine") and "--cache-lru" not in argv:
        found.append(warn(name, "keeps only the last prompt's models at hand", "Start it with --cache-lru 20."))
    return found


def read_listen(argv: Sequence[str]) -> list[str]:
    """Addresses that the command line says ComfyUI listens on. Loopback where it says nothing; a bare flag is every address."""
    said = ["127.0.0.1"]
    for index, part in enumerate(argv):
        if part == "--listen":
            following = argv[index + 1] if index + 1 < len(argv) else "--"
            said = ["0.0.0.0", "::"] if following.startswith("--") else following.split(",")
        elif part.startswith("--listen="):
            said = part.removeprefix("--listen=").split(",")
    return [address.strip() for address in said]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _judge_exposure(name: str, url: str, listens: Sequence[str]) -> Finding:
    """Whether others reach it: it runs any graph for anyone. Blocks."""
    parts, remedy = urlsplit(url), "Start it with --listen 127.0.0.1, or on a network that only the dispatcher is in."
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    wide = [address for address in listens if not _is_loopback(address)]
    if _is_loopback(host):
        if reached := [address for address in find_own_addresses() if _answers(address, port)]:
            return fault(name, f"is open to others: it answers on {reached[0]}:{port} and asks nobody for a key", remedy)
        if wide:
            return fault(name, f"listens on {', '.join(wide)}: others may reach it, and it asks nobody for a key", remedy)
        return well(name, "listens on this machine alone")
    if public := [address for address in _resolve(host) if find_fault(address) is None]:
        return fault(name, f"has the public address {public[0]} and asks nobody for a key", remedy)
    if wide:
        return warn(name, f"listens on {', '.join(wide)}", "See that only the dispatcher's network reaches it.")
    return well(name, "is on a private network")


def find_own_addresses() -> list[str]:
    """Addresses of this machine by which others reach it, as far as its name and its way out tell."""
    found = {str(address) for address in _resolve(socket.gethostname())}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Nothing is sent: connecting a datagram socket only looks up the route. 192.0.2.1 is nobody's.
            probe.connect(("192.0.2.1", 9))
            found.add(str(probe.getsockname()[0]))
        except OSError:
            pass
    return sorted(address for address in found if not _is_loopback(address))


def _resolve(host: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    try:
        entries = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in entries]
    except (OSError, ValueError):
        return []


def _answers(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), CONNECT_S):
            return True
    except OSError:
        return False


def _judge_workflows(settings: Settings, workflows: Workflows, catalogs: Mapping[str, Catalog]) -> list[Finding]:
    """Whether some instance can run each workflow, with the base model of requests that name none or with any."""
    return [_judge_workflow(settings, workflows, name, catalogs) for name in workflows.names()]


def _judge_workflow(settings: Settings, workflows: Workflows, name: str, catalogs: Mapping[str, Catalog]) -> Finding:
    default, is_default = settings.default_base_model, name == settings.default_workflow
    fitting = workflows.get(name).fitting_base_models()
    # A workflow that loads no base model runs under any name.
    bases = fitting or [default if default in workflows.get(name).base_models else next(iter(workflows.get(name).base_models))]
    lacks = {base: _fewest(_needs(workflows, name, base), catalogs) for base in bases}
    runs = [base for base, lack in lacks.items() if not lack]
    needed = default if is_default and default in fitting else None
    if runs and (needed is None or needed in runs):
        return well(f"workflow.{name}", f"runs with {', '.join(runs)}" if fitting else "runs")
    base = default if default in lacks else min(lacks, key=lambda base: len(lacks[base]))
    judge, with_base = fault if is_default else warn, f" with {base}" if fitting else ""
    return judge(f"workflow.{name}", f"cannot run{with_base}: {'; '.join(lacks[base][:6])} missing", _remedy(lacks[base], base))


def _remedy(lack: Sequence[str], base: str) -> str:
    if classes := [entry.removeprefix("node class ") for entry in lack if entry.startswith("node class ")]:
        return f"Install the custom nodes that bring {', '.join(classes)}, and restart ComfyUI."
    return f"Bring the files into ComfyUI's models folder: fluxgate models pull {base}."


def _fewest(needs: Needs, catalogs: Mapping[str, Catalog]) -> list[str]:
    """What is missing on the instance that misses least."""
    return min((missing(needs, catalog) for catalog in catalogs.values()), key=len)


def _needs(workflows: Workflows, name: str, base: str) -> Needs:
    """Of the workflow's own example. Pictures that a request brings are not on the instance beforehand."""
    workflow = workflows.get(name)
    example = {key: value for key, value in workflow.example.items() if key not in ("base_model", "loras")}
    filled = workflow.fill(example, default_base_model=base, draw_seed=lambda: 1)
    brought = [str(filled.values[parameter.name]) for parameter in workflow.images if filled.values.get(parameter.name)]
    return needs_of(render(workflow, filled, job_id="doctor"), brought)
