"""A command that is ready to run, and the environment a trainer may see of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

# Of the worker's own environment: what libraries need to find themselves, the GPU and the network. Not what the worker itself was
# given, such as S3 keys.
PASSED_NAMES = (
    "PATH", "HOME", "USER", "LANG", "TZ", "TMPDIR", "TERM", "SHELL", "LD_LIBRARY_PATH", "LIBRARY_PATH", "CC", "CXX", "XDG_CACHE_HOME",
    "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
)  # fmt: skip
PASSED_PREFIXES = (
    "LC_", "CUDA", "NVIDIA_", "NCCL_", "ROCR_", "HIP_", "HSA_", "HF_", "HUGGING", "TRANSFORMERS_", "DIFFUSERS_", "TORCH", "PYTORCH_",
    "TRITON_", "OMP_", "MKL_", "TOKENIZERS_", "SIMPLETUNER_", "ACCELERATE_",
)  # fmt: skip
SECRET_NAMES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN")
LOOPBACK = "127.0.0.1,localhost"


@dataclass(frozen=True)
class Launch:
    command: list[str]
    env: dict[str, str]  # on top of what is passed on of the worker's own
    cwd: Path
    log_path: Path
    sample_names: dict[str, str] = field(default_factory=dict)  # what the trainer calls a prompt -> the prompt


def pass_environment(own: Mapping[str, str], added: Mapping[str, str]) -> dict[str, str]:
    """All of a trainer's environment, with calls to the loopback kept from any proxy."""
    env = {name: value for name, value in own.items() if name in PASSED_NAMES or name.startswith(PASSED_PREFIXES)}
    no_proxy = own.get("no_proxy") or own.get("NO_PROXY")
    direct = f"{no_proxy},{LOOPBACK}" if no_proxy else LOOPBACK
    return {**env, "NO_PROXY": direct, "no_proxy": direct, "PYTHONUNBUFFERED": "1", **added}


def find_secrets(env: Mapping[str, str]) -> list[str]:
    return [env[name] for name in SECRET_NAMES if env.get(name)]
