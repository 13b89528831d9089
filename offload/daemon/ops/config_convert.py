"""The configuration in the words of the engine and of the HTTP side."""

from pathlib import Path

import psutil

from offload.daemon.engine_settings import EngineSettings, SessionSettings
from offload.daemon.http.options import ID_HEADERS, HttpOptions
from offload.daemon.ops.config_sections import TiersSection
from offload.daemon.ops.config_units import bytes_of
from offload.daemon.ops.configuration import Configuration
from offload.daemon.ops.data_key import open_data_key
from offload.daemon.sharing.sharing_settings import SharingSettings
from offload.errors import ConfigError
from offload.machine import read_gpus, read_memory
from offload.tiers.scratch import default_parent


def data_path_of(configuration: Configuration) -> Path:
    """Return the folder of what outlives the process: ``daemon`` in the cache folder by default."""
    path = configuration.data_path
    return (default_parent() / "daemon" if path is None else path.expanduser()).absolute()


def engine_settings(configuration: Configuration) -> EngineSettings:
    """Return what the engine is told.

    Raises
    ------
    ConfigError
        A size is a share of something that cannot be looked at.
    """
    tiers, running = configuration.tiers, configuration.running
    return EngineSettings(
        data_path=data_path_of(configuration),
        tiers=tiers.use,
        capacity=_capacity(configuration) or None,
        policy=tiers.policy,
        codec=_codec(tiers),
        chunk_tokens=tiers.chunk_tokens,
        max_context_tokens=configuration.model.max_context_tokens,
        prefill_tokens=running.prefill_tokens,
        max_piece_s=running.max_piece,
        max_running=running.max_running,
        max_waiting=running.max_waiting,
        queue_timeout_s=running.queue_timeout,
        min_free_bytes=tiers.disk.min_free,
        sessions=_session_settings(configuration),
        sealer=open_data_key(configuration.tiers.disk.encryption, data_path_of(configuration)),
        sharing=sharing_settings(configuration),
    )


def sharing_settings(configuration: Configuration) -> SharingSettings | None:
    """Return where sessions are shared; None: nowhere.

    Raises
    ------
    ConfigError
        Without a secret that is shared, too; or with encryption, which does not reach so far.
    """
    remote = configuration.tiers.remote
    if remote.url is None:
        if remote.secret_file is not None:
            raise ConfigError("tiers.remote.secret_file needs tiers.remote.url")
        return None
    if remote.secret_file is None:
        raise ConfigError(
            "tiers.remote.url needs tiers.remote.secret_file: daemons find each other's sessions "
            "only if they have one secret"
        )
    if configuration.tiers.disk.encryption.enabled:
        raise ConfigError(
            "tiers.remote.url is not for tiers.disk.encryption.enabled: what is shared would not "
            "be encrypted; leave out one of them"
        )
    return SharingSettings(
        remote.url, remote.secret_file, remote.lease, remote.wait, remote.required
    )


def http_options(configuration: Configuration, store_path: Path | None = None) -> HttpOptions:
    """Return what the HTTP side is told.

    Parameters
    ----------
    configuration : Configuration
    store_path : Path, optional
        Folder of stored responses, if not the data path; daemons on one machine may share it.
    """
    server, data_path = configuration.server, data_path_of(configuration)
    return HttpOptions(
        data_path=data_path,
        store_path=store_path,
        keepalive_s=server.sse_keepalive,
        send_timeout_s=server.limits.write_timeout,
        max_body_bytes=server.limits.body,
        max_import_bytes=server.limits.archive,
        max_store_bytes=server.limits.stored,
        default_max_tokens=server.default_max_tokens,
        response_ttl_s=configuration.sessions.response_ttl,
        accept_any_model=server.accept_any_model,
        id_headers=(*ID_HEADERS, *server.id_headers),
        sealer=open_data_key(configuration.tiers.disk.encryption, store_path or data_path),
    )


def _session_settings(configuration: Configuration) -> SessionSettings:
    sessions = configuration.sessions
    return SessionSettings(
        auto_create_min_tokens=sessions.auto_create_min_tokens,
        idle_to_host_s=sessions.idle_to_host,
        idle_to_disk_s=sessions.idle_to_disk,
        ttl_s=sessions.ttl,
        persist=sessions.persist,
        persist_interval_s=sessions.persist_interval,
        max_per_tenant=sessions.max_per_tenant,
        disk_quota_bytes=sessions.disk_quota,
        hard_pin_share=sessions.hard_pin_share,
        on_disconnect=sessions.on_disconnect,
    )


def _codec(tiers: TiersSection) -> str | dict[str, str]:
    return (
        tiers.codec if tiers.host.codec == "raw" else {"cpu": tiers.host.codec, "disk": tiers.codec}
    )


def _capacity(configuration: Configuration) -> dict[str, int | str]:
    """Return the capacities that were given; shares are of all that there is."""
    tiers = configuration.tiers
    given = {"gpu": tiers.device.size, "cpu": tiers.host.size, "disk": tiers.disk.size}
    return {
        tier: bytes_of(size, _total_bytes(tier, configuration)) if isinstance(size, str) else size
        for tier, size in given.items()
        if size is not None and tier in tiers.use
    }


def _total_bytes(tier: str, configuration: Configuration) -> int:
    if tier == "disk":
        path = data_path_of(configuration)
        existing = next(folder for folder in (path, *path.parents) if folder.exists())
        return int(psutil.disk_usage(str(existing)).total)
    gpus = read_gpus() if tier == "gpu" and configuration.model.device != "cpu" else ()
    return gpus[0].total_bytes if gpus else read_memory().total_bytes
