"""One training from its configuration to its outcome: prepare, run, listen, judge. It knows no Redis, no S3 and no queue."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from trainer_worker.config import TrainingConfig
from trainer_worker.failures import Failure, classify
from trainer_worker.launch import Launch, find_secrets, pass_environment
from trainer_worker.logs import hide_secrets
from trainer_worker.process import STALLED, STOPPED, TIMED_OUT, Limits, run_child
from trainer_worker.progress import Failed, Notice, Sample, Step, TrainerEvent, read_log_line, read_webhook
from trainer_worker.sink import WebhookSink
from trainer_worker.trainers import Trainer

QUIET_S = 5.0  # the webhook is heard within this if it works; then the log's steps are told instead
REMEMBERED_EVENTS = 200

OnEvent = Callable[[TrainerEvent], None]


@dataclass(frozen=True)
class Outcome:
    status: str  # completed, failed, interrupted
    final: Path | None  # the final weights; of a completed training only
    failure: Failure | None  # why it is not completed
    log_tail: str  # its last lines, without secrets


def train(
    trainer: Trainer, config: TrainingConfig, on_event: OnEvent, should_stop: threading.Event, limits: Limits | None = None
) -> Outcome:
    """Run a trainer to its end; returns when nothing of it runs any more.

    `on_event` is called in this thread, with each step once; an exception of it ends the trainer and is passed on.
    ValueError or OSError when the trainer refuses the configuration.
    """
    with WebhookSink() as sink:
        launch = trainer.prepare(config, sink.url)
        env = pass_environment(os.environ, launch.env)
        secrets = (sink.secret, *find_secrets(env))
        listener = Listener(sink, launch, on_event, secrets)
        end = run_child(
            launch.command,
            env,
            launch.log_path,
            cwd=launch.cwd,
            limits=limits,
            should_stop=should_stop,
            hear=listener.hear,
            secrets=secrets,
        )
    final = trainer.find_final(config)
    # All steps may be done before a late stop is noticed: then the weights are there and count.
    if end.exit_code == 0 and final is not None and end.reason not in (STALLED, TIMED_OUT):
        return Outcome("completed", final, None, end.log_tail)
    failure = classify(end.exit_code, list(listener.events), end.log_tail, end.reason)
    status = "interrupted" if end.reason == STOPPED or failure.code == "interrupted" else "failed"
    return Outcome(status, None, failure, end.log_tail)


class Listener:
    """Joins webhook and log into one story, in which each step is told once."""

    def __init__(self, sink: WebhookSink, launch: Launch, on_event: OnEvent, secrets: tuple[str, ...]) -> None:
        self.events: deque[TrainerEvent] = deque(maxlen=REMEMBERED_EVENTS)
        self._sink = sink
        self._sample_names = launch.sample_names
        self._on_event = on_event
        self._secrets = secrets
        self._step = -1
        self._heard_at = time.monotonic()

    def hear(self, lines: list[str]) -> bool:
        """Tell what has come; True when the webhook was called."""
        payloads = self._sink.drain()
        for payload in payloads:
            self._tell(read_webhook(payload))
        if payloads:
            self._heard_at = time.monotonic()
        elif time.monotonic() - self._heard_at > QUIET_S:
            for line in lines:
                self._tell(read_log_line(line))
        return bool(payloads)

    def _tell(self, event: TrainerEvent | None) -> None:
        match event:
            case None:
                return
            case Step(step=step):
                # SimpleTuner repeats a step after its checkpoint, and the log repeats them all.
                if step <= self._step:
                    return
                self._step = step
            case Sample(step=step, prompt=name):
                event = replace(event, step=step or max(self._step, 0), prompt=self._sample_names.get(name, name))
            case Notice(message=message):
                event = Notice(hide_secrets(message, self._secrets))
            case Failed(message=message, traceback=traceback):
                event = Failed(hide_secrets(message, self._secrets), hide_secrets(traceback, self._secrets))
            case _:
                pass
        if not isinstance(event, Sample):
            self.events.append(event)
        self._on_event(event)
