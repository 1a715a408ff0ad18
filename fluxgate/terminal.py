"""What every command shares: where the gateway is, how errors are said, how tables look."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import typer
from rich.console import Console
from rich.table import Table

from fluxgate.client import Client
from fluxgate.errors import FluxgateError


@dataclass(frozen=True)
class Connection:
    """Where the gateway is, and as whom."""

    url: str
    api_key: str | None

    def open(self) -> Client:
        # A person who mistyped the address is not kept waiting.
        return Client(self.url, self.api_key, patience_s=2.0)


@contextmanager
def speak_errors() -> Iterator[None]:
    """Errors of the gateway as message and hint, exit code 1."""
    try:
        yield
    except (FluxgateError, OSError) as error:
        print_error(str(error), getattr(error, "hint", None))
        raise typer.Exit(1) from error


def print_error(message: str, hint: str | None) -> None:
    typer.echo(f"error: {message}", err=True)
    if hint:
        typer.echo(f"hint: {hint}", err=True)


def print_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """A table on a terminal; tab-separated lines without a head in a pipe, one row each."""
    if not sys.stdout.isatty():
        for row in rows:
            typer.echo("\t".join(" ".join(cell.split()) for cell in row))
        return
    table = Table(*head, box=None, header_style="bold")
    for row in rows:
        table.add_row(*(cell.replace("[", "\\[") for cell in row))
    Console().print(table)
