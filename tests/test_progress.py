"""From recorded messages to what a person sees: nodes done, the node at work, steps, and a bar that only grows."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gateway.comfy.messages import Message, parse_text
from gateway.dispatch.progress import ProgressTracker
from gateway.jobs.model import Progress
from tests.test_messages import read

GRAPH: dict[str, Any] = {
    "1": {"class_type": "EmptyImage", "inputs": {}},
    "5": {"class_type": "ProbeSteps", "inputs": {"steps": 4}, "_meta": {"title": "Sample"}},
    "9": {"class_type": "SaveImage", "inputs": {}},
}


def say(kind: str, **data: Any) -> Message:
    message = parse_text(json.dumps({"type": kind, "data": {"prompt_id": "p", **data}}))
    assert message is not None, f"{kind} {data} is not understood"
    return message


def track(messages: list[Message], graph: dict[str, Any] | None = None) -> tuple[ProgressTracker, list[Progress]]:
    tracker = ProgressTracker(GRAPH if graph is None else graph)
    return tracker, [shown for at, message in enumerate(messages) if (shown := tracker.apply(message, at * 100)) is not None]


def test_a_recorded_run_is_shown_step_by_step() -> None:
    tracker, shown = track(read("steps"))
    steps = [(progress.step, progress.steps) for progress in shown if progress.step is not None]
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert {progress.current_node for progress in shown if progress.step} == {"Sample"}, "a node is called by its title"
    assert shown[0].nodes_done == 1, "what was cached is done"
    values = [progress.value for progress in shown]
    assert values == sorted(values)
    assert 0 < values[0] < values[-1] <= 1
    assert tracker.completed() == Progress(value=1.0, nodes_done=3, nodes_total=3)


def test_a_cached_run_is_done_at_once() -> None:
    _, shown = track(read("cached"), {"1": GRAPH["1"], "9": GRAPH["9"]})
    assert [(progress.nodes_done, progress.value) for progress in shown] == [(2, 1.0)]


def test_an_untitled_node_is_called_by_its_class() -> None:
    _, [shown] = track([say("executing", node="9")])
    assert (shown.current_node, shown.current_node_class) == ("SaveImage", "SaveImage")


def test_nodes_that_comfyui_made_itself_do_not_count() -> None:
    _, shown = track([say("executing", node="5"), say("executing", node="5.0.1"), say("progress", node="5.0.1", value=1, max=2)])
    assert shown[-1].nodes_done <= 1
    assert shown[-1].value < 1


def test_loading_time_is_that_of_the_loaders() -> None:
    graph = {"u": {"class_type": "UNETLoader", "inputs": {}}, "l": {"class_type": "LoraLoaderModelOnly", "inputs": {}}, **GRAPH}
    tracker, _ = track([say("executing", node=node) for node in ("u", "l", "5", "9", None)], graph)
    assert tracker.load_ms == 200


def test_an_empty_progress_divides_by_nothing() -> None:
    _, [_, shown] = track([say("executing", node="5"), say("progress", node="5", value=0, max=0)])
    assert 0 <= shown.value <= 1


_nodes = st.sampled_from(["1", "5", "9", "5.0.1"])
_said = st.one_of(
    st.builds(lambda node: say("executing", node=node), _nodes | st.none()),
    st.builds(lambda nodes: say("execution_cached", nodes=nodes), st.lists(_nodes)),
    st.builds(lambda value, extra: say("progress", value=value, max=value + extra), st.integers(0, 9), st.integers(0, 9)),
    st.builds(
        lambda node, state: say("progress_state", nodes={node: {"state": state, "value": 1, "max": 1}}),
        _nodes,
        st.sampled_from(["running", "finished"]),
    ),
)


@given(st.lists(_said, max_size=30))
def test_whatever_is_said_the_bar_stays_within_its_ends(messages: list[Message]) -> None:
    _, shown = track(messages)
    for progress in shown:
        assert 0 <= progress.value <= 1
        assert 0 <= progress.nodes_done <= progress.nodes_total == 3


def test_the_bar_of_an_orderly_run_never_goes_back() -> None:
    messages: list[Message] = [say("execution_cached", nodes=["1"])]
    for node, steps in (("5", 4), ("9", 1)):
        messages.append(say("executing", node=node))
        for step in range(1, steps + 1):
            messages.append(say("progress_state", nodes={node: {"state": "running", "value": step, "max": steps}}))
            messages.append(say("progress", node=node, value=step, max=steps))
        messages.append(say("progress_state", nodes={node: {"state": "finished", "value": steps, "max": steps}}))
    values = [progress.value for progress in track(messages)[1]]
    assert values == sorted(values)
    assert values[-1] == 1.0
