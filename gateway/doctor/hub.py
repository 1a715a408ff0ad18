"""Hugging Face: the token, and the licences of the base models that this deployment runs and trains."""

from __future__ import annotations

from pydantic import SecretStr

from comfy_workflows.catalog import Catalog as Workflows
from comfy_workflows.errors import WorkflowError
from gateway.doctor.finding import Finding, fault, skip, warn, well
from gateway.errors import Unprocessable
from gateway.outside.hub import HubAccess
from gateway.settings import Settings


async def examine_hub(settings: Settings, workflows: Workflows) -> list[Finding]:
    hub = HubAccess(settings.hf_endpoint, settings.hf_token)
    findings = [await _judge_token(settings, hub)]
    if settings.auth == "hf":
        findings.append(await _judge_asking(settings))
    try:
        model = workflows.base_model(settings.default_base_model)
    except WorkflowError as error:
        return [*findings, fault("hub.base_model", f"DEFAULT_BASE_MODEL: {error.message}", error.hint)]
    trained = settings.base_model_paths.get(model.name, model.trains_on or model.source)
    wanted = [model.source] if settings.trainer in ("tiny", "off") else [model.source, trained]
    return findings + [await _judge_access(hub, place) for place in dict.fromkeys(wanted)]


async def _judge_token(settings: Settings, hub: HubAccess) -> Finding:
    if settings.hf_token is None:
        return skip("hub.token", "HF_TOKEN is not set; gated models cannot be fetched")
    verdict, said = await hub.identify()
    if verdict == "bad_token":
        return fault("hub.token", "Hugging Face does not know HF_TOKEN", "Make a token with read scope there, and set HF_TOKEN to it.")
    if verdict == "unknown":
        return warn("hub.token", f"could not be asked about: {said}", "See that HF_ENDPOINT is reachable from here.")
    return well("hub.token", f"belongs to {said}")


async def _judge_asking(settings: Settings) -> Finding:
    """Whether callers' tokens can be asked about: of one that nobody has the hub says so."""
    # A process of its own, which counts nothing.
    verdict, said = await HubAccess(settings.hf_endpoint, SecretStr("hf_" + "0" * 34)).identify()
    if verdict == "unknown":
        remedy = "See that HF_ENDPOINT is reachable from here: callers whose token is new are answered 503."
        return fault("hub.callers", f"AUTH=hf, and tokens cannot be asked about: {said}", remedy)
    return well("hub.callers", "tokens of callers can be asked about")


async def _judge_access(hub: HubAccess, place: str) -> Finding:
    try:
        said = await hub.require(place)
    except Unprocessable as error:
        return fault("hub.access", error.message, error.hint)
    if said == "granted":
        return well("hub.access", f"{place} may be read")
    why = "comes from a folder, not from Hugging Face" if said.startswith("not asked") else said
    return skip("hub.access", f"{place}: {why}")
