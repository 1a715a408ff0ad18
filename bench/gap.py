"""Does the instance wait for us? The pause between consecutive prompts under a backlog, while each upload to S3 takes 300 ms longer:
fed by the gateway, and fed by ComfyUI's own queue with all prompts at once. Times are ComfyUI's own, from its messages."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench.caller import BenchFailure, Caller, open_caller
from bench.deployment import open_gateway, open_servers
from bench.measure import format_table, summarize
from bench.proxy import PromptTimes, TcpProxy
from bench.raw import RawClient, load_graph, open_raw_client

JOBS = 40
# Only a garbage collection of the whole heap, or somebody else's work on the machine, takes that long between two prompts.
STALL_MS = 50
ROUNDS = 3
HOLD_PUT_S = 0.3
COLORS = itertools.count(random.randrange(1 << 20))

Feed = Callable[[int], Awaitable[None]]  # number of jobs


@dataclass
class Trace:
    """Runs and the gaps between them, in ms, over all rounds of one feed."""

    runs_ms: list[float] = field(default_factory=list)
    gaps_ms: list[float] = field(default_factory=list)

    def add(self, times: PromptTimes, jobs: int) -> None:
        if not times.started_ms.keys() == times.ended_ms.keys() or len(times.ended_ms) != jobs:
            raise BenchFailure(f"of {jobs} prompts {len(times.started_ms)} were seen to start and {len(times.ended_ms)} to succeed")
        spans = sorted((start, times.ended_ms[prompt_id]) for prompt_id, start in times.started_ms.items())
        self.runs_ms += [end - start for start, end in spans]
        self.gaps_ms += [following[0] - span[1] for span, following in itertools.pairwise(spans)]

    @property
    def plain_gaps_ms(self) -> list[float]:
        """Without the instance's own stalls: which feed they fall to is chance."""
        return [gap for gap in self.gaps_ms if gap <= STALL_MS]

    @property
    def idle_share(self) -> float:
        """Of the time from a first start to a last end, the part in which nothing ran."""
        gaps = sum(self.gaps_ms)
        return gaps / (gaps + sum(self.runs_ms))


def _gateway_feed(caller: Caller, workflow: str) -> Feed:
    async def feed(jobs: int) -> None:
        async def make(color: int) -> None:
            job = await caller.follow(await caller.submit({"workflow": workflow, "seed": color % (1 << 24)}))
            await caller.fetch_picture(job)

        await asyncio.gather(*(make(color) for color in itertools.islice(COLORS, jobs)))

    return feed


def _direct_feed(raw: RawClient, workflow: str) -> Feed:
    async def feed(jobs: int) -> None:
        graphs = [
            load_graph(workflow, {"Canvas": {"color": color % (1 << 24)}}, f"raw_{color:06x}") for color in itertools.islice(COLORS, jobs)
        ]
        await asyncio.gather(*(raw.make(graph) for graph in graphs))

    return feed


async def measure(feeds: dict[str, Feed], times: PromptTimes, jobs: int, rounds: int) -> dict[str, Trace]:
    """The feeds in turns, `jobs` at once in each round, after one small round to warm up."""
    traces = {name: Trace() for name in feeds}
    for feed in feeds.values():
        await feed(3)
    for _ in range(rounds):
        for name, feed in feeds.items():
            times.forget()
            await feed(jobs)
            # The last message may still be on its way through the proxy.
            await asyncio.sleep(0.1)
            traces[name].add(times, jobs)
    return traces


def _compare(ours: list[float], direct: list[float]) -> str:
    """The ratio of the means."""
    base = summarize(direct).mean
    return f"{summarize(ours).mean / base:.2f}" if base else "-"


def report(traces: dict[str, Trace]) -> str:
    header = (
        "backlog fed by",
        "run p50 ms",
        "gap mean ms",
        "gap p50",
        "gap p95",
        "gap max",
        "idle share",
        "gap vs. direct",
        f"over {STALL_MS} ms",
        "mean without",
        "vs. direct",
    )
    first = next(iter(traces.values()))
    rows = []
    for name, trace in traces.items():
        gaps = summarize(trace.gaps_ms)
        numbers = (f"{gaps.mean:.2f}", f"{gaps.p50:.0f}", f"{gaps.p95:.0f}", f"{gaps.largest:.0f}")
        ratios = (_compare(trace.gaps_ms, first.gaps_ms), _compare(trace.plain_gaps_ms, first.plain_gaps_ms))
        stalls, plain = str(len(trace.gaps_ms) - len(trace.plain_gaps_ms)), f"{summarize(trace.plain_gaps_ms).mean:.2f}"
        share = f"{trace.idle_share * 100:.2f} %"
        rows.append((name, f"{summarize(trace.runs_ms).p50:.0f}", *numbers, share, ratios[0], stalls, plain, ratios[1]))
    return format_table(header, rows)


async def run(state_dir: Path, share: float) -> None:
    """Print the table. `share` scales the number of jobs in a backlog (1 is 40)."""
    times, jobs = PromptTimes(), max(5, int(JOBS * share))
    async with open_servers(state_dir) as servers:
        workflow = "paused" if servers.engine is not None else "scaled"
        slow_s3 = TcpProxy(servers.s3.endpoint_url, hold_put_s=HOLD_PUT_S)
        # Both feeds pass the listening proxy, so what it costs is in both numbers.
        async with TcpProxy(servers.comfyui_url, listen=times.listen).open() as comfyui_url, slow_s3.open() as s3_url:
            async with open_gateway(servers, {"COMFYUI_URLS": comfyui_url, "S3_ENDPOINT_URL": s3_url}) as gateway:
                async with open_raw_client(comfyui_url) as raw, open_caller(gateway.url) as caller:
                    feeds = {"ComfyUI's own queue": _direct_feed(raw, workflow), "the gateway": _gateway_feed(caller, workflow)}
                    traces = await measure(feeds, times, jobs, ROUNDS)
    print(report(traces))
    print(f"  {jobs} jobs x {ROUNDS} rounds each way in turns; {slow_s3.puts_held} uploads held for {HOLD_PUT_S * 1000:.0f} ms", flush=True)
