"""A filled request becomes the final graph. Values are set on parsed JSON leaf by leaf; no text is ever pasted into JSON."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from comfy_workflows.errors import BrokenWorkflow, FamilyMismatch
from comfy_workflows.expressions import ExpressionError
from comfy_workflows.graph import Graph, chain_loras, copy_graph, prune
from comfy_workflows.workflow import Filled, Workflow


@dataclass(frozen=True)
class LoraFile:
    """A LoRA that has been found: `file` as ComfyUI lists it; `family` None means unknown and fits everything."""

    name: str
    file: str
    weight: float
    family: str | None = None


def render(workflow: Workflow, filled: Filled, *, job_id: str, loras: Sequence[LoraFile] = ()) -> Graph:
    """The graph to submit: bindings set, LoRAs chained in the given order, unused nodes gone, titles kept.

    Raises FamilyMismatch when a LoRA is made for another family, BrokenWorkflow when a binding cannot be evaluated.
    """
    for lora in loras:
        _require_family(lora, filled)
    graph = copy_graph(workflow.graph)
    context: dict[str, Any] = {**filled.values, "job_id": job_id, "base_model": filled.base_model, "lora_count": len(loras)}
    for binding in workflow.bindings:
        try:
            graph[binding.node_id]["inputs"][binding.input] = binding.evaluate(context)
        except ExpressionError as error:
            raise BrokenWorkflow(workflow.name, [f"bindings.toml: {binding.target!r}: {error}"]) from error
    if workflow.lora_node_id is not None:
        graph = chain_loras(graph, workflow.lora_node_id, [(lora.file, lora.weight) for lora in loras])
    elif loras:
        raise BrokenWorkflow(workflow.name, [f"has no LoRA node, but was given {len(loras)} LoRAs"])
    return prune(graph, output_ids=workflow.output_ids)


def _require_family(lora: LoraFile, filled: Filled) -> None:
    family = filled.base_model.family
    if lora.family is not None and lora.family not in (family, *filled.base_model.lora_families):
        hint = f"choose a base model of family {lora.family!r}, or a LoRA trained for {family!r}"
        raise FamilyMismatch("LoRA", lora.name, lora.family, wanted_by=f"base model {filled.base_model.name!r}", wanted=[family], hint=hint)
