"""Settings: built-in defaults, then `longdraft.toml`, then the environment. The only reader of the environment."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from service.errors import ConfigError

MIB = 1 << 20


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Limits(_Section):
    """What a single request may weigh."""

    max_file_bytes: int = Field(200 * 1000 * 1000, gt=0)
    max_lines: int = Field(50_000, gt=0)
    max_line_bytes: int = Field(4 * MIB, gt=0)
    max_body_bytes: int = Field(1 * MIB, gt=0)
    """JSON bodies of API calls; uploads are streamed and have `max_file_bytes`."""
    max_json_depth: int = Field(100, gt=0)


class Timing(_Section):
    """Leases and intervals, in seconds."""

    lease: float = Field(60.0, gt=0)
    heartbeat: float = Field(15.0, gt=0)
    sweep: float = Field(15.0, gt=0)
    commit_every: float = Field(3.0, gt=0)
    commit_lines: int = Field(100, gt=0)
    worker_idle: float = Field(60.0, gt=0)
    """A worker without work leaves after this long."""
    shutdown_grace: float = Field(25.0, gt=0)
    model_retry: float = Field(30.0, ge=0)
    """How long groups rest whose model could not be loaded."""
    relay: float = Field(0.2, gt=0)
    """How often the control process looks for outbox rows."""


class S3(_Section):
    """How to talk to the object store when `blob_url` (or a URI) is s3://. Empty means boto3's own lookup."""

    endpoint_url: str | None = None
    region: str | None = None
    access_key_id: str | None = None
    secret_access_key: str | None = Field(None, repr=False)
    path_style: bool = False
    checksums: Literal["when_supported", "when_required"] = "when_required"
    """boto3's own default (`when_supported`) breaks some stores; our SHA-256 is checked either way."""
    multipart_bytes: int = Field(16 * MIB, ge=5 * MIB)
    public_endpoint_url: str | None = None
    """Where clients reach the store, for presigned URLs; empty: where we do."""
    role_buckets: tuple[str, ...] = ("*",)
    """Buckets (patterns such as `acme-*`) that projects without credentials of their own may name; reached with the credentials here."""
    allow_private_endpoints: bool = False
    """Whether endpoints that projects name may be http or lead to private addresses."""

    @field_validator("role_buckets", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(filter(None, value.split(","))) if isinstance(value, str) else value


class ModelEntry(_Section):
    """A model users may name. `source`: a packaged model's name, a Hugging Face id, or a local path."""

    source: str
    aliases: tuple[str, ...] = ()
    revision: str | None = None
    dtype: str | None = None


class EngineSettings(_Section):
    """Handed to the engine as they are; `auto` lets it decide from the machine."""

    dtype: str = "auto"
    """float32, bfloat16, float16; int8 (on a CPU): weights rounded to eight bits, arithmetic in float32."""
    device: str = "auto"
    drafter: str = "auto"
    kv_memory: str = "auto"
    """Bytes (`2GiB`), a fraction of free memory (`0.5`), or auto."""
    kv_dtype: Literal["auto", "fp8"] = "auto"
    """Of the KV cache: the model's own, or eight bits with scales (half of bfloat16's memory; texts are close, not always equal)."""
    max_sequences: int | None = Field(None, gt=0)
    threads: int | None = Field(None, gt=0)
    fixed_drafts: int | None = Field(None, gt=0)
    """Verify this many drafted tokens of every request in every step, whether it pays or not: for measurements."""
    adapt: bool = False
    """Let a DSpark or DFlash drafter learn from the answers of the job it runs in, beside it."""
    trace: Path | None = None
    """A file that gets a record of what the engine does, prompts and answers included, for `longdraft replay`; one engine at a time."""


class Standin(_Section):
    """The stand-in engine of fault and load tests (`runner = "standin"`)."""

    delay: float = Field(0.0, ge=0)
    """Seconds that a line takes."""
    capacity: int = Field(64, gt=0)
    answer_bytes: int = Field(64, gt=0)
    witness: Path | None = None
    """A file that gets one JSON line for each start and finish of a line."""
    die_on: tuple[str, ...] = ()
    """custom_ids of lines that kill the process when they start. In the environment: comma-separated."""
    die_how: Literal["sigkill", "exit", "memory"] = "sigkill"

    @field_validator("die_on", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(filter(None, value.split(","))) if isinstance(value, str) else value


class Settings(_Section):
    data_dir: Path
    cache_dir: Path
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    url: str | None = None
    """Where the CLI finds the server; empty: http://host:port."""
    api_key: str | None = Field(None, repr=False)
    key_pepper: str = Field("", repr=False)
    """Keys the digests of API keys (see usecases/keys.py): the same on every host of one database; changing it voids every key."""
    credentials_key: str = Field("", repr=False)
    """Encrypts the bucket credentials of projects: the same on every host of one database. Empty: made once and kept in `data_dir`."""
    database_url: str | None = None
    """Empty: the embedded PostgreSQL in `data_dir`."""
    migration_database_url: str | None = None
    """The role that owns the schema; empty: `database_url`."""
    broker_url: str | None = None
    """Empty: the embedded Valkey."""
    blob_url: str | None = None
    """`file:///folder` or `s3://bucket/prefix`; empty: `data_dir/blobs`."""
    max_workers: int = Field(1, gt=0)
    runner: Literal["engine", "standin"] = "engine"
    """`standin` answers from a hash of the prompt, without a model: for load and fault tests."""
    group_lines: int = Field(64, gt=0, le=64)
    model_refusals: int = Field(3, gt=0)
    """A model that was refused this often (ten times as often where the reason may pass) and that no worker could load within a day is
    given up: lines that wait for it fail with `model_unavailable`."""
    ops_host: str | None = None
    """Where health, readiness and metrics are served; empty: `host`."""
    ops_port: int | None = Field(None, gt=0, le=65535)
    """Empty: nowhere. Of several workers that one command starts, the second has the next port, and so on."""
    cache_url: str | None = None
    """`s3://bucket/prefix` or `file:///folder`: converted models and machine profiles are looked for there first, and shared there."""
    log_level: str = "INFO"
    log_format: Literal["text", "json"] = "text"
    default_model: str = "smollm2-135m"
    models: Mapping[str, ModelEntry] = Field(default_factory=dict)
    engine: EngineSettings = EngineSettings()
    limits: Limits = Limits()
    timing: Timing = Timing()
    s3: S3 = S3()
    standin: Standin = Standin()
    rates: Mapping[str, str] = Field(default_factory=dict)
    """What a machine costs: device class (`cpu`, `cuda`, or a device's name) -> dollars an hour, as a decimal string."""

    @property
    def server_url(self) -> str:
        return (self.url or f"http://{self.host}:{self.port}").rstrip("/")

    def resolve_model(self, name: str) -> str | None:
        """The registered model that `name` (itself or an alias) means, or None. Paths and URLs never resolve."""
        if name in self.models:
            return name
        return next((model for model, entry in self.models.items() if name in entry.aliases), None)


BUILT_IN_MODELS: Mapping[str, Mapping[str, Any]] = {
    "smollm2-135m": {"source": "smollm2-135m", "aliases": ("gpt-4o-mini",)},
    "gemma3-270m": {"source": "gemma3-270m"},
}


def load_settings(environ: Mapping[str, str] | None = None, *, config_file: Path | None = None, **overrides: Any) -> Settings:
    """Builds the frozen settings.

    `LONGDRAFT_<NAME>` sets a top-level value, `LONGDRAFT_<SECTION>__<NAME>` one of a section. The file is `config_file`, else
    `LONGDRAFT_CONFIG`, else `longdraft.toml` in the working folder if there is one. `overrides` (command-line flags; None is ignored) win.

    Raises:
        ConfigError: an unknown name or a value out of range, with the name and the value.
    """
    env = os.environ if environ is None else environ
    values: dict[str, Any] = {"data_dir": _xdg(env, "XDG_DATA_HOME", ".local/share"), "cache_dir": _xdg(env, "XDG_CACHE_HOME", ".cache")}
    _merge(values, _read_file(env, config_file))
    for name, value in env.items():
        if name.startswith("LONGDRAFT_") and name not in ("LONGDRAFT_CONFIG",):
            _set(values, name.removeprefix("LONGDRAFT_").lower().split("__"), value)
    _merge(values, {name: value for name, value in overrides.items() if value is not None})
    models = dict(BUILT_IN_MODELS)
    models.update(values.get("models", {}))
    values["models"] = models
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None
    if settings.default_model not in settings.models:
        known = ", ".join(settings.models)
        raise ConfigError(f"default_model is {settings.default_model!r}, which is not in [models]; known: {known}.", param="default_model")
    return settings


def _xdg(env: Mapping[str, str], variable: str, fallback: str) -> Path:
    base = env.get(variable)
    return (Path(base) if base else Path(env.get("HOME") or Path.home()) / fallback) / "longdraft"


def _read_file(env: Mapping[str, str], config_file: Path | None) -> dict[str, Any]:
    named = config_file or (Path(env["LONGDRAFT_CONFIG"]) if env.get("LONGDRAFT_CONFIG") else None)
    path = named or Path("longdraft.toml")
    if not path.exists():
        if named:
            raise ConfigError(f"The configuration file {path} does not exist.")
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from None


def _merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    for name, value in new.items():
        if isinstance(value, Mapping) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        else:
            into[name] = dict(value) if isinstance(value, Mapping) else value


def _set(values: dict[str, Any], path: list[str], value: str) -> None:
    for part in path[:-1]:
        values = values.setdefault(part, {})
    values[path[-1]] = value


def _explain(error: ValidationError) -> str:
    parts = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            parts.append(f"{name} is not a setting (LONGDRAFT_{name.replace('.', '__').upper()} or longdraft.toml)")
        else:
            shown = "" if "secret" in name or "key" in name else f", got {problem['input']!r}"
            parts.append(f"{name}: {problem['msg']}{shown}")
    return "Configuration: " + "; ".join(parts) + "."
