"""The one configuration of the daemon: sections, keys, defaults, and what a reload can change."""

import ipaddress
from pathlib import Path
from typing import Final, Literal, Self

from pydantic import SecretStr, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from offload.daemon.ops.config_sections import (
    LoggingSection,
    MetricsSection,
    ModelSection,
    RunningSection,
    Section,
    SessionsSection,
    TiersSection,
    UiSection,
    setting,
)
from offload.daemon.ops.config_units import Bytes, Duration

ENV_PREFIX: Final = "OFFLOAD__"


class LimitsSection(Section):
    """What one client may take of the server."""

    body: Bytes = setting(64 << 20, "Of one request; more is a 413.")
    archive: Bytes = setting(64 << 30, "Of the archive of a session that is imported.")
    stored: Bytes = setting(8 << 30, "Of all stored responses and conversations together.")
    headers: Bytes = setting(64 << 10, "Of one request, all together; more is a 431.")
    inflight: int = setting(64, "Requests of one key at a time; more are a 429.", "live", ge=1)
    connections: int = setting(1024, "Requests at a time, of all; more are a 503.", ge=1)
    request_timeout: Duration = setting(
        3600.0, "Longest time of one request, its answer included.", "live"
    )
    read_timeout: Duration = setting(30.0, "Longest wait for the next piece of a request.", "live")
    write_timeout: Duration = setting(
        60.0, "Longest wait for a client to take a piece of its answer.", "live"
    )


class ServerSection(Section):
    """Where the daemon listens, and who may talk to it."""

    host: str = setting("127.0.0.1", "Address to listen on. Others than loopback need keys.")
    port: int = setting(8000, "0: any that is free.", ge=0, le=65535)
    uds: Path | None = setting(None, "Listen on this Unix socket (0600) instead of a port.")
    api_keys_file: Path | None = setting(
        None, "File of keys, one `name:sha256` a line; `offload config key NAME` makes one.", "live"
    )
    api_key: SecretStr | None = setting(
        None, "One key, of tenant `default`, an administrator. Write `${env:NAME}`.", "live"
    )
    allow_insecure: bool = setting(False, "Listen beyond loopback without any key.")
    allowed_hosts: tuple[str, ...] = setting(
        (),
        "More names of this server, for browsers; without keys only loopback's names pass.",
        "live",
    )
    cors_origins: tuple[str, ...] = setting(
        (), "Web pages of these origins may talk to the daemon."
    )
    sse_keepalive: Duration = setting(15.0, "A sign of life in streams that often, at least.")
    drain_timeout: Duration = setting(
        30.0, "What running requests get to finish, at the end.", "live"
    )
    default_max_tokens: int | None = setting(
        None,
        "Of an answer, where a client says nothing (default: until the context is full).",
        ge=1,
    )
    accept_any_model: bool = setting(False, "Serve requests that name another model.")
    id_headers: tuple[str, ...] = setting(
        (), "Headers that name a session, after those that are always looked at."
    )
    limits: LimitsSection = setting(LimitsSection(), "")

    @property
    def is_loopback(self) -> bool:
        """Whether nobody but this machine can connect."""
        if self.uds is not None or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False

    @property
    def has_keys(self) -> bool:
        """Whether clients have to show a key."""
        return self.api_keys_file is not None or self.api_key is not None


class Configuration(BaseSettings):
    """Everything that can be set; see ``offload config schema``.

    Build it with ``config_sources.load_configuration``: that merges command line, environment and
    file, and names unknown keys.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True
    )

    version: Literal[1] = setting(1, "Of this format.")
    data_path: Path | None = setting(
        None, "Folder of saved sessions and of the server's secret (0700)."
    )
    model: ModelSection = setting(ModelSection(), "")
    server: ServerSection = setting(ServerSection(), "")
    tiers: TiersSection = setting(TiersSection(), "")
    running: RunningSection = setting(RunningSection(), "")
    sessions: SessionsSection = setting(SessionsSection(), "")
    metrics: MetricsSection = setting(MetricsSection(), "")
    logging: LoggingSection = setting(LoggingSection(), "")
    ui: UiSection = setting(UiSection(), "")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take what is given: ``config_sources`` has merged it, and knows who said what."""
        return (init_settings,)

    @model_validator(mode="after")
    def _refuse_open_server(self) -> Self:
        server = self.server
        if not (server.is_loopback or server.has_keys or server.allow_insecure):
            raise ValueError(
                f"server.host is {server.host}, which others can reach, and there are no keys: set "
                "server.api_keys_file, or server.allow_insecure if a proxy asks for them"
            )
        return self
