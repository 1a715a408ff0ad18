"""The only reader of the environment. Every field has help text; the table in docs/settings.md is generated from it."""

from __future__ import annotations

import base64
import ipaddress
import os
import re
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SecretsSettingsSource, SettingsConfigDict

from gateway.redaction import hide_user

# Where container runtimes put secrets.
SECRETS_DIR = Path("/run/secrets")


def require_url(url: str, *schemes: str) -> str:
    """The URL, if it has one of the schemes, a host and no impossible port; ValueError names what is allowed."""
    parts = urlsplit(url)
    if parts.scheme not in schemes or not (parts.hostname or parts.scheme == "unix"):
        raise ValueError(f"{hide_user(url)!r} is no URL; write {schemes[0]}://HOST:PORT")
    if parts.port == 0:
        raise ValueError(f"{hide_user(url)!r} names port 0")
    return url


def require_webhook_secret(text: str) -> str:
    """The secret, if it is one of Standard Webhooks; ValueError says what that is, and not what was given."""
    try:
        encoded = text.removeprefix("whsec_")
        # Padding is often left out, and the standard's libraries put it back.
        size = len(base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True))
    except ValueError:
        size = 0
    if not text.startswith("whsec_") or not 24 <= size <= 64:
        raise ValueError("a webhook secret is whsec_ and then 24 to 64 bytes in base64")
    return text


def is_secret(name: str) -> bool:
    """Whether a setting's value is never shown."""
    field = Settings.model_fields.get(name)
    return field is not None and "SecretStr" in str(field.annotation)


class _SecretFiles(SecretsSettingsSource):
    """Files in SECRETS_DIR, where that is: an empty one says nothing."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        value, key, is_complex = super().get_field_value(field, field_name)
        return value or None, key, is_complex


class Settings(BaseSettings):
    """One deployment. Read once at start; names are those of the environment, in lower case."""

    model_config = SettingsConfigDict(env_file=None, extra="ignore", frozen=True)

    secrets_dir: Path = Field(
        SECRETS_DIR, description="Folder in which a file named like a setting, in lower case, is its value where the environment has none."
    )

    host: str = Field("127.0.0.1", description="Address the gateway listens on. Anything but loopback needs API keys.")
    port: int = Field(8000, ge=0, le=65535, description="Port the gateway listens on.")
    public_url: str | None = Field(None, description="Base URL callers see, for the links in answers. Default: the request's own.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="Least level that is logged.")

    auth: Literal["auto", "keys", "hf"] = Field(
        "auto",
        description="`auto`: on loopback no key is asked for until the first exists. `keys`: always. `hf`: always, and Hugging Face tokens "
        "that may read are taken as keys.",
    )
    hf_users: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Users and organisations of Hugging Face that `AUTH=hf` lets in, comma separated. Empty: whoever has an account."
    )
    admin_key: SecretStr | None = Field(
        None, min_length=24, description="A key with all scopes that is not kept in Redis: for the first start, or for containers."
    )
    requests_per_minute: int = Field(0, ge=0, description="Requests of one caller in any 60 s, where its key says nothing. 0: any number.")
    gpu_seconds_per_day: int = Field(
        0, ge=0, description="GPU seconds of one caller from midnight to midnight UTC, where its key says nothing. 0: any number."
    )

    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Names by which the gateway may be asked for, comma separated, beside loopback's own and PUBLIC_URL's. "
        "Empty: where a key is asked for, any.",
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Pages of other origins that may ask, comma separated, each as `https://host` or with a port."
    )

    redis_url: str = Field("redis://127.0.0.1:6379/0", description="Redis that holds jobs, queue, leases and events.")

    s3_endpoint_url: str | None = Field(None, description="S3 endpoint. Empty for AWS; set for R2, MinIO, rclone.")
    s3_public_endpoint_url: str | None = Field(None, description="Endpoint that signed URLs name, when callers reach S3 by another way.")
    s3_bucket: str = Field("fluxgate", description="Bucket for pictures, datasets and LoRAs. Made at start if absent.")
    s3_region: str = Field("us-east-1", description="Region of the bucket.")
    aws_access_key_id: str | None = Field(None, description="S3 access key. Empty: boto3's own credential chain.")
    aws_secret_access_key: SecretStr | None = Field(None, description="S3 secret key.")
    url_ttl_s: int = Field(3600, ge=60, le=604800, description="Seconds a signed picture URL lives.")

    comfyui_urls: Annotated[tuple[str, ...], NoDecode] = Field(
        ("http://127.0.0.1:8188",), description="ComfyUI instances, comma separated, each with its scheme and port."
    )
    dispatcher: Literal["embedded", "off"] = Field(
        "embedded", description="`embedded` runs the dispatcher inside the gateway; `off` leaves it to `python -m gateway.dispatch`."
    )
    stop_after_running_s: float = Field(
        0.0, ge=0, description="Seconds a dispatcher that is told to stop waits for what runs; then, or at 0 at once, it hands jobs over."
    )
    warm_up: bool = Field(
        False, description="A dispatcher loads DEFAULT_BASE_MODEL on its instances before METRICS_PORT answers `/ready` with 200."
    )
    metrics_port: int = Field(0, ge=0, le=65535, description="Port of `python -m gateway.dispatch` that serves its metrics. 0: none.")
    slots_per_instance: int = Field(
        2, ge=1, le=8, description="Prompts kept in one ComfyUI: one runs, the rest wait so that the GPU never does."
    )
    quick_slots_per_instance: int = Field(
        16, ge=0, le=64, description="As many are kept there while they are so short that it would run dry before the next one came."
    )
    lease_s: float = Field(10.0, gt=0, description="Seconds a claimed job stays its dispatcher's without renewal.")
    poll_s: float = Field(2.0, gt=0, description="Seconds between looks into an instance's queue and history while a job runs there.")
    instance_lost_s: float = Field(30.0, gt=0, description="Seconds an instance may be out of reach before its jobs go back to the queue.")
    max_attempts: int = Field(3, ge=1, description="Times a job may be started before it fails.")
    queue_timeout_s: float = Field(3600.0, gt=0, description="Seconds a job may wait for an instance before it expires.")
    stall_timeout_s: float = Field(600.0, gt=0, description="Seconds a running prompt may show no progress before it is stopped.")
    timeout_s: float = Field(3600.0, gt=0, description="Seconds a claimed job may take in total; a request's own `timeout_s` may be less.")
    max_queue_depth: int = Field(10_000, ge=1, description="Waiting jobs above which new ones are answered 429.")
    max_jobs_per_caller: int = Field(2_000, ge=1, description="Unfinished jobs of one caller above which its new ones are answered 429.")
    max_batches_per_caller: int = Field(10, ge=1, description="Unfinished batches of one caller above which its new ones are answered 429.")
    cache_ttl_s: int = Field(24 * 3600, ge=0, description="Seconds a finished job may answer an identical request; 0 turns that off.")
    upload_tries: int = Field(5, ge=1, description="Times one picture's upload to S3 is tried, with growing pauses.")

    trainer: Literal["simpletuner", "tiny", "off"] = Field(
        "simpletuner", description="What trains: SimpleTuner, or the small one of `make run`."
    )
    simpletuner_python: Path | None = Field(None, description="Interpreter of the environment that SimpleTuner is installed in.")
    training_dir: Path = Field(Path("training"), description="Folder where the trainer worker keeps data sets, checkpoints and logs.")
    base_model_paths: dict[str, str] = Field(
        default_factory=dict,
        description="JSON: base model -> diffusers folder or Hugging Face repository to train on. Default: the base model's source.",
    )
    hf_token: SecretStr | None = Field(None, description="Hugging Face token of the deployment, for gated and private base models.")
    hf_endpoint: str = Field("https://huggingface.co", description="Hugging Face, or a mirror of it.")
    hf_access_check: bool = Field(
        True, description="Ask Hugging Face whether a base model may be read before a training is queued; where it does not answer, go on."
    )
    caption_providers: dict[str, str] = Field(
        default_factory=lambda: {
            "colours": "trainer_worker.captioners.colours:describe",
            "florence2": "trainer_worker.captioners.florence2:describe",
        },
        description="JSON: name -> `module:function` that captions pictures, imported by the trainer's interpreter.",
    )
    caption_provider: str = Field("florence2", description="The caption provider of a request that names none.")
    caption_path: tuple[str, ...] = Field((), description="JSON: folders in which further caption providers' modules lie.")
    train_unpublishable: bool = Field(
        False, description="Also train families whose LoRAs ComfyUI would ignore (Wan, HunyuanVideo): the training ends as not publishable."
    )
    training_lease_s: float = Field(30.0, gt=0, description="Seconds a claimed training stays its worker's without renewal.")
    training_timeout_s: float = Field(24 * 3600.0, gt=0, description="Seconds one training may run.")
    training_stall_s: float = Field(1800.0, gt=0, description="Seconds a training may say nothing before it is stopped.")
    training_attempts: int = Field(3, ge=1, description="Times a training is taken up again after its worker died.")
    models_dir: Path | None = Field(
        None, description="ComfyUI's models folder: `fluxgate models` puts base models there, and jobs tell the hashes of its files."
    )
    models_min_free_bytes: int = Field(
        10 << 30,
        ge=0,
        description="Free bytes of that disk that `fluxgate models pull` leaves, and to which `gc` makes room.",
    )
    lora_dir: Path | None = Field(
        None, description="ComfyUI's models/loras folder as the dispatcher sees it: published LoRAs are put there."
    )
    lora_dir_max_bytes: int = Field(50 << 30, ge=0, description="Size of the LoRAs put there above which the least used ones go.")
    lora_dir_min_free_bytes: int = Field(
        2 << 30, ge=0, description="Free bytes of that disk below which no LoRA is brought; the least used ones make room."
    )
    shared_gpu: str | None = Field(
        None, description="Name of a GPU that trainings and instances share: they take turns. Empty: they do not."
    )
    shared_gpu_urls: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Those of COMFYUI_URLS that are on SHARED_GPU; the others go on while it trains. Empty: all."
    )

    price_per_gpu_hour: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="What an hour on an instance costs, in a currency of yours. Empty: jobs tell no amount.",
    )
    default_workflow: str = Field("flux", description="Workflow of a request that names none.")
    default_base_model: str = Field("flux1-dev", description="Base model of a request that names none.")
    workflows_dir: Path | None = Field(None, description="Folder of further workflows, beside those that ship.")

    raw_graphs: Literal["admin", "all", "off"] = Field(
        "admin", description="Who may bring graphs of their own to `/api/v2/jobs`: keys with the scope `admin`, every key, nobody."
    )
    raw_nodes: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Node classes that such graphs may hold beside those of the built-in list and of the workflows, comma separated."
    )

    job_ttl_s: int = Field(30 * 24 * 3600, ge=60, description="Seconds a finished job's record and events are kept.")
    max_body_bytes: int = Field(1 << 20, ge=1024, description="Largest request body, refused before it is read.")
    max_picture_body_bytes: int = Field(
        16 << 20, ge=1024, description="Largest JSON body of a generation, which may carry pictures as data URLs."
    )
    max_batch_bytes: int = Field(16 << 20, ge=1024, description="Largest body of a batch.")
    body_timeout_s: float = Field(60.0, gt=0, description="Seconds in which a request's body has to come.")
    upload_timeout_s: float = Field(3600.0, gt=0, description="Seconds in which an upload through the gateway has to come.")
    max_upload_bytes: int = Field(512 << 20, ge=1024, description="Largest upload of files, refused before it is read.")
    max_asset_bytes: int = Field(2 << 30, ge=1024, le=5 << 30, description="Largest file that may be sent straight to S3.")
    asset_ttl_s: int = Field(24 * 3600, ge=60, description="Seconds an upload is kept after it was made or last used.")
    allow_private_urls: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Own places that callers' URLs may name, comma separated: `HOST:PORT` or networks. http is allowed there.",
    )
    webhook_secret: SecretStr | None = Field(
        None, description="Signs webhooks whose request brings no secret of its own: `whsec_` and 24 to 64 bytes in base64."
    )
    moderation: str = Field(
        "",
        description="Who judges prompts and pictures: `blocklist`, an http(s) URL, `package.module:function` or the name of an entry point "
        "of the group `fluxgate.moderation`. Empty: nobody.",
    )
    moderation_blocklist: Path | None = Field(
        None, description="File of `MODERATION=blocklist`: a word, words in a row or `/regex/` per line."
    )
    moderation_secret: SecretStr | None = Field(None, min_length=16, description="Sent to the moderation URL as `Authorization: Bearer`.")
    moderation_timeout_s: float = Field(10.0, gt=0, le=300, description="Seconds in which a judgement has to come.")
    moderation_on_failure: Literal["closed", "open"] = Field(
        "closed", description="What has no judgement: `closed` refuses it (503, failed jobs), `open` lets it pass."
    )
    heartbeat_s: float = Field(15.0, gt=0, description="Seconds between comments on a quiet event stream.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        folder = Path(os.environ.get("SECRETS_DIR") or SECRETS_DIR)
        return init_settings, env_settings, *([_SecretFiles(settings_cls, folder)] if folder.is_dir() else [])

    @field_validator("raw_nodes", "hf_users", mode="before")
    @classmethod
    def _split_names(cls, value: object) -> object:
        return tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value

    @field_validator("comfyui_urls", "shared_gpu_urls", mode="before")
    @classmethod
    def _split_urls(cls, value: object) -> object:
        return tuple(url.strip().rstrip("/") for url in value.split(",") if url.strip()) if isinstance(value, str) else value

    @field_validator("allow_private_urls", "allowed_hosts", "cors_origins", mode="before")
    @classmethod
    def _split_places(cls, value: object) -> object:
        return tuple(place.strip() for place in value.split(",") if place.strip()) if isinstance(value, str) else value

    @field_validator("cors_origins")
    @classmethod
    def _need_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if not re.fullmatch(r"https?://[^/*?#@\s]+", origin):
                raise ValueError(f"{origin!r} is no origin; write https://HOST or http://HOST:PORT")
        return origins

    @field_validator("allow_private_urls")
    @classmethod
    def _need_places(cls, places: tuple[str, ...]) -> tuple[str, ...]:
        for place in places:
            if not re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+):[0-9]{1,5}", place):
                ipaddress.ip_network(place)
        return places

    @field_validator("moderation")
    @classmethod
    def _need_judge(cls, judge: str) -> str:
        if judge and not re.fullmatch(r"https?://[^\s]+|[A-Za-z_][\w.\-]*(:[A-Za-z_]\w*)?", judge):
            raise ValueError("write blocklist, an http(s) URL, package.module:function or the name of an entry point")
        return judge

    @field_validator("webhook_secret")
    @classmethod
    def _need_webhook_secret(cls, secret: SecretStr | None) -> SecretStr | None:
        if secret is None or not secret.get_secret_value():
            return None
        require_webhook_secret(secret.get_secret_value())
        return secret

    @field_validator("comfyui_urls")
    @classmethod
    def _need_base_urls(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        if not urls:
            raise ValueError("name at least one instance, as http://HOST:PORT")
        for url in urls:
            require_url(url, "http", "https")
        return urls

    @field_validator("s3_endpoint_url", "s3_public_endpoint_url", "public_url")
    @classmethod
    def _need_http(cls, url: str | None) -> str | None:
        return None if not url else require_url(url, "http", "https")

    @field_validator("redis_url")
    @classmethod
    def _need_redis(cls, url: str) -> str:
        return require_url(url, "redis", "rediss", "unix")

    @field_validator("s3_bucket")
    @classmethod
    def _need_bucket_name(cls, name: str) -> str:
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", name):
            raise ValueError("a bucket is named with 3 to 63 lower case letters, digits, dots and dashes")
        return name

    @model_validator(mode="after")
    def _need_both_keys(self) -> Self:
        if bool(self.aws_access_key_id) != bool(self.aws_secret_access_key):
            raise ValueError("AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY go together: set both or neither")
        return self

    @model_validator(mode="after")
    def _need_known_instances(self) -> Self:
        if strange := [url for url in self.shared_gpu_urls if url not in self.comfyui_urls]:
            # Nobody would wait for it: the training and it would run out of memory together.
            raise ValueError(f"SHARED_GPU_URLS has {strange[0]!r}; allowed is any of COMFYUI_URLS: {', '.join(self.comfyui_urls)}")
        return self

    @cached_property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the gateway."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
