"""`python -m comfy_workflows check [FOLDER...]`: says line by line what is wrong with workflow folders."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from comfy_workflows.catalog import PACKAGE_FOLDER, collect_base_models, find_workflow_folders
from comfy_workflows.errors import BrokenWorkflow
from comfy_workflows.folder_check import Report, check_folder


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 when every folder is sound, 1 when one is not, 2 when the command itself makes no sense."""
    options = _parse(arguments)
    folders: list[Path] = options.folders or [PACKAGE_FOLDER]
    try:
        object_info = _read_object_info(options.object_info) if options.object_info else None
        base_models = collect_base_models(PACKAGE_FOLDER, *folders)
        found = [(folder, find_workflow_folders(folder)) for folder in folders]
    except BrokenWorkflow as error:
        print(*error.details["problems"], sep="\n")
        return 1
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    is_sound = True
    for folder, workflows in found:
        if not workflows:
            print(f"{folder}: no workflow here; a workflow is a folder with graph.json, bindings.toml and example.json")
            is_sound = False
        for path in workflows:
            report = check_folder(path.resolve(), base_models, object_info)
            print(*_write_report(report), sep="\n")
            is_sound = is_sound and not report.problems
    return 0 if is_sound else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m comfy_workflows", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="check workflow folders, by default those of this package")
    check.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="a workflow folder, or a folder of workflow folders")
    check.add_argument(
        "--object-info", type=Path, metavar="FILE", help="the answer of a ComfyUI's GET /object_info, to check nodes against"
    )
    return parser.parse_args(arguments)


def _read_object_info(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not all(isinstance(entry, dict) and "input" in entry for entry in content.values()):
        raise ValueError(f"{path}: not an answer of GET /object_info")
    return content


def _write_report(report: Report) -> Iterator[str]:
    name = report.folder.name
    for problem in report.problems:
        yield f"{name}: {problem}"
    if report.hint:
        yield f"{name}: what to do: {report.hint}"
    for note in report.notes:
        yield f"{name}: note: {note}"
    if report.workflow and not report.problems:
        workflow = report.workflow
        counts = (
            f"{len(workflow.parameters)} parameters, {len(workflow.bindings)} bindings, {len(workflow.fitting_base_models())} base models"
        )
        yield f"{name}: sound, version {workflow.version} ({counts})"


if __name__ == "__main__":
    sys.exit(main())
