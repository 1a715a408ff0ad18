"""How a running job looks: a bar on a terminal, plain lines anywhere else. It decides nothing."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from fluxgate.wire import Event, Job, Progress


def describe_progress(progress: Progress) -> str:
    """`Sampler (KSampler), step 7/20`: as much of it as is known."""
    parts = []
    if progress.current_node or progress.current_node_class:
        name, node_class = progress.current_node, progress.current_node_class
        parts.append(f"{name} ({node_class})" if name and node_class else name or node_class or "")
    if progress.step is not None and progress.steps:
        parts.append(f"step {progress.step}/{progress.steps}")
    if progress.message:
        parts.append(progress.message)
    return ", ".join(parts)


def describe_job(job: Job) -> str:
    """The status, and while it waits its place in the queue."""
    if job.status == "queued" and job.queue_position is not None:
        return f"queued, position {job.queue_position}"
    return job.status


def write_preview(event: Event, path: Path) -> None:
    """The newest picture of the work in progress, in one piece: a viewer may be looking at the file."""
    try:
        picture = base64.b64decode(event.data.get("base64", ""), validate=True)
    except (binascii.Error, TypeError):
        return
    waiting = path.with_name(f".{path.name}.part")
    waiting.write_bytes(picture)
    waiting.replace(path)


class Display(Protocol):
    def __enter__(self) -> Self: ...
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...
    def show_job(self, job: Job) -> None: ...
    def show_progress(self, progress: Progress) -> None: ...


class PlainLines:
    """One line per change, for pipes and logs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None

    def _print(self, line: str) -> None:
        if line and line != self._last:
            self._last = line
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def show_job(self, job: Job) -> None:
        self._print(describe_job(job))

    def show_progress(self, progress: Progress) -> None:
        self._print(f"{progress.value:4.0%} {describe_progress(progress)}".rstrip())


class Bar:
    """A live bar; it leaves nothing behind but its last state."""

    def __init__(self, console: Console) -> None:
        columns = (BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
        self._bar = RichProgress(*columns, console=console, transient=True)
        self._task = self._bar.add_task("", total=1.0)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def show_job(self, job: Job) -> None:
        value = 1.0 if job.status == "succeeded" else job.progress.value
        self._bar.update(self._task, description=describe_progress(job.progress) or describe_job(job), completed=value)

    def show_progress(self, progress: Progress) -> None:
        self._bar.update(self._task, description=describe_progress(progress), completed=progress.value)


def choose_display(console: Console) -> Display:
    return Bar(console) if console.is_terminal else PlainLines(console)
