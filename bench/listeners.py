"""`python -m bench.listeners PORT LISTENERS < job ids`: thousands of event streams read by one process that costs as little as possible.

Sockets and epoll, no HTTP library: it shares the machine with what is measured. Says `open` when every stream has begun, then, when all
have ended or `--patience` seconds are over, a report of what came as one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import select
import socket
import sys
import time
from dataclasses import asdict, dataclass, field

from bench.simulated import WRAP_US, stamp_us

OPENING = 64  # streams that wait for their first event at one time
FRAME = re.compile(rb"id: (\d+)-(\d+)\nevent: (\w+)\ndata: ([^\n]*)")
STEP = re.compile(rb'"step": ?(\d+)')


@dataclass(slots=True)
class Report:
    """`whole_us`: instance to here; `feed_ms`: from Redis, whose ids tell the time in ms, to here. One entry per tick and stream."""

    ticks: dict[str, list[int]] = field(default_factory=dict)  # job -> ticks seen by each of its streams
    succeeded: int = 0  # streams that were told of the success and then ended
    disorder: int = 0  # ids that were not greater than the one before
    whole_us: list[int] = field(default_factory=list)
    feed_ms: list[int] = field(default_factory=list)


class Stream:
    """One listener of one job."""

    __slots__ = ("job_id", "last", "seen", "socket", "succeeded", "tail")

    def __init__(self, port: int, job_id: str) -> None:
        self.job_id, self.tail, self.last, self.seen, self.succeeded = job_id, b"", (0, 0), 0, False
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.sendall(f"GET /v1/generations/{job_id}/events HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
        self.socket.setblocking(False)

    def read(self, report: Report) -> bool:
        """What has come; False when the stream has ended."""
        chunk = self.socket.recv(1 << 16)
        here_us, here_ms = stamp_us(), time.time_ns() // 1_000_000
        data = self.tail + chunk
        whole = data.rfind(b"\n\n") + 2
        for milliseconds, sequence, kind, body in FRAME.findall(data, 0, whole) if whole > 1 else ():
            place = (int(milliseconds), int(sequence))
            report.disorder += place <= self.last
            self.last = place
            if kind == b"progress" and (step := STEP.search(body)):
                self.seen += 1
                report.whole_us.append((here_us - int(step[1])) % WRAP_US)
                report.feed_ms.append(here_ms - place[0])
            elif kind == b"status":
                self.succeeded = b'"status":"succeeded"' in body
        self.tail = data[whole:] if whole > 1 else data
        return bool(chunk) and not self.tail.endswith(b"0\r\n\r\n")


def listen(port: int, job_ids: list[str], listeners: int, patience_s: float) -> Report:
    """Open every stream, then read all to their ends."""
    report, poll, streams = Report(), select.epoll(), dict[int, Stream]()
    waiting = [job_id for job_id in job_ids for _ in range(listeners)]
    opening, opened, wanted = set[int](), 0, len(waiting)
    deadline = time.monotonic() + patience_s
    while (waiting or streams) and time.monotonic() < deadline:
        while waiting and len(opening) < OPENING:
            stream = Stream(port, waiting.pop())
            streams[stream.socket.fileno()] = stream
            opening.add(stream.socket.fileno())
            poll.register(stream.socket, select.EPOLLIN)
        for number, _ in poll.poll(1.0):
            stream = streams[number]
            if not stream.read(report):
                poll.unregister(number)
                stream.socket.close()
                del streams[number]
                report.ticks.setdefault(stream.job_id, []).append(stream.seen)
                report.succeeded += stream.succeeded
            # Open is what has replayed the past: from here on it waits for news alone.
            if number in opening and stream.last > (0, 0):
                opening.discard(number)
                opened += 1
                if opened == wanted:
                    print("open", flush=True)
    for stream in streams.values():
        report.ticks.setdefault(stream.job_id, []).append(stream.seen)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.listeners", description="Reads many event streams at once.")
    parser.add_argument("port", type=int, help="of the gateway, on loopback")
    parser.add_argument("listeners", type=int, help="streams per job")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds after which what has not ended is given up")
    arguments = parser.parse_args()
    report = listen(arguments.port, sys.stdin.read().split(), arguments.listeners, arguments.patience)
    print(json.dumps(asdict(report)), flush=True)


if __name__ == "__main__":
    main()
