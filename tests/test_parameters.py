"""Declared parameters: what a request may say, and how every refusal names the parameter, its value, the range and the nearest."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from comfy_workflows.catalog import Catalog, Filled, Workflow
from comfy_workflows.errors import FamilyMismatch, InvalidParameter, UnknownBaseModel, UnknownParameter, WorkflowError, shorten
from comfy_workflows.parameters import MAX_SEED, Parameter

FLUX: Workflow = Catalog.load().get("flux")
TEXT = "text of 1 to 10000 characters without NUL or unpaired surrogates"


def fill(default_base_model: str = "tinyflux", **params: Any) -> Filled:
    return FLUX.fill({"prompt": "x", **params}, default_base_model=default_base_model, draw_seed=lambda: 424242)


def test_an_empty_request_is_filled_with_the_base_models_defaults() -> None:
    filled = fill("flux1-schnell")
    assert filled.values == {
        "prompt": "x",
        "negative_prompt": "",
        "width": 1024,
        "height": 1024,
        "steps": 4,
        "guidance_scale": 0.0,
        "true_cfg_scale": 1.0,
        "seed": 424242,
        "num_images": 1,
        "sampler": "euler",
        "scheduler": "simple",
        "output_format": "png",
        "quality": 90,
    }
    assert (filled.workflow, filled.base_model.name, filled.loras) == ("flux", "flux1-schnell", ())
    assert json.loads(json.dumps(filled.values)) == filled.values


def test_the_requests_base_model_wins_over_the_default_and_sets_the_defaults() -> None:
    filled = fill(base_model="flux1-schnell", guidance_scale=2)
    assert (filled.base_model.name, filled.values["steps"], filled.values["guidance_scale"]) == ("flux1-schnell", 4, 2.0)


@pytest.mark.parametrize(("given_seed", "seed"), [(-1, 424242), (0, 0), (MAX_SEED, MAX_SEED)])
def test_a_seed_is_drawn_only_when_it_is_minus_one_or_absent(given_seed: int, seed: int) -> None:
    assert fill(seed=given_seed).values["seed"] == seed


def test_loras_keep_their_order_and_weigh_one_by_default() -> None:
    loras = fill(loras=[{"name": "b", "weight": -0.5}, {"name": "a"}]).loras
    assert [(lora.name, lora.weight) for lora in loras] == [("b", -0.5), ("a", 1.0)]


# (request field, value, what is allowed, the nearest allowed)
REFUSED: list[tuple[str, Any, Any, Any]] = [
    ("width", 1000, "an integer from 256 to 2048 in steps of 16", 1008),
    ("width", 255, "an integer from 256 to 2048 in steps of 16", 256),
    ("width", 10**9, "an integer from 256 to 2048 in steps of 16", 2048),
    ("width", "1024", "an integer from 256 to 2048 in steps of 16", None),
    ("width", 1024.0, "an integer from 256 to 2048 in steps of 16", 1024),
    ("width", True, "an integer from 256 to 2048 in steps of 16", None),
    ("width", None, "an integer from 256 to 2048 in steps of 16", None),
    ("steps", 0, "an integer from 1 to 100", 1),
    ("num_images", 9, "an integer from 1 to 8", 8),
    ("guidance_scale", 31.5, "a number from 0.0 to 30.0", 30.0),
    ("guidance_scale", float("nan"), "a number from 0.0 to 30.0", None),
    ("guidance_scale", float("inf"), "a number from 0.0 to 30.0", 30.0),
    ("guidance_scale", "3.5", "a number from 0.0 to 30.0", None),
    ("guidance_scale", False, "a number from 0.0 to 30.0", None),
    ("seed", -2, f"an integer from 0 to {MAX_SEED}, or -1 to draw one", None),
    ("seed", MAX_SEED + 1, f"an integer from 0 to {MAX_SEED}, or -1 to draw one", None),
    ("seed", True, f"an integer from 0 to {MAX_SEED}, or -1 to draw one", None),
    ("output_format", "WEBP", ["png", "webp", "jpeg"], "webp"),
    ("output_format", 5, ["png", "webp", "jpeg"], None),
    ("prompt", "", TEXT, None),
    ("prompt", "a\0b", TEXT, None),
    ("prompt", ["a"], TEXT, None),
    ("base_model", 7, ["flux1-dev", "flux1-dev-fp8", "flux1-schnell", "tinyflux"], None),
    ("loras", "style", "a list of 0 to 8 LoRAs, none twice, each {name, weight}", None),
]


@pytest.mark.parametrize(("name", "value", "allowed", "nearest"), REFUSED)
def test_a_refused_value_is_named_with_what_is_allowed(name: str, value: Any, allowed: Any, nearest: Any) -> None:
    with pytest.raises(InvalidParameter) as caught:
        fill(**{name: value})
    details = caught.value.details
    assert caught.value.code == "invalid_parameter"
    assert (details["parameter"], details["allowed"], details["nearest"]) == (name, allowed, nearest)
    assert f"'{name}'" in caught.value.message
    assert len(details["parameters"]) == 1
    encode(caught.value)


def encode(error: WorkflowError) -> bytes:
    """As an HTTP answer would carry it: strict JSON in UTF-8."""
    return json.dumps(
        {"message": error.message, "hint": error.hint, "details": error.details}, allow_nan=False, ensure_ascii=False
    ).encode()


@pytest.mark.parametrize(
    ("loras", "parameter", "nearest"),
    [
        ([{"name": "a"}, {"name": "a", "weight": 0.5}], "loras", None),
        ([{"name": str(number)} for number in range(9)], "loras", None),
        (["style"], "loras[0]", None),
        ([{"weight": 1.0}], "loras[0].name", None),
        ([{"name": ""}], "loras[0].name", None),
        ([{"name": "a\0"}], "loras[0].name", None),
        ([{"name": "a"}, {"name": "b", "weight": 5}], "loras[1].weight", 4.0),
        ([{"name": "a", "weight": "1"}], "loras[0].weight", None),
        ([{"name": "a", "weight": float("nan")}], "loras[0].weight", None),
    ],
)
def test_a_refused_lora_is_named_by_its_place(loras: list[Any], parameter: str, nearest: Any) -> None:
    with pytest.raises(InvalidParameter) as caught:
        fill(loras=loras)
    assert (caught.value.details["parameter"], caught.value.details["nearest"]) == (parameter, nearest)
    assert caught.value.details["allowed"]
    encode(caught.value)


@pytest.mark.parametrize(
    ("params", "parameter", "nearest"),
    [
        ({"stpes": 5}, "stpes", "steps"),
        ({"Prompt2": 5}, "Prompt2", "prompt"),
        ({"zzzzzz": 5}, "zzzzzz", None),
        ({"loras": [{"name": "a", "wieght": 1.0}]}, "loras[0].wieght", "weight"),
        ({"\ud800": 1}, "\\ud800", None),
        ({"loras": [{"name": "a", "\ud800": 1.0}]}, "loras[0].\\ud800", None),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_known(params: dict[str, Any], parameter: str, nearest: str | None) -> None:
    with pytest.raises(UnknownParameter) as caught:
        fill(**params)
    assert caught.value.code == "unknown_parameter"
    assert (caught.value.details["parameter"], caught.value.details["nearest"]) == (parameter, nearest)
    assert caught.value.hint == (f"did you mean '{nearest}'?" if nearest else None)
    encode(caught.value)


def test_all_faults_are_reported_at_once_with_the_first_on_top() -> None:
    with pytest.raises(InvalidParameter) as caught:
        FLUX.fill({"width": 1000, "stpes": 3, "loras": [{}]}, default_base_model="tinyflux", draw_seed=lambda: 0)
    details = caught.value.details
    assert [(fault["code"], fault["parameter"]) for fault in details["parameters"]] == [
        ("invalid_parameter", "prompt"),
        ("invalid_parameter", "width"),
        ("invalid_parameter", "loras[0].name"),
        ("unknown_parameter", "stpes"),
    ]
    assert details["parameter"] == "prompt"
    assert caught.value.message == f"'prompt' is missing; allowed is {TEXT} (and 3 more)"


def test_thousands_of_faults_give_a_short_answer() -> None:
    with pytest.raises(UnknownParameter) as caught:
        fill(**{f"x{number}": "y" * 1000 for number in range(3000)})
    assert caught.value.message.endswith("(and 2999 more)")
    assert len(encode(caught.value)) < 50_000


@pytest.mark.parametrize("prompt", ["x" * 100_000, "\ud83d", "lone \udc00 low"], ids=["long", "high", "low"])
def test_texts_that_cannot_travel_are_refused_in_a_short_encodable_answer(prompt: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        fill(prompt=prompt)
    assert caught.value.details["parameter"] == "prompt"
    assert len(encode(caught.value)) < 2000


def test_lengths_and_positions_are_said() -> None:
    with pytest.raises(InvalidParameter) as caught:
        fill(prompt="é" * 10_001)
    assert caught.value.message == f"'prompt' has 10001 characters; allowed is {TEXT}"
    with pytest.raises(InvalidParameter, match="'negative_prompt' holds a NUL at index 2"):
        fill(negative_prompt="ab\0")
    with pytest.raises(InvalidParameter, match="'prompt' holds an unpaired surrogate"):
        fill(prompt="\ud800")


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=300))
def test_any_other_text_is_kept_as_it_is(text: str) -> None:
    assert fill(prompt=text, negative_prompt=text).values["prompt"] == text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(), max_size=9), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from([*FLUX.parameters, "loras", "base_model"]) | st.text(st.characters(), max_size=9), json_values, max_size=5
    )
)
def test_whatever_json_is_sent_the_answer_is_a_filled_request_or_an_encodable_error(params: dict[str, Any]) -> None:
    try:
        filled = FLUX.fill(params, default_base_model="tinyflux", draw_seed=lambda: 0)
    except WorkflowError as error:
        encode(error)
    else:
        assert filled.values.keys() == FLUX.parameters.keys()


def test_an_unknown_base_model_names_the_nearest() -> None:
    with pytest.raises(UnknownBaseModel) as caught:
        fill(base_model="flux-dev")
    assert (caught.value.code, caught.value.details["nearest"], caught.value.details["value"]) == (
        "base_model_not_found",
        "flux1-dev",
        "flux-dev",
    )
    assert caught.value.hint == "did you mean 'flux1-dev'?"


@pytest.mark.parametrize(
    "value",
    [10**5000, [[[[[[[[1]]]]]]]], {"a": "x" * 10_000}, float("-inf"), "\ud800" * 1000, "x" * 1000],
    ids=["huge", "deep", "wide", "inf", "surrogates", "long"],
)
def test_a_shortened_value_is_short_and_encodable(value: Any) -> None:
    assert len(json.dumps(shorten(value), allow_nan=False, ensure_ascii=False).encode()) < 2500


def test_a_base_model_of_another_family_is_refused_with_both_names() -> None:
    other = Catalog.load().base_model("tinyflux").model_copy(update={"name": "sd3", "family": "sd3"})
    only_flux = FLUX.__class__(**{**FLUX.__dict__, "base_models": {**FLUX.base_models, "sd3": other}})
    with pytest.raises(FamilyMismatch) as caught:
        only_flux.fill({"prompt": "x", "base_model": "sd3"}, default_base_model="tinyflux", draw_seed=lambda: 0)
    assert caught.value.code == "family_mismatch"
    assert caught.value.message == "base model \"sd3\" belongs to family 'sd3', but workflow 'flux' needs 'flux1' or 'tinyflux'"
    assert caught.value.details["parameter"] == "base_model"


def test_the_schema_says_what_the_validation_does() -> None:
    schema = FLUX.json_schema()
    width = schema["properties"]["width"]
    assert (width["minimum"], width["maximum"], width["multipleOf"], width["default"], width["type"]) == (256, 2048, 16, 1024, "integer")
    assert schema["required"] == ["prompt"]
    assert schema["additionalProperties"] is False
    assert schema["examples"] == [FLUX.example]
    assert schema["properties"]["prompt"]["maxLength"] == 10_000
    assert schema["properties"]["sampler"]["enum"] == list(FLUX.parameters["sampler"].choices)
    assert schema["properties"]["base_model"]["enum"] == ["flux1-dev", "flux1-dev-fp8", "flux1-schnell", "tinyflux"]
    assert schema["properties"]["loras"]["maxItems"] == 8
    assert all(declared["description"] for declared in schema["properties"].values())
    assert not {"steps", "guidance_scale", "seed", "base_model"} & {name for name, one in schema["properties"].items() if "default" in one}
    schema["properties"].clear()
    assert FLUX.json_schema()["properties"]


@pytest.mark.parametrize(
    ("declaration", "says"),
    [
        ({"name": "Width", "type": "integer"}, "pattern"),
        ({"name": "loras", "type": "string"}, "reserved"),
        ({"name": "job_id", "type": "string"}, "reserved"),
        ({"name": "lambda", "type": "string"}, "reserved"),
        ({"name": "copy", "type": "string"}, "reserved"),
        ({"name": "x", "type": "picture"}, "'string', 'integer'"),
        ({"name": "x", "type": "image", "default": "a"}, "an image has no default"),
        ({"name": "x", "type": "image", "maximum": 5}, "it may have mask_of, max_pixels, multiple_of"),
        ({"name": "x", "type": "image", "mask_of": "y", "max_pixels": 5000}, "a mask has the limits of its picture"),
        ({"name": "x", "type": "string", "maximum": 5}, "a string has no maximum; it may have max_length, min_length"),
        ({"name": "x", "type": "number", "multiple_of": 5}, "a number has no multiple_of"),
        ({"name": "x", "type": "boolean", "choices": ["a"]}, "it may have no limits"),
        ({"name": "x", "type": "choice"}, "a choice needs choices"),
        ({"name": "x", "type": "seed", "default": 5}, "a seed has no default"),
        ({"name": "x", "type": "integer", "maximum": 5, "default": 6}, "the default 6 is not allowed"),
        ({"name": "x", "type": "choice", "choices": ["a"], "default": "b"}, 'the default "b" is not allowed'),
        ({"name": "x", "type": "integer", "minimun": 5}, "Extra inputs"),
    ],
)
def test_a_wrong_declaration_is_refused(declaration: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Parameter.model_validate(declaration)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("declaration", "words"),
    [
        ({"type": "integer"}, "an integer"),
        ({"type": "integer", "minimum": 3}, "an integer from 3 upwards"),
        ({"type": "number", "maximum": 3}, "a number from the lowest to 3"),
        ({"type": "boolean"}, "true or false"),
        ({"type": "string"}, "text without NUL or unpaired surrogates"),
    ],
)
def test_limits_are_put_into_words(declaration: dict[str, Any], words: str) -> None:
    assert Parameter.model_validate({"name": "x", **declaration}).describe() == words


IMG2IMG: Workflow = Catalog.load().get("flux-img2img")
PICTURES = ["3f0c6c1e-9d7e-4f3a-8f55-0a4d1f6b2c11", "https://example.com/a.png?x=1", "data:image/png;base64,iVBORw0KGgo="]
NO_PICTURES = ["", "../../etc/passwd", "/etc/passwd", "a/b.png", "file:///etc/passwd", "data:image/svg+xml;base64,PHN2Zz4=", "x y", "ftp://a/b.png",
               "a" * 101, "https://a/" + "x" * 5000, "https://a/\0", "data:text/html,x"]  # fmt: skip


@pytest.mark.parametrize("given", PICTURES)
def test_a_picture_is_named_in_one_of_three_ways(given: str) -> None:
    filled = IMG2IMG.fill({"prompt": "x", "image": given}, default_base_model="tinyflux", draw_seed=lambda: 0)
    assert filled.values["image"] == given


@pytest.mark.parametrize("given", [*NO_PICTURES, None, 5, ["a"]])
def test_what_names_no_picture_is_refused(given: Any) -> None:
    with pytest.raises(InvalidParameter) as caught:
        IMG2IMG.fill({"prompt": "x", "image": given}, default_base_model="tinyflux", draw_seed=lambda: 0)
    details = caught.value.details
    assert details["parameter"] == "image"
    assert "an upload's id, an https URL, or a data URL" in details["allowed"]
    assert len(str(details["value"])) <= 200


def test_a_mask_may_be_left_out_and_its_picture_may_not() -> None:
    fill_workflow = Catalog.load().get("flux-fill")
    assert [image.name for image in fill_workflow.images] == ["image", "mask"]
    filled = fill_workflow.fill({"prompt": "x", "image": "a"}, default_base_model="tinyflux", draw_seed=lambda: 0)
    assert filled.values["mask"] is None
    assert fill_workflow.json_schema()["required"] == ["prompt", "image"]
    with pytest.raises(InvalidParameter) as caught:
        fill_workflow.fill({"prompt": "x", "mask": "a"}, default_base_model="tinyflux", draw_seed=lambda: 0)
    assert caught.value.details["parameter"] == "image"
