"""The sections of the configuration that say what is served, and how. See ``configuration``."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from offload.daemon.engine_settings import EngineSettings, OnDisconnect, Persist, SessionSettings
from offload.daemon.http.options import HttpOptions
from offload.daemon.ops.config_units import Bytes, BytesOrShare, Duration, DurationOrNever, Share

Reload = Literal["live", "restart"]

_ENGINE = EngineSettings(Path())
_SESSIONS = SessionSettings()
_HTTP = HttpOptions(Path())


def setting(default: Any, text: str, reload: Reload = "restart", **limits: Any) -> Any:
    """Describe one key.

    Parameters
    ----------
    default : object
    text : str
        One line for whoever writes a configuration.
    reload : {"live", "restart"}
        Whether SIGHUP changes it, or only the next start.
    **limits
        As of ``pydantic.Field``.
    """
    return Field(default, description=text, json_schema_extra={"reload": reload}, **limits)


class Section(BaseModel):
    """Keys that belong together; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=False)


class ModelSection(Section):
    """Which model is served."""

    path: str = setting(
        "recall", "Folder of a Hugging Face causal model; `recall`: the small one that is packaged."
    )
    name: str | None = setting(None, "What clients call it (default: the folder's name).")
    dtype: str = setting("auto", "auto, float32, bfloat16 or float16.")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N.")
    max_context_tokens: int | None = setting(
        None, "Longest context (default: what the model's config says).", ge=1
    )
    threads: int | None = setting(None, "Threads of torch (default: its own choice).", ge=1)


class MemorySection(Section):
    """One tier in memory."""

    size: BytesOrShare | None = setting(
        None, "Capacity, or share of all there is (default: measured); a hard limit."
    )


class HostSection(MemorySection):
    """Host memory."""

    codec: str = setting(
        "raw",
        "What it holds: raw, or int8, fp8, kivi4, kivi2 for two to five times as many tokens.",
    )


class EncryptionSection(Section):
    """Whether what is written below the data path is encrypted."""

    enabled: bool = setting(False, "Encrypt what is written below `data_path`; of a new one only.")
    key_file: Path | None = setting(
        None, "32 bytes, raw, hex or base64 (0600); `offload config encryption-key FILE` makes one."
    )


class DiskSection(Section):
    """The disk tier."""

    size: BytesOrShare | None = setting(None, "Capacity, or share of the disk.")
    min_free: Bytes = setting(_ENGINE.min_free_bytes, "What saved sessions leave to others.")
    encryption: EncryptionSection = setting(EncryptionSection(), "")
    write_budget_per_day: Bytes | None = setting(
        None, "What the status page compares the bytes written today with.", "live"
    )


class RemoteSection(Section):
    """An object store, over which several daemons share their sessions."""

    url: str | None = setting(
        None, "s3://bucket/prefix, gs://, az:// or file:///folder, the same for all that share."
    )
    secret_file: Path | None = setting(
        None, "Secret of all that share (32 bytes, 0600); made if it is missing."
    )
    lease: Duration = setting(60.0, "How long others wait for a daemon that has died.", gt=0)
    wait: Duration = setting(5.0, "How long a request waits for a session that another has.")
    required: bool = setting(
        False, "Refuse requests of sessions while the store is away; else go on without it."
    )


class TiersSection(Section):
    """Where keys and values may be, and how much of them."""

    use: tuple[Literal["gpu", "cpu", "disk"], ...] = setting(
        _ENGINE.tiers, "Which tiers there are, the fastest first."
    )
    device: MemorySection = setting(MemorySection(), "")
    host: HostSection = setting(HostSection(), "")
    disk: DiskSection = setting(DiskSection(), "")
    remote: RemoteSection = setting(RemoteSection(), "")
    policy: str = setting(_ENGINE.policy, "What decoding reads, as for `OffloadedCache`.")
    codec: str = setting(
        _ENGINE.codec, "How chunks are written to the disk, as for `OffloadedCache`."
    )
    chunk_tokens: int = setting(_ENGINE.chunk_tokens, "Tokens that move together.", ge=1)


class RunningSection(Section):
    """How requests take turns."""

    prefill_tokens: int = setting(
        _ENGINE.prefill_tokens, "Tokens of a prompt at a time; in between, others decode.", ge=1
    )
    max_piece: Duration = setting(
        _ENGINE.max_piece_s, "About the longest wait of others for one such piece."
    )
    max_running: int = setting(_ENGINE.max_running, "Requests computed side by side.", ge=1)
    max_waiting: int = setting(_ENGINE.max_waiting, "Requests that wait; more are a 429.", ge=0)
    queue_timeout: Duration = setting(_ENGINE.queue_timeout_s, "Longest wait of a request.")


class SessionsSection(Section):
    """How long sessions stay where."""

    auto_create_min_tokens: int = setting(
        _SESSIONS.auto_create_min_tokens,
        "A request without a session gets one if it leaves so many tokens behind.",
        ge=0,
    )
    idle_to_host: DurationOrNever = setting(
        _SESSIONS.idle_to_host_s, "Without a request: off the device after that long."
    )
    idle_to_disk: DurationOrNever = setting(
        _SESSIONS.idle_to_disk_s, "Without a request: out of memory after that long."
    )
    ttl: DurationOrNever = setting(_SESSIONS.ttl_s, "Without a request: deleted after that long.")
    response_ttl: Duration = setting(
        _HTTP.response_ttl_s, "Stored responses and conversations: deleted after that long."
    )
    persist: Persist = setting(
        _SESSIONS.persist, "on_idle (and every persist_interval), write_through or never."
    )
    persist_interval: Duration = setting(
        _SESSIONS.persist_interval_s, "What a crash can lose, at most."
    )
    max_per_tenant: int = setting(_SESSIONS.max_per_tenant, "Sessions of one tenant.", ge=1)
    disk_quota: Bytes | None = setting(
        _SESSIONS.disk_quota_bytes, "Of one tenant's saved sessions (default: none)."
    )
    hard_pin_share: Share = setting(
        _SESSIONS.hard_pin_share, "Of that quota, which pinned sessions may take."
    )
    on_disconnect: OnDisconnect = setting(
        _SESSIONS.on_disconnect,
        "When a client goes: stop_and_keep what was computed, continue, or discard it.",
    )


class MetricsSection(Section):
    """GET /metrics, for Prometheus."""

    enabled: bool = setting(True, "Whether there is /metrics.")
    auth: bool = setting(True, "Whether it wants a key, where there are keys.", "live")
    compat: tuple[Literal["vllm", "llamacpp"], ...] = setting(
        ("vllm", "llamacpp"), "Whose names to use, next to our own."
    )


class LoggingSection(Section):
    """One line per event, on standard error."""

    format: Literal["json", "text"] = setting("json", "json, or text for people.", "live")
    level: Literal["debug", "info", "warning", "error"] = setting(
        "info", "What is less than that gets no line.", "live"
    )
    prompts: bool = setting(False, "Write prompts into the log, in full.", "live")


class UiSection(Section):
    """The status page at /."""

    enabled: bool = setting(True, "Whether there is one.")
