"""A program that behaves like a trainer, or badly: `trainer_child.py HOW [WEBHOOK]`. A fake at the wire, for faults on demand."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request

NAP = [sys.executable, "-c", "import time; time.sleep(300)"]
BAR = "\rEpoch 1/1, Steps:  {n}0%|#| {n}/4 [00:00<00:00, lr=0.0001, step_loss=0.{n}]"


def post(payload: object) -> None:
    request = urllib.request.Request(sys.argv[2], json.dumps(payload).encode())
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request).close()


def obey() -> None:
    """Interrupted as SimpleTuner's launcher is."""
    print("ready", flush=True)
    try:
        time.sleep(300)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        sys.exit(130)


def ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("ready", flush=True)
    time.sleep(300)


def ignore_all() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ignore_interrupt()


def start_family() -> None:
    """Children of every kind: in our group, in a session of its own, and one whose parent is gone."""
    subprocess.Popen(NAP)
    subprocess.Popen(NAP, start_new_session=True)
    if os.fork() == 0:
        subprocess.Popen(NAP, start_new_session=True)
        os._exit(0)
    print("ready", flush=True)


def start_family_and_sleep() -> None:
    start_family()
    ignore_all()


def chatter() -> None:
    """Never silent, never done."""
    while True:
        print("still here", flush=True)
        time.sleep(0.1)


def log_only() -> None:
    for n in range(1, 5):
        print(BAR.format(n=n), end="", file=sys.stderr, flush=True)
        time.sleep(0.05)
    print(file=sys.stderr)


def report_and_crash() -> None:
    post(
        {
            "type": "training.status",
            "status": "failed",
            "error": "it broke",
            "traceback": "RuntimeError: CUDA out of memory. hf_" + "a" * 30,
        }
    )
    sys.exit(1)


def exit_well() -> None:
    """As SimpleTuner itself does after any failure."""
    print("Traceback (most recent call last):\nValueError: nothing was trained")


def leak() -> None:
    print(os.environ.get("HF_TOKEN"), os.environ.get("AWS_SECRET_ACCESS_KEY"), "https://me:password1@host/", sys.argv[2], flush=True)
    sys.exit(3)


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
