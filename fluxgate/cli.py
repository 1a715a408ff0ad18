"""`fluxgate`: the gateway on the command line. Progress goes to stderr, results (paths, tables) to stdout."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fluxgate import key_commands, system
from fluxgate.client import DEFAULT_URL, Client
from fluxgate.display import choose_display, write_preview
from fluxgate.errors import FluxgateError
from fluxgate.terminal import Connection, print_error, print_table, speak_errors
from fluxgate.wire import Job, Lora, Progress, read_job

INTERRUPTED = 130  # what shells expect of a program that Ctrl-C ended

webhooks = typer.Typer(no_args_is_help=True, help="What is told of the end of a job.")


def _gather_commands() -> typer.Typer:
    gathered = typer.Typer(
        no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Pictures from a Fluxgate gateway."
    )
    gathered.add_typer(key_commands.app, name="keys")
    gathered.add_typer(webhooks, name="webhooks")
    return gathered


app = _gather_commands()


@app.callback()
def connect(
    context: typer.Context,
    url: Annotated[str, typer.Option(envvar="FLUXGATE_URL", help="Address of the gateway.")] = DEFAULT_URL,
) -> None:
    # The key has no option: a command line is readable by every user of the machine.
    context.obj = Connection(url, os.environ.get("FLUXGATE_API_KEY"))


def parse_lora(text: str) -> Lora:
    """`NAME` or `NAME:0.8`; a name may hold colons, the last part counts as a weight only if it is a number."""
    name, colon, weight = text.rpartition(":")
    if not colon:
        return Lora(name=text)
    try:
        return Lora(name=name, weight=float(weight))
    except ValueError:
        return Lora(name=text)


def parse_parameter(text: str) -> tuple[str, Any]:
    """`key=value`; the value is JSON where it can be read as such (numbers, true, lists), else text."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise typer.BadParameter(f"{text!r} is not key=value")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def choose_paths(output: Path, count: int) -> list[Path]:
    """One name per picture: `out.png`, or `out-1.png`, `out-2.png` when there are several."""
    if count == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{number}{output.suffix}") for number in range(1, count + 1)]


@app.command()
def generate(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="What the picture shows; some workflows take none.")] = None,
    lora: Annotated[list[str] | None, typer.Option(help="NAME or NAME:WEIGHT; repeatable.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same picture. Drawn when absent.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="How closely the prompt is followed.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Base model; the deployment's default when absent.")] = None,
    workflow: Annotated[str | None, typer.Option(help="Workflow; the deployment's default when absent.")] = None,
    count: Annotated[int | None, typer.Option("-n", "--num-images", help="Pictures to make.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="File to write; without it the URLs are printed.")] = None,
    parameter: Annotated[list[str] | None, typer.Option("-p", "--parameter", help="key=value for any other; repeatable.")] = None,
    preview: Annotated[Path | None, typer.Option(help="Write the work in progress to this file, again and again.")] = None,
) -> None:
    """Make a picture and show how it comes along."""
    given: dict[str, Any] = {"seed": seed, "width": width, "height": height, "steps": steps, "guidance_scale": guidance}
    given |= {"base_model": base_model, "num_images": count, **dict(parse_parameter(text) for text in parameter or [])}
    connection: Connection = context.obj
    with speak_errors(), connection.open() as client:
        job = client.generate(prompt, workflow=workflow, loras=[parse_lora(text) for text in lora or []], **given)
        try:
            job = follow(client, job, preview)
        except KeyboardInterrupt:
            offer_cancel(client, job)
            raise typer.Exit(INTERRUPTED) from None
        finish(client, job, output)


def follow(client: Client, job: Job, preview: Path | None) -> Job:
    """Show the job until it has ended."""
    console = Console(stderr=True)
    console.print(f"{job.id} ({job.workflow}, seed {job.seed})", highlight=False)
    with choose_display(console) as display:
        for event in client.stream(job.id, previews=preview is not None):
            if event.kind == "status":
                job = read_job(event.data)
                display.show_job(job)
            elif event.kind == "progress":
                display.show_progress(Progress.model_validate(event.data))
            elif event.kind == "preview" and preview is not None:
                write_preview(event, preview)
            elif event.kind == "log":
                console.print(str(event.data.get("message", event.data)), markup=False, highlight=False)
    return job


def offer_cancel(client: Client, job: Job) -> None:
    """After Ctrl-C: ask where somebody can answer, cancel where nobody can. A second Ctrl-C leaves the job running."""
    try:
        wanted = not sys.stdin.isatty() or typer.confirm(f"\nCancel {job.id}?", default=True, err=True)
        if wanted:
            typer.echo(f"{job.id} is {client.cancel(job.id).status}", err=True)
            return
    except (typer.Abort, KeyboardInterrupt):
        pass
    typer.echo(f"\n{job.id} goes on; stop it with: fluxgate cancel {job.id}", err=True)


def finish(client: Client, job: Job, output: Path | None) -> None:
    """Write or name the pictures; exit 1 for a job that ended without."""
    if job.status != "succeeded":
        print_error(job.error.message if job.error else f"{job.id} is {job.status}", job.error.hint if job.error else None)
        raise typer.Exit(1)
    if output is None:
        for picture in job.outputs:
            typer.echo(picture.url)
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    for picture, path in zip(job.outputs, choose_paths(output, len(job.outputs)), strict=True):
        path.write_bytes(client.download(picture))
        typer.echo(path)


@app.command()
def reproduce(context: typer.Context, job_id: str) -> None:
    """Run a job's graph once more and compare the pictures; exit code 1 when they differ."""
    connection: Connection = context.obj
    with speak_errors(), connection.open() as client:
        job = client.reproduce(job_id)
        try:
            job = follow(client, job, None)
        except KeyboardInterrupt:
            offer_cancel(client, job)
            raise typer.Exit(INTERRUPTED) from None
        if job.status != "succeeded":
            finish(client, job, None)
        found = client.compare(job.id)
    typer.echo(found["message"])
    if not found["same_pixels"]:
        raise typer.Exit(1)


@app.command()
def jobs(
    context: typer.Context,
    status: Annotated[str | None, typer.Option(help="queued, running, succeeded, canceling, canceled, failed or expired.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100, help="Most jobs to show.")] = 20,
) -> None:
    """List your jobs, newest first."""
    connection: Connection = context.obj
    with speak_errors(), connection.open() as client:
        page = client.jobs(status=status, limit=limit)
    rows = [(job.id, job.status, job.workflow, job.created_at or "", str(job.parameters.get("prompt", ""))) for job in page.data]
    print_table(("id", "status", "workflow", "created", "prompt"), rows)


@app.command()
def cancel(context: typer.Context, job_id: str) -> None:
    """Stop a job; one that has ended stays as it is."""
    connection: Connection = context.obj
    with speak_errors(), connection.open() as client:
        typer.echo(f"{job_id} is {client.cancel(job_id).status}")


@webhooks.command()
def replay(context: typer.Context, job_id: str) -> None:
    """Tell the end of a job to its webhook again."""
    connection: Connection = context.obj
    with speak_errors(), connection.open() as client:
        client.replay_webhook(job_id)
    typer.echo(f"{job_id} is told again")


@app.command()
def workflows(context: typer.Context) -> None:
    """List what can be asked for."""
    connection: Connection = context.obj
    with speak_errors(), connection.open() as client:
        found = client.workflows()
    print_table(("name", "title", "base models"), [(one.name, one.title, ", ".join(one.base_models)) for one in found])


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object in a file. Raises FluxgateError."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise FluxgateError(f"{path} holds no JSON object: {error}") from error


@app.command()
def put_workflow(
    context: typer.Context,
    name: str,
    folder: Annotated[Path, typer.Argument(help="Holds graph.json, bindings.toml and example.json.")],
) -> None:
    """Put a workflow in place, or a new version of it. For admins."""
    connection: Connection = context.obj
    with speak_errors(), connection.open() as client:
        graph, example = read_object(folder / "graph.json"), read_object(folder / "example.json")
        put = client.put_workflow(name, graph, (folder / "bindings.toml").read_text(encoding="utf-8"), example)
    for note in put["notes"]:
        typer.echo(note, err=True)
    typer.echo(f"{name} is in place, version {put['version']}")


@app.command()
def loras(context: typer.Context) -> None:
    """List the LoRAs that can be used."""
    connection: Connection = context.obj
    with speak_errors(), connection.open() as client:
        found = client.loras()
    rows = [(one.name, one.base_model or "", one.trigger_word or "", ", ".join(one.ready_on)) for one in found]
    print_table(("name", "base model", "trigger word", "ready on"), rows)


@app.command()
def doctor(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    url: Annotated[str | None, typer.Option(help="Address by which callers reach the gateway, to try its streams.")] = None,
) -> None:
    """Look at all that a deployment stands on; exit 1 where something is broken."""
    connection: Connection = context.obj
    with speak_errors():
        status = system.examine(connection.url, connection.api_key, as_json=as_json, tunnel=url)
    raise typer.Exit(status)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def models(context: typer.Context) -> None:
    """Bring base models: pull, list, verify, gc. Where the gateway is installed."""
    if not system.is_gateway_here():
        print_error("this runs where the gateway is installed", "Run it on the machine whose MODELS_DIR is ComfyUI's models folder.")
        raise typer.Exit(1)
    raise typer.Exit(system.run_gateway_command("models", context.args))


def main() -> None:
    app()
