"""`fluxgate keys`: the keys of a gateway, for its admins. The first one is made where the gateway is: `python -m gateway keys create`."""

from __future__ import annotations

from typing import Annotated

import typer

from fluxgate.terminal import Connection, print_table, speak_errors
from fluxgate.wire import Key

app = typer.Typer(no_args_is_help=True, help="API keys and their callers' limits; for admins.")

Scopes = Annotated[str | None, typer.Option(help="Comma separated: generate, train, admin, which includes the others.")]
Expires = Annotated[str | None, typer.Option(help="RFC 3339 time from which the key is refused, such as 2027-01-31T12:00:00Z.")]
PerMinute = Annotated[int | None, typer.Option(min=0, help="Requests in any 60 s. 0: what the settings say.")]
InFlight = Annotated[int | None, typer.Option(min=0, help="Unfinished jobs at one time. 0: what the settings say.")]
GpuSeconds = Annotated[int | None, typer.Option(min=0, help="Seconds of GPU time a day, in UTC. 0: what the settings say.")]


def _limits(requests_per_minute: int | None, jobs_in_flight: int | None, gpu_seconds_per_day: int | None) -> dict[str, int | None]:
    """Those that were said; None for the settings'."""
    said = {
        "requests_per_minute": requests_per_minute,
        "jobs_in_flight": jobs_in_flight,
        "gpu_seconds_per_day": gpu_seconds_per_day,
    }
    return {name: value or None for name, value in said.items() if value is not None}


def _split(scopes: str) -> list[str]:
    return [scope.strip() for scope in scopes.split(",")]


@app.command()
def create(
    context: typer.Context,
    name: Annotated[str, typer.Option(help="For people.")] = "key",
    scopes: Scopes = "generate",
    caller: Annotated[str | None, typer.Option(help="Share one caller's jobs, LoRAs and limits; without, a caller of its own.")] = None,
    expires_at: Expires = None,
    requests_per_minute: PerMinute = None,
    jobs_in_flight: InFlight = None,
    gpu_seconds_per_day: GpuSeconds = None,
) -> None:
    """Make a key and print it, this once."""
    connection: Connection = context.obj
    limits = {name: value for name, value in _limits(requests_per_minute, jobs_in_flight, gpu_seconds_per_day).items() if value}
    with speak_errors(), connection.open() as client:
        made = client.create_key(name, scopes=_split(scopes or ""), caller=caller, expires_at=expires_at, limits=limits or None)
    typer.echo(f"{made.id} ({', '.join(made.scopes)}) of {made.caller}", err=True)
    typer.echo(made.key)


@app.command("list")
def list_keys(context: typer.Context) -> None:
    """Every key there was, newest first, with what its caller used today."""
    connection: Connection = context.obj
    with speak_errors(), connection.open() as client:
        found = client.keys()
    head = ("id", "caller", "scopes", "state", "limits", "today", "last used", "name")
    print_table(head, [(*_describe(key), key.last_used_at or "never", key.name) for key in found])


@app.command()
def change(
    context: typer.Context,
    key_id: str,
    name: Annotated[str | None, typer.Option(help="For people.")] = None,
    scopes: Scopes = None,
    expires_at: Expires = None,
    requests_per_minute: PerMinute = None,
    jobs_in_flight: InFlight = None,
    gpu_seconds_per_day: GpuSeconds = None,
) -> None:
    """Change a key, and its caller's limits, while it is used."""
    connection: Connection = context.obj
    said = {"name": name, "scopes": None if scopes is None else _split(scopes), "expires_at": expires_at}
    fields = {field: value for field, value in said.items() if value is not None}
    with speak_errors(), connection.open() as client:
        changed = client.change_key(key_id, limits=_limits(requests_per_minute, jobs_in_flight, gpu_seconds_per_day), **fields)
    print_table(("id", "caller", "scopes", "state", "limits", "today"), [_describe(changed)])


@app.command()
def revoke(context: typer.Context, key_id: str) -> None:
    """Refuse a key from now on. Its jobs go on."""
    connection: Connection = context.obj
    with speak_errors(), connection.open() as client:
        client.revoke_key(key_id)
    typer.echo(f"{key_id} is revoked")


def _describe(key: Key) -> tuple[str, str, str, str, str, str]:
    state = "good" if key.is_good else "revoked" if key.revoked_at else "expired"
    limits = " ".join(f"{name}={value}" for name, value in key.limits.items() if value is not None)
    used = key.usage_today or {"requests": 0, "gpu_seconds": 0}
    today = f"{used['requests']} requests, {used['gpu_seconds']:g} s of GPU"
    return key.id, key.caller, ",".join(key.scopes), state, limits or "-", today
