"""The engine's pure parts: order, signatures, names of files, and the frames of the socket."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from local.engine.cache import CacheEntry, NodeCache, sign_nodes
from local.engine.folders import ModelFileMissing, ModelFolders, OutsideOutputFolder, reserve_save_path
from local.engine.frames import encode_picture, pack_picture, pack_picture_with_metadata
from local.engine.nodes import NodeClasses, builtin_nodes
from local.engine.ordering import DependencyCycle, ExecutionOrder
from local.engine.prompt_queue import DuplicatePrompt, Prompt, PromptQueue
from local.engine.validation import validate_graph

RECORDED_RUNS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "data" / "comfyui" / "execution_order.json").read_text())


@pytest.fixture
def folders(tmp_path: Path) -> ModelFolders:
    made = ModelFolders(tmp_path)
    made.prepare()
    return made


@pytest.fixture(scope="module")
def classes() -> NodeClasses:
    return builtin_nodes()


def put_in_order(graph: dict[str, Any], outputs: list[str], cached: list[str]) -> list[str]:
    order = ExecutionOrder(
        graph,
        outputs,
        is_cached=lambda node_id: node_id in cached,
        is_output=lambda node_id: graph[node_id]["class_type"] == "SaveImage",
        declared_inputs=lambda node_id: set(graph[node_id]["inputs"]),
    )
    ran = []
    while (node_id := order.next()) is not None:
        ran.append(node_id)
        order.done(node_id)
    return ran


@pytest.mark.parametrize("run", RECORDED_RUNS, ids=lambda run: run["name"])
def test_nodes_run_in_the_order_of_a_real_comfyui(run: dict[str, Any]) -> None:
    assert put_in_order(run["graph"], ["9"], run["cached"]) == run["executing"]


def test_a_cycle_is_named() -> None:
    graph = {
        "1": {"class_type": "A", "inputs": {"x": ["2", 0]}},
        "2": {"class_type": "A", "inputs": {"x": ["1", 0]}},
    }
    with pytest.raises(DependencyCycle, match="1, 2"):
        put_in_order(graph, ["1"], [])


def chain(color: int, prefix: str = "a", names: tuple[str, str] = ("1", "9")) -> dict[str, Any]:
    picture, save = names
    return {
        picture: {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": color}},
        save: {"class_type": "SaveImage", "inputs": {"images": [picture, 0], "filename_prefix": prefix}},
    }


def test_signatures_follow_inputs_and_ancestry_but_not_ids(classes: NodeClasses, folders: ModelFolders) -> None:
    plain = sign_nodes(chain(1), classes, folders)
    assert list(sign_nodes(chain(1, names=("x", "y")), classes, folders).values()) == list(plain.values())
    other_prefix = sign_nodes(chain(1, prefix="b"), classes, folders)
    assert (other_prefix["1"] == plain["1"], other_prefix["9"] == plain["9"]) == (True, False)
    other_color = sign_nodes(chain(2), classes, folders)
    assert (other_color["1"] == plain["1"], other_color["9"] == plain["9"]) == (False, False)


def test_what_cannot_be_signed_never_repeats(classes: NodeClasses, folders: ModelFolders) -> None:
    graph = {"1": {"class_type": "LoadImage", "inputs": {"image": "absent.png"}}, **chain(1, names=("2", "9"))}
    graph["9"]["inputs"]["images"] = ["1", 0]
    first, second = (sign_nodes(graph, classes, folders) for _ in range(2))
    assert first["2"] == second["2"]
    assert first["1"] != second["1"]
    assert first["9"] != second["9"]


def test_the_classic_cache_keeps_instances_of_the_last_prompt_only(classes: NodeClasses) -> None:
    cache = NodeCache("classic")
    node = classes["EmptyImage"]
    cache.open_prompt({"1": "key"}, [("1", node)])
    cache.put("1", CacheEntry((1,), None, {}))
    kept = cache.instance("1", node)
    cache.open_prompt({"7": "key"}, [("1", node)])
    assert cache.get("7") == CacheEntry((1,), None, {})
    assert cache.instance("1", node) is kept
    cache.open_prompt({}, [])
    cache.open_prompt({"1": "key"}, [("1", node)])
    assert cache.get("1") is None
    assert cache.instance("1", node) is not kept


def prompt(number: float, prompt_id: str) -> Prompt:
    return (number, prompt_id, {}, {}, ["9"])


def test_history_drops_the_oldest_above_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("local.engine.prompt_queue.HISTORY_LIMIT", 3)
    queue = PromptQueue(lambda: None)
    for number in range(5):
        queue.put(prompt(number, f"p{number}"))
        queue.take()
        queue.finish({"outputs": {}})
    assert list(queue.history()) == ["p2", "p3", "p4"]


def test_a_twin_is_queued_and_reported() -> None:
    queue = PromptQueue(lambda: None)
    queue.put(prompt(1, "a"))
    with pytest.raises(DuplicatePrompt, match="'a'"):
        queue.put(prompt(1, "a"))
    assert queue.remaining() == 2


def test_models_are_found_by_name_and_not_outside(folders: ModelFolders, tmp_path: Path) -> None:
    (tmp_path / "models" / "clip").mkdir()
    (tmp_path / "models" / "clip" / "l.safetensors").touch()
    (tmp_path / "secret.safetensors").touch()
    assert folders.names("text_encoders") == ["l.safetensors"]
    assert folders.path("text_encoders", "l.safetensors") == tmp_path / "models" / "clip" / "l.safetensors"
    with pytest.raises(ModelFileMissing, match=r"no file '../../secret\.safetensors' in the model folder 'loras'"):
        folders.path("loras", "../../secret.safetensors")


def test_save_paths_count_on_and_stay_inside(tmp_path: Path) -> None:
    for name in ("image_00007_.png", "image_abc_.png", "image_x_00099_.png", "other_00100_.png"):
        (tmp_path / name).touch()
    assert reserve_save_path(tmp_path, "image") == (tmp_path, "image", 8, "")
    assert reserve_save_path(tmp_path, "a/b/image") == (tmp_path / "a" / "b", "image", 1, "a/b")
    for prefix in ("../x", "/etc/x", "a/../../x"):
        with pytest.raises(OutsideOutputFolder, match="outside the output folder"):
            reserve_save_path(tmp_path, prefix)


def test_frames_have_the_recorded_layout() -> None:
    picture = Image.new("RGB", (8, 4), (255, 0, 0))
    kind, data = encode_picture(picture, full_size=False)
    assert pack_picture(kind, data)[:12].hex() == "0000000100000001ffd8ffe0"
    kind, data = encode_picture(picture, full_size=True)
    assert pack_picture(kind, data)[:12].hex() == "000000010000000289504e47"
    frame = pack_picture_with_metadata(kind, data, {"node_id": "9"})
    header = b'{"node_id": "9", "image_type": "image/png"}'
    assert frame == bytes([0, 0, 0, 4, 0, 0, 0, len(header)]) + header + data


def test_long_lists_of_choices_are_not_sent_back(classes: NodeClasses, folders: ModelFolders) -> None:
    for number in range(21):
        (folders.base / "models" / "loras" / f"{number}.safetensors").touch()
    graph: dict[str, Any] = {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "absent", "weight_dtype": "default"}},
        "2": {"class_type": "LoraLoaderModelOnly", "inputs": {"model": ["1", 0], "lora_name": "absent", "strength_model": 1}},
        "3": {"class_type": "KSampler", "inputs": {"model": ["2", 0]}},
        "4": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["5", 0]}},
        "5": {"class_type": "VAELoader", "inputs": {"vae_name": "absent"}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["4", 0], "filename_prefix": "x"}},
    }
    (error,) = validate_graph(graph, None, classes, folders).node_errors["2"]["errors"]
    assert error["details"] == "lora_name: 'absent' not in (list of length 21)"
    assert error["extra_info"]["input_config"] is None
