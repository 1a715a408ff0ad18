"""The container files against the code they describe, and against their own tools where these are at hand."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs.generate import read_openapi
from gateway.settings import Settings
from tests.docker_files import (
    DOCKER,
    DOCKERFILES,
    ROOT,
    SETTINGS_SERVICES,
    find_program,
    is_let_through,
    list_copied,
    list_manifests,
    read_command,
    read_compose,
    read_dockerfile,
    read_environment,
    read_versions,
)

COMPOSE_FILES = (("compose.yaml",), ("compose.yaml", "compose.cpu.yaml"))
SETTING_NAMES = {name.upper() for name in Settings.model_fields}
# Read by other programs in our containers.
FOREIGN = {"PATH", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "DO_NOT_TRACK", "HF_HOME"}
# Said for each build, pinned nowhere.
PER_BUILD = {"VERSION", "REGISTRY", "TORCH_INDEX"}


def test_versions_are_pinned_in_one_file() -> None:
    versions = read_versions()
    assert not [name for name, value in versions.items() if "latest" in value or not re.search(r"\d", value)]
    images = {name: value for name, value in versions.items() if name.endswith("_IMAGE")}
    assert not [name for name, value in images.items() if not re.fullmatch(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}", value)]
    others = [*DOCKERFILES, DOCKER / "bake.hcl", ROOT / "compose.yaml", ROOT / "compose.cpu.yaml"]
    long_enough = {name: value for name, value in versions.items() if len(value) > 4}
    assert not [(path.name, name) for path in others for name, value in long_enough.items() if value in path.read_text()]
    for path in DOCKERFILES:
        assert all(re.match(r"\$\{\w+\}|build$", rest) for name, rest in read_dockerfile(path) if name == "FROM"), path
        asked = {re.split(r"[=\s]", rest)[0] for name, rest in read_dockerfile(path) if name == "ARG"}
        assert asked - PER_BUILD <= set(versions), path
    declared = set(re.findall(r'^variable "(\w+)"', (DOCKER / "bake.hcl").read_text(), re.M))
    images_of_others = {"VALKEY_IMAGE", "MINIO_IMAGE", "CADDY_IMAGE"}
    assert declared - PER_BUILD == set(versions) - images_of_others
    for service in read_compose("compose.yaml", **dict.fromkeys(images_of_others, "from-versions-env")).values():
        assert service["image"].startswith(("from-versions-env", "fluxgate/"))


def test_digests_are_pinned_where_a_registry_can_be_asked(tmp_path: Path) -> None:
    """By the target itself, with a docker that answers as the registry would."""
    (tmp_path / "docker").mkdir()
    file = tmp_path / "docker" / "versions.env"
    for path in (ROOT / "Makefile", DOCKER / "versions.env"):
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    fake = tmp_path / "bin" / "docker"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\n[ "$1 $2 $3" = "buildx imagetools inspect" ] && printf %s "$4" | sha256sum | sed "s/^/sha256:/;s/ .*//"\n')
    fake.chmod(0o755)
    before = read_versions()

    def pin() -> dict[str, str]:
        env = {**os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}"}
        subprocess.run(["make", "docker-pin"], cwd=tmp_path, env=env, check=True, capture_output=True, timeout=30)
        return dict(line.split("=", 1) for line in file.read_text().splitlines() if line and not line.startswith("#"))

    pinned = pin()
    for name, value in before.items():
        image = value.partition("@")[0]
        digest = f"@sha256:{hashlib.sha256(image.encode()).hexdigest()}"
        assert pinned[name] == (image + digest if name.endswith("_IMAGE") else value)
    assert pin() == pinned, "once more changes nothing"
    fake.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(subprocess.CalledProcessError):
        pin()


def test_the_tested_simpletuner_is_the_one_in_the_image() -> None:
    pinned = (ROOT / "tests" / "simpletuner" / "constraints.txt").read_text()
    installed = (ROOT / "tests" / "simpletuner" / "install.sh").read_text()
    assert f"simpletuner=={read_versions()['SIMPLETUNER_VERSION']}" in (pinned + installed).lower()


def test_versions_agree_wherever_they_are_said() -> None:
    """Decisions tell of what was; everything else of what is."""
    versions = read_versions()
    patterns = {r"(?<![\d.])0\.3\.\d+\b": "COMFYUI_VERSION", r"(?<=[Tt]uner[ =])=?(\d+\.\d+\.\d+)": "SIMPLETUNER_VERSION"}
    folders = ("gateway", "local", "comfy_workflows", "trainer_worker", "docker", "tests/simpletuner")
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    files += [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".toml", ".yaml", ".sh", ".txt")]
    for pattern, name in patterns.items():
        said = {(str(path.relative_to(ROOT)), found) for path in files for found in re.findall(pattern, path.read_text())}
        assert len(said) > 5
        assert not [(path, found) for path, found in said if found != versions[name]]
    python = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert python is not None
    assert f"Python {python[1]} or newer" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_an_image_is_built_from_what_is_there(path: Path) -> None:
    for source in list_copied(path):
        assert (ROOT / source).exists(), f"{path}: COPY {source}"
        assert source == "." or is_let_through(source), f".dockerignore keeps {source} out, which {path} copies"
    assert all("--no-cache-dir" in rest for name, rest in read_dockerfile(path) if name == "RUN" and "pip install" in rest)


def test_nothing_private_gets_into_an_image() -> None:
    kept_out = [
        ".git/config",
        ".fluxgate/s3-credentials.json",
        ".venv/bin/python",
        "gateway/__pycache__/app.pyc",
        "tests/conftest.py",
        ".env",
    ]
    assert not [path for path in kept_out if is_let_through(path)]
    assert is_let_through("gateway/app.py")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_an_image_runs_as_nobody_in_particular_and_says_what_it_is(path: Path) -> None:
    instructions = read_dockerfile(path)
    assert [rest for name, rest in instructions if name == "USER"][-1] == "10001:10001"
    labels = " ".join(rest for name, rest in instructions if name == "LABEL")
    assert all(f"org.opencontainers.image.{name}=" in labels for name in ("title", "description", "version"))
    assert ("STOPSIGNAL", "SIGTERM") in instructions
    program = read_command(path)
    assert program[0] == "python" or is_let_through(str(DOCKER.relative_to(ROOT) / path.parent.name / Path(program[0]).name))
    if path.parent.name != "comfyui":
        assert not set(read_environment(path)) - SETTING_NAMES - FOREIGN


@pytest.mark.parametrize("files", COMPOSE_FILES, ids=len)
@pytest.mark.parametrize("name", SETTINGS_SERVICES)
def test_what_compose_sets_are_settings_with_values_that_are_taken(
    name: str, files: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment = read_compose(*files)[name]["environment"]
    assert not set(environment) - SETTING_NAMES
    assert not [secret for secret in environment if "SECRET_ACCESS" in secret or secret.endswith(("_KEY", "_TOKEN"))]
    draw_secrets(tmp_path)
    assert {path.name.upper() for path in (tmp_path / "secrets").iterdir()} <= SETTING_NAMES
    for setting in SETTING_NAMES:
        monkeypatch.delenv(setting, raising=False)
    for setting, value in {**environment, "SECRETS_DIR": str(tmp_path / "secrets")}.items():
        monkeypatch.setenv(setting, value)
    settings = Settings()
    assert settings.admin_key is not None
    assert settings.webhook_secret is not None
    assert settings.aws_secret_access_key is not None
    assert settings.hf_token is None


def draw_secrets(volumes: Path) -> None:
    """What compose's first service does, in a folder of our own."""
    for name in ("secrets", "minio", "models", "loras", "outputs", "training", "hf"):
        (volumes / name).mkdir(exist_ok=True)
    init = read_compose("compose.yaml")["init"]
    assert {mount.partition(":")[2] for mount in init["volumes"]} == {f"/volumes/{path.name}" for path in volumes.iterdir()}
    (script,) = init["command"]
    script = script.replace("cd /volumes", f"cd '{volumes}'").replace("chown ", ": ")
    subprocess.run([*init["entrypoint"], script], check=True, capture_output=True, timeout=30)


def test_secrets_are_drawn_once(tmp_path: Path) -> None:
    draw_secrets(tmp_path)
    drawn = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    (tmp_path / "secrets" / "hf_token").write_text("brought")
    draw_secrets(tmp_path)
    again = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    assert again == drawn | {"hf_token": "brought"}
    assert len(drawn["admin_key"]) == 48
    assert {oct(path.stat().st_mode)[-3:] for path in (tmp_path / "secrets").iterdir()} == {"600"}


def test_only_the_gateway_and_signed_urls_are_published_and_on_loopback() -> None:
    services = read_compose("compose.yaml", "compose.cpu.yaml")
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert published == {"gateway": ["127.0.0.1:8000:8000"], "minio": ["127.0.0.1:9000:9000"], "caddy": ["80:80", "443:443"]}
    assert services["caddy"]["profiles"] == ["public"]
    networks = yaml.safe_load((ROOT / "compose.yaml").read_text())["networks"]
    assert networks["private"] == {"internal": True}
    assert services["comfyui"]["networks"] == services["redis"]["networks"] == ["private"]


def test_ports_are_the_same_everywhere() -> None:
    gateway = read_environment(DOCKER / "gateway" / "Dockerfile")
    assert (gateway["HOST"], gateway["PORT"]) == ("0.0.0.0", "8000")
    assert ("EXPOSE", "8000") in read_dockerfile(DOCKER / "gateway" / "Dockerfile")
    services = read_compose("compose.yaml")
    assert services["gateway"]["environment"]["COMFYUI_URLS"] == "http://comfyui:8188"
    for name in ("comfyui", "local"):
        assert ("EXPOSE", "8188") in read_dockerfile(DOCKER / name / "Dockerfile")
        assert "8188" in (DOCKER / name / "start.sh").read_text()
    assert "reverse_proxy gateway:8000" in (DOCKER / "caddy" / "Caddyfile").read_text()
    assert "flush_interval -1" in (DOCKER / "caddy" / "Caddyfile").read_text()
    # With its port, if it has one: the signature covers it.
    assert "header_up Host {hostport}" in (DOCKER / "caddy" / "Caddyfile").read_text()


def test_health_is_asked_where_it_is_answered() -> None:
    asked = {path.parent.name: re.findall(r"'http://127\.0\.0\.1:[^/]+(/\w+)'", path.read_text()) for path in DOCKERFILES}
    assert asked == {"gateway": ["/health"], "comfyui": ["/system_stats"], "local": ["/system_stats"], "trainer": []}
    assert "/health" in read_openapi()["paths"]
    services = read_compose("compose.yaml")
    waited_for = {name for service in services.values() for name, on in as_map(service.get("depends_on")).items() if on}
    ours = {"gateway", "comfyui"}
    assert all("healthcheck" in services[name] for name in waited_for - ours - {"init"})
    assert {name for name, service in services.items() if "restart" not in service} == {"models"}


def test_nothing_may_become_root_and_loaders_have_room() -> None:
    services = read_compose("compose.yaml")
    for name, service in services.items():
        assert (service["security_opt"], service["cap_drop"]) == (["no-new-privileges:true"], ["ALL"]), name
    pods = [thing for thing in list_manifests("base") if thing["kind"] == "Deployment" and thing["metadata"]["name"] == "trainer"]
    (room,) = (volume["emptyDir"]["sizeLimit"] for volume in pods[0]["spec"]["template"]["spec"]["volumes"] if volume["name"] == "shm")
    assert (services["trainer"]["shm_size"], room) == ("8gb", "8Gi")


def as_map(depends_on: Any) -> dict[str, Any]:
    return depends_on if isinstance(depends_on, dict) else {}


def list_gpus(service: dict[str, Any]) -> list[str]:
    gpus: list[str] = service["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"]
    return gpus


@pytest.mark.parametrize(("count", "trainer", "instances"), [(1, None, []), (4, None, ["1", "2", "3"]), (4, 2, ["1", "3"])])
def test_more_gpus(count: int, trainer: int | None, instances: list[str]) -> None:
    options = [] if trainer is None else ["--trainer", str(trainer)]
    made = subprocess.run([sys.executable, str(DOCKER / "gpus.py"), str(count), *options], capture_output=True, text=True, check=True)
    # Compose's own `!override` is no YAML tag of ours.
    described = yaml.safe_load(made.stdout.replace("!override ", ""))["services"]
    assert sorted(described) == sorted(["gateway", "trainer", *(f"comfyui-{gpu}" for gpu in instances)])
    assert all(list_gpus(described[f"comfyui-{gpu}"]) == [gpu] for gpu in instances)
    urls = ["http://comfyui:8188", *(f"http://comfyui-{gpu}:8188" for gpu in instances)]
    expected = {"COMFYUI_URLS": ",".join(urls)} | ({"SHARED_GPU_URLS": urls[0]} if trainer is None else {"SHARED_GPU": ""})
    assert all(described[name]["environment"] == expected for name in SETTINGS_SERVICES)
    assert ("deploy" in described["trainer"]) == (trainer is not None)
    if trainer is not None:
        assert list_gpus(described["trainer"]) == [str(trainer)]


@pytest.mark.parametrize("arguments", [["0"], ["65"], ["2", "--trainer", "2"], ["2", "--trainer", "0"]])
def test_gpus_that_cannot_be_are_refused(arguments: list[str]) -> None:
    refused = subprocess.run([sys.executable, str(DOCKER / "gpus.py"), *arguments], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "allowed is 1 to" in refused.stderr


# -- their own tools, where they are at hand -------------------------------------------------------------------


def find_compose() -> list[str] | None:
    """`docker compose`, or its plugin alone: it renders files without an engine."""
    if plugin := shutil.which("docker-compose"):
        return [plugin]
    docker = shutil.which("docker")
    if docker and subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode == 0:
        return [docker, "compose"]
    return None


@pytest.mark.parametrize("files", [*COMPOSE_FILES, ("compose.yaml", "GPUS")], ids=["gpu", "cpu", "four-gpus"])
def test_compose_reads_them(files: tuple[str, ...], tmp_path: Path) -> None:
    if (compose := find_compose()) is None:
        pytest.skip("no docker compose here")
    more = ROOT / "compose.gpus-test.yaml"
    try:
        if "GPUS" in files:
            text = subprocess.run([sys.executable, str(DOCKER / "gpus.py"), "4"], capture_output=True, text=True, check=True).stdout
            # Beside the file that it extends.
            more.write_text(text)
        names = [str(more) if name == "GPUS" else str(ROOT / name) for name in files]
        command = [*compose, "--env-file", str(DOCKER / "versions.env"), *(part for name in names for part in ("-f", name))]
        rendered = subprocess.run([*command, "--profile", "*", "config"], capture_output=True, text=True, check=False, cwd=ROOT)
    finally:
        more.unlink(missing_ok=True)
    assert rendered.returncode == 0, rendered.stderr
    services = yaml.safe_load(rendered.stdout)["services"]
    if "GPUS" not in files:
        # What our own reading of the files says is what compose says.
        for name in SETTINGS_SERVICES:
            assert services[name]["environment"] == read_compose(*files)[name]["environment"]
    else:
        assert {f"comfyui-{gpu}" for gpu in (1, 2, 3)} <= set(services)


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cpu.yaml"])
def test_compose_files_follow_the_schema(name: str, tmp_path: Path) -> None:
    if (check := find_program("check-jsonschema")) is None:
        pytest.skip("no check-jsonschema here: make images-check installs it")
    plain = tmp_path / name
    plain.write_text(re.sub(r"!(override|reset) ", "", (ROOT / name).read_text()))
    said = subprocess.run([check, "--builtin-schema", "vendor.compose-spec", str(plain)], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout


def test_dockerfiles_are_linted() -> None:
    if (hadolint := find_program("hadolint")) is None:
        pytest.skip("no hadolint here: make images-check installs it")
    said = subprocess.run([hadolint, *map(str, DOCKERFILES)], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout


def test_scripts_are_shell() -> None:
    for path in sorted(DOCKER.glob("*/*.sh")):
        assert path.stat().st_mode & 0o111 or path.name == "slim.sh", f"{path} is not executable"
        subprocess.run(["sh", "-n", str(path)], check=True)
