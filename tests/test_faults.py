"""What a failed prompt is called, and that no path, tensor or graph leaves with it."""

from __future__ import annotations

import pytest

from gateway.comfy.messages import ErrorData, ExecutionError
from gateway.dispatch.faults import clean, describe_node_error, describe_rejection
from gateway.errors import PromptRejected
from tests.test_messages import read

GRAPH = {"5": {"class_type": "ProbeSteps", "inputs": {}, "_meta": {"title": "Sample"}}, "9": {"class_type": "SaveImage", "inputs": {}}}


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("probe failure d\n", "probe failure d"),
        ("No such file: '/opt/models/loras/style.safetensors'", "No such file: 'style.safetensors'"),
        ("No such file: '/home/me/my models/x.safetensors'", "No such file: 'x.safetensors'"),
        (r"cannot open C:\Users\me\models\x.png now", "cannot open x.png now"),
        ("'/a/b.png' and '/c/d.png' differ", "'b.png' and 'd.png' differ"),
        ("first\n\nsecond paragraph", "first"),
        ("out of memory\nTips: buy more", "out of memory"),
        ("1 / 2 is not an integer", "1 / 2 is not an integer"),
        ("steps must be <= 100", "steps must be <= 100"),
        ("", ""),
    ],
)
def test_a_message_keeps_its_words_and_loses_its_paths(said: str, kept: str) -> None:
    assert clean(said) == kept


def test_a_message_is_cut() -> None:
    assert len(clean("x" * 100_000)) <= 500


def test_a_recorded_error_names_the_node_and_hides_the_rest() -> None:
    [error] = [message for message in read("error") if isinstance(message, ExecutionError)]
    described = describe_node_error(error.data, GRAPH)
    assert described.code == "node_error"
    assert described.message == "'Sample' (ProbeSteps) failed: probe failure d"
    assert described.details == {"node": "Sample", "node_class": "ProbeSteps", "node_id": "5", "exception": "ValueError"}
    text = described.model_dump_json()
    for secret in ("tensor", "/opt", "traceback", "current_inputs"):
        assert secret not in text


@pytest.mark.parametrize(
    ("exception", "said"),
    [
        ("torch.OutOfMemoryError", "Allocation on device"),
        ("torch.cuda.OutOfMemoryError", "Tried to allocate 2 GiB"),
        ("RuntimeError", "CUDA error: out of memory"),
    ],
)
def test_memory_that_ran_out_is_told_apart(exception: str, said: str) -> None:
    described = describe_node_error(ErrorData(node_id="5", node_type="ProbeSteps", exception_type=exception, exception_message=said), GRAPH)
    assert described.code == "out_of_memory"
    assert described.hint


def test_an_error_without_a_node_is_still_told() -> None:
    described = describe_node_error(ErrorData(exception_message="broke"), GRAPH)
    assert described.code == "node_error"
    assert "broke" in described.message


def test_a_rejection_names_node_input_and_reason() -> None:
    report = {
        "5": {
            "class_type": "ProbeSteps",
            "errors": [
                {
                    "type": "value_not_in_list",
                    "message": "Value not in list",
                    "details": "name: '/opt/models/x.safetensors' not in ['other-callers.safetensors']",
                    "extra_info": {"input_name": "name", "input_config": ["secret"]},
                }
            ],
        }
    }
    described = describe_rejection(PromptRejected("Prompt outputs failed validation", node_errors=report), GRAPH)
    assert described.code == "graph_rejected"
    assert described.details["nodes"] == [
        {
            "node": "Sample",
            "node_id": "5",
            "node_class": "ProbeSteps",
            "problem": "value_not_in_list",
            "input": "name",
            "message": "name: 'x.safetensors' is not there",
        }
    ]
    assert "'Sample'" in described.message
    assert "value_not_in_list" in described.message
    assert not {"secret", "other-callers"} & set(described.model_dump_json().replace("'", ".").split("."))


def test_a_rejection_that_blames_no_node_says_what_it_can() -> None:
    assert "Prompt has no outputs" in describe_rejection(PromptRejected("Prompt has no outputs"), GRAPH).message
