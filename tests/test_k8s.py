"""The manifests against the code they describe, and against kustomize and the cluster's schemas where these are at hand."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from docs.generate import read_openapi
from gateway.__main__ import STOP_S
from gateway.gauges import StateGauges, build_metrics_app
from gateway.models.command import _parse as parse_models_command
from gateway.settings import Settings
from gateway.telemetry import Metrics
from tests.docker_files import DOCKER, find_program, list_containers, list_manifests, read_compose, read_dockerfile, read_versions
from trainer_worker.process import KILL_GRACE_S, TERMINATE_GRACE_S, Limits

K8S = DOCKER / "k8s"
OVERLAYS = ("dev", "gpu", "public")
BASE = list_manifests("base")
BASE_TAGS = {image["name"]: image["newTag"] for image in yaml.safe_load((K8S / "base" / "kustomization.yaml").read_text())["images"]}
SETTING_NAMES = {name.upper() for name in Settings.model_fields}
OURS = ("gateway", "dispatcher", "trainer")


def find(kind: str, name: str) -> dict[str, Any]:
    (found,) = (thing for thing in BASE if (thing["kind"], thing["metadata"]["name"]) == (kind, name))
    return found


def get_containers() -> dict[str, dict[str, Any]]:
    return {container["name"]: container for thing in BASE for container in list_containers(thing)}


def test_every_file_is_part_of_something() -> None:
    for folder in [K8S / "base", *(K8S / "overlays" / name for name in OVERLAYS)]:
        listed = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
        files = {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}
        assert files == {name for name in listed if name.endswith(".yaml")}, folder


def test_what_the_manifests_set_are_settings() -> None:
    containers = get_containers()
    assert set(containers) == {*OURS, "comfyui"}
    for name in OURS:
        given = {variable["name"]: variable for variable in containers[name].get("env", [])}
        assert not set(given) - SETTING_NAMES - {"POD_IP"}, name
        assert {"configMapRef": {"name": "settings"}} in containers[name]["envFrom"]
        values = {variable: entry["value"] for variable, entry in given.items() if "value" in entry and "$(" not in entry["value"]}
        Settings.model_validate({variable.lower(): value for variable, value in values.items()})
    assert not set(find("ConfigMap", "settings")["data"]) - SETTING_NAMES
    secret = yaml.safe_load((K8S / "secret.example.yaml").read_text())
    assert not {name.upper() for name in secret["stringData"]} - SETTING_NAMES
    mounted = {
        volume["name"]: volume for thing in BASE if list_containers(thing) for volume in thing["spec"]["template"]["spec"]["volumes"]
    }
    assert mounted["secrets"]["secret"]["secretName"] == secret["metadata"]["name"]
    # Nobody is handed a secret by a variable, which child processes and crash reports would show.
    assert "secretKeyRef" not in "".join(path.read_text() for path in (K8S / "base").glob("*.yaml"))


def test_versions_are_those_of_the_images() -> None:
    versions = read_versions()
    assert BASE_TAGS["fluxgate/comfyui"] == versions["COMFYUI_VERSION"]
    stores = {container["image"] for thing in list_manifests("overlays/dev") for container in list_containers(thing)}
    # The cluster on a laptop goes by tag, also where the versions are pinned by digest.
    assert stores == {versions[name].partition("@")[0] for name in ("VALKEY_IMAGE", "MINIO_IMAGE")}


def list_probes(container: dict[str, Any]) -> list[tuple[str, str]]:
    return [(probe["httpGet"]["port"], probe["httpGet"]["path"]) for name, probe in container.items() if name.endswith("Probe")]


def test_probes_ask_what_is_answered() -> None:
    containers = get_containers()
    metrics = build_metrics_app(cast(StateGauges, None), lambda: True)
    answered = {
        "http": set(read_openapi()["paths"]),
        "metrics": {resource.canonical for resource in metrics.router.resources()},
        "comfyui": {"/system_stats"},
    }
    asked = {name: list_probes(container) for name, container in containers.items()}
    assert {name: len(probes) for name, probes in asked.items()} == {"gateway": 3, "dispatcher": 3, "comfyui": 2, "trainer": 0}
    for name, probes in asked.items():
        ports = {port["name"] for port in containers[name].get("ports", [])}
        assert all(port in ports and path in answered[port] for port, path in probes), name
    for name in ("gateway", "instance"):
        annotations = find("Deployment", name)["spec"]["template"]["metadata"]["annotations"]
        assert annotations["prometheus.io/path"] in answered["metrics"]
        container = containers["dispatcher" if name == "instance" else name]
        numbers = {port["name"]: str(port["containerPort"]) for port in container["ports"]}
        assert annotations["prometheus.io/port"] == numbers["metrics"]
        assert {"name": "METRICS_PORT", "value": numbers["metrics"]} in container["env"]


def test_ports_meet() -> None:
    service = find("Service", "gateway")["spec"]["ports"]
    ports = {port["name"]: port["containerPort"] for port in get_containers()["gateway"]["ports"]}
    assert {port["targetPort"] for port in service} == set(ports)
    assert {"name": "PORT", "value": str(ports["http"])} in get_containers()["gateway"]["env"]
    assert ("EXPOSE", "8188") in read_dockerfile(DOCKER / "comfyui" / "Dockerfile")
    allowed = {thing["metadata"]["name"]: thing["spec"].get("ingress", []) for thing in BASE if thing["kind"] == "NetworkPolicy"}
    assert allowed["nothing-in"] == []
    assert allowed["callers-to-gateway"] == [{"ports": [{"port": ports["http"]}]}]
    (comfyui,) = allowed["dispatchers-to-comfyui"]
    assert comfyui == {"from": [{"podSelector": {"matchLabels": {"app": "instance"}}}], "ports": [{"port": 8188}]}
    # No service leads to ComfyUI: its only caller is in the same pod.
    assert {thing["metadata"]["name"] for thing in BASE if thing["kind"] == "Service"} == {"gateway"}


def test_nothing_runs_as_root_or_may_become_it() -> None:
    for thing in (thing for thing in BASE if list_containers(thing)):
        pod = thing["spec"]["template"]["spec"]
        assert (pod["securityContext"]["runAsNonRoot"], pod["automountServiceAccountToken"]) == (True, False)
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        # Else a service's address would come as a variable named like a setting.
        assert pod["enableServiceLinks"] is False
        for container in list_containers(thing):
            rights = container["securityContext"]
            assert (rights["allowPrivilegeEscalation"], rights["capabilities"]) == (False, {"drop": ["ALL"]})
            assert container["name"] in ("comfyui", "trainer") or rights["readOnlyRootFilesystem"]


def test_a_pod_that_goes_first_finishes_what_runs() -> None:
    pod = find("Deployment", "instance")["spec"]["template"]["spec"]
    (comfyui,), (dispatcher,) = pod["initContainers"], pod["containers"]
    # A sidecar ends after the containers it serves.
    assert comfyui["restartPolicy"] == "Always"
    (wait_s,) = (int(variable["value"]) for variable in dispatcher["env"] if variable["name"] == "STOP_AFTER_RUNNING_S")
    assert 0 < wait_s < pod["terminationGracePeriodSeconds"]
    assert {"name": "DISPATCHER", "value": "off"} in get_containers()["gateway"]["env"]


def test_the_base_model_comes_by_the_gateways_own_command(monkeypatch: pytest.MonkeyPatch) -> None:
    (job,) = yaml.safe_load_all((K8S / "models-job.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == f"fluxgate/gateway:{BASE_TAGS['fluxgate/gateway']}"
    program, arguments = container["command"][:4], container["command"][4:]
    assert program == ["python", "-m", "gateway", "models"]
    assert parse_models_command(arguments).names == [find("ConfigMap", "settings")["data"]["DEFAULT_BASE_MODEL"]]
    assert {variable["name"] for variable in container["env"]} <= SETTING_NAMES | {"HF_HOME"}
    claims = [volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
    assert claims == [find("PersistentVolumeClaim", "models")["metadata"]["name"]]
    assert pod["securityContext"]["runAsNonRoot"]
    assert container["securityContext"] == get_containers()["gateway"]["securityContext"]


def test_a_pod_is_ready_once_it_is_warm() -> None:
    dispatcher = get_containers()["dispatcher"]
    assert {"name": "WARM_UP", "value": "true"} in dispatcher["env"]
    assert dispatcher["readinessProbe"]["httpGet"] == {"path": "/ready", "port": "metrics"}


def test_scaling_goes_by_metrics_that_are_exported() -> None:
    (scaled,) = (thing for thing in list_manifests("overlays/gpu") if thing["kind"] == "ScaledObject")
    assert scaled["spec"]["scaleTargetRef"]["name"] == find("Deployment", "instance")["metadata"]["name"]
    exported = {metric.name for metric in Metrics().registry.collect()}
    (metrics_port,) = (port["port"] for port in find("Service", "gateway")["spec"]["ports"] if port["name"] == "metrics")
    for trigger in scaled["spec"]["triggers"]:
        assert trigger["metadata"]["valueLocation"] in exported
        assert trigger["metadata"]["url"] == f"http://gateway.fluxgate.svc:{metrics_port}/metrics"


def test_links_lead_to_the_host_of_the_ingress() -> None:
    (ingress,) = list_manifests("overlays/public")
    (rule,) = ingress["spec"]["rules"]
    assert ingress["spec"]["tls"][0]["hosts"] == [rule["host"]]
    kustomization = yaml.safe_load((K8S / "overlays" / "public" / "kustomization.yaml").read_text())
    (added,) = yaml.safe_load(kustomization["patches"][0]["patch"])
    assert (added["path"], added["value"]) == ("/data/PUBLIC_URL", f"https://{rule['host']}")
    # An upload is not refused on the way.
    body = ingress["metadata"]["annotations"]["nginx.ingress.kubernetes.io/proxy-body-size"]
    assert int(body.removesuffix("m")) << 20 >= Settings.model_fields["max_upload_bytes"].default


def test_a_stop_is_given_longer_than_it_takes() -> None:
    """By compose and by the cluster, in seconds."""
    training = Limits().grace_s + TERMINATE_GRACE_S + KILL_GRACE_S
    services = read_compose("compose.yaml")
    allowed = {name: int(services[name]["stop_grace_period"].removesuffix("s")) for name in ("gateway", "trainer")}
    assert allowed["gateway"] > STOP_S
    assert training < allowed["trainer"]
    pods = {name: find("Deployment", name)["spec"]["template"]["spec"] for name in ("gateway", "trainer")}
    # What comes before the signal counts too.
    before_s = int(get_containers()["gateway"]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert before_s + STOP_S < pods["gateway"]["terminationGracePeriodSeconds"]
    assert training < pods["trainer"]["terminationGracePeriodSeconds"]


# -- their own tools, where they are at hand -------------------------------------------------------------------


def render(overlay: str) -> str:
    if (kubectl := find_program("kubectl")) is None:
        pytest.skip("no kubectl here")
    said = subprocess.run([kubectl, "kustomize", str(K8S / "overlays" / overlay)], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    return said.stdout


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_makes_it(overlay: str) -> None:
    text = render(overlay)
    things = [thing for thing in yaml.safe_load_all(text) if thing]
    assert all(thing["metadata"].get("namespace", "fluxgate") == "fluxgate" for thing in things)
    (settings,) = (thing["data"] for thing in things if thing["kind"] == "ConfigMap")
    Settings.model_validate({name.lower(): value for name, value in settings.items() if name not in ("BASE_MODEL_PATHS", "SECRETS_DIR")})
    gpus = re.findall(r'nvidia\.com/gpu: "1"', text)
    assert len(gpus) == (0 if overlay == "dev" else 2)
    images = {container["image"] for thing in things for container in list_containers(thing)}
    assert all(re.search(r":[\w.-]+$", image) for image in images)
    assert ("fluxgate/local:dev" in images) == (overlay == "dev")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_schemas_take_it(overlay: str, tmp_path: Path) -> None:
    if (validate := find_program("kubernetes-validate")) is None:
        pytest.skip("no kubernetes-validate here: make images-check installs it")
    # KEDA's own kinds are not among the built-in ones.
    things = [thing for thing in yaml.safe_load_all(render(overlay)) if thing and "keda.sh" not in thing["apiVersion"]]
    things += yaml.safe_load_all((K8S / "models-job.yaml").read_text())
    file = tmp_path / "all.yaml"
    file.write_text(yaml.safe_dump_all(things))
    said = subprocess.run([validate, "--strict", "--quiet", str(file)], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout + said.stderr
