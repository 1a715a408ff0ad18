"""How a job looks in a notebook's cell: a bar, the newest preview, then the pictures; for a training its loss as it falls.
It needs IPython, which every notebook has, and draws the curve where matplotlib is there."""

from __future__ import annotations

import html
import io
import time
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from fluxgate.client import Client
from fluxgate.display import describe_job, describe_progress
from fluxgate.errors import ApiError
from fluxgate.wire import Dataset, Event, Job, LoraInfo, Progress, Sample, Training, read_job

# Its functions carry no types.
IPYTHON: Any = import_module("IPython.display")
BAR_WIDTH = 480
# Each update is a message to the browser; a training has thousands of steps.
REDRAW_S = 0.5
MOST_POINTS = 600


class Failed(Exception):
    """A job ended without what was asked for; the text says why."""


class Bar:
    """One line with a bar, and the newest preview below it, in one place of the cell."""

    def __init__(self) -> None:
        self._handle = IPYTHON.display(IPYTHON.HTML(self._draw(0.0, "", "")), display_id=True)
        self._value, self._text, self._preview = 0.0, "", ""

    @staticmethod
    def _draw(value: float, text: str, preview: str) -> str:
        bar = f'<progress value="{value:.3f}" max="1" style="width:{BAR_WIDTH}px"></progress> {value:4.0%} {html.escape(text)}'
        return bar + (f'<br><img src="{preview}" width="{BAR_WIDTH}">' if preview else "")

    def show(self, *, value: float | None = None, text: str | None = None, preview: str | None = None) -> None:
        """Draw it anew with what is given; the rest stays."""
        self._value = self._value if value is None else value
        self._text = self._text if text is None else text
        self._preview = self._preview if preview is None else preview
        self._handle.update(IPYTHON.HTML(self._draw(self._value, self._text, self._preview)))

    def take(self, event: Event) -> None:
        """What an event changes."""
        if event.kind == "progress":
            progress = Progress.model_validate(event.data)
            self.show(value=progress.value, text=describe_progress(progress))
        elif event.kind == "preview":
            self.show(preview=f"data:{html.escape(event.data['mime'])};base64,{html.escape(event.data['base64'])}")


def watch(client: Client, job: Job) -> Job:
    """Show the job until it has ended, then its pictures. Raises Failed for one that ended without."""
    bar = Bar()
    for event in client.stream(job.id, previews=True):
        bar.take(event)
        if event.kind == "status":
            bar.show(text=describe_job(read_job(event.data)))
    job = client.get(job.id)
    bar.show(value=1.0 if job.status == "succeeded" else None, text=f"{job.status}, seed {job.seed}", preview="")
    _require_success(job)
    for output in job.outputs:
        _show_picture(client.download(output), output.content_type)
    return job


def watch_training(client: Client, training: Training) -> Training:
    """Show stages, loss and sample pictures until the training has ended. Raises Failed for one that ended badly."""
    bar, curve = Bar(), Curve()
    for event in client.stream(training.id):
        bar.take(event)
        if event.kind == "progress" and event.data.get("loss") is not None:
            curve.add(event.data["step"], event.data["loss"])
        elif event.kind == "sample":
            sample = Sample.model_validate(event.data)
            _show_titled(client, f"step {sample.step}: {sample.prompt}", sample.url)
        elif event.kind == "log":
            bar.show(text=str(event.data.get("message", "")))
    curve.draw()
    training = client.get_training(training.id)
    bar.show(value=1.0 if training.status == "succeeded" else None, text=training.status)
    _require_success(training)
    return training


class Curve:
    """Loss over steps, drawn again and again in one place of the cell."""

    def __init__(self) -> None:
        self._points: list[tuple[int, float]] = []
        self._handle: Any = None
        self._drawn_at = 0.0

    def add(self, step: int, loss: float) -> None:
        if self._points and self._points[-1][0] == step:
            # The last step is told once more at the end.
            return
        self._points.append((step, loss))
        if time.monotonic() > self._drawn_at + REDRAW_S:
            self.draw()

    def draw(self) -> None:
        """Show all points so far; without matplotlib the last one in words."""
        if not self._points:
            return
        self._drawn_at = time.monotonic()
        step, loss = self._points[-1]
        drawn = IPYTHON.Image(data=plot(self._points)) if find_spec("matplotlib") else IPYTHON.HTML(f"step {step}: loss {loss:.4f}")
        if self._handle is None:
            self._handle = IPYTHON.display(drawn, display_id=True)
        else:
            self._handle.update(drawn)


def plot(points: Sequence[tuple[int, float]]) -> bytes:
    """A PNG of the loss and of its running mean."""
    from matplotlib.figure import Figure  # without pyplot: no state, and no second display of the same figure

    shown = points[:: max(1, len(points) // MOST_POINTS)]
    steps, losses = [step for step, _ in shown], [loss for _, loss in shown]
    means, mean = [], losses[0]
    for loss in losses:
        mean += (loss - mean) * 0.1
        means.append(mean)
    figure = Figure(figsize=(7, 2.6), dpi=90, layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="#9db7d5", linewidth=1, marker="." if len(shown) < 40 else None, label="loss")
    axes.plot(steps, means, color="#1f4e8c", linewidth=2, label="running mean")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend(loc="upper right", frameon=False)
    body = io.BytesIO()
    figure.savefig(body, format="png")
    return body.getvalue()


def show_dataset(client: Client, dataset: Dataset, *, most: int = 8) -> None:
    """The first pictures with the captions a training would use, and what is wrong with the set."""
    for file in [file for file in dataset.files if file.url][:most]:
        _show_titled(client, f"{file.name}: {file.caption_used or 'no caption'}", file.url or "", width=160)
    for problem in dataset.preflight.problems if dataset.preflight else ():
        print(f"{problem.severity}: {problem.message} {problem.remedy}")
    print(
        f"{dataset.file_count} files; " + ("ready to train" if dataset.preflight and dataset.preflight.ok else "not to be trained on yet")
    )


def show_before_after(client: Client, name: str, *, give_up_s: float = 600.0) -> LoraInfo:
    """The same prompt without and with the LoRA, once both are drawn. Raises Failed when that takes longer than `give_up_s`."""
    deadline = time.monotonic() + give_up_s
    lora = client.get_lora(name)
    while not (lora.before and lora.after):
        if time.monotonic() > deadline:
            raise Failed(f"The pictures of {name} are not drawn after {give_up_s:g} s; GET /v1/instances says what the instances do.")
        time.sleep(0.5)
        lora = client.get_lora(name)
    _show_titled(client, f"without {name}", lora.before)
    _show_titled(client, f"with {name}", lora.after)
    return lora


def _show_titled(client: Client, title: str, url: str, *, width: int | None = None) -> None:
    try:
        picture = client.download(url)
    except ApiError as error:
        print(f"{title}: {error}")
        return
    print(title)
    _show_picture(picture, "", width=width)


def _show_picture(picture: bytes, content_type: str, *, width: int | None = None) -> None:
    # IPython knows PNG, JPEG and GIF by their first bytes; WebP has to be said.
    kind = "webp" if content_type == "image/webp" or picture[8:12] == b"WEBP" else None
    IPYTHON.display(IPYTHON.Image(data=picture, format=kind, width=width))


def _require_success(job: Job | Training) -> None:
    if job.status != "succeeded":
        hint = f" {job.error.hint}" if job.error and job.error.hint else ""
        raise Failed(f"{job.id} is {job.status}: {job.error.message}{hint}" if job.error else f"{job.id} is {job.status}.")
