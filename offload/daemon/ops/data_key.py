"""The key of everything below the data path, which the key of the configuration opens."""

from pathlib import Path

from offload.daemon.ops.config_sections import EncryptionSection
from offload.errors import ConfigError
from offload.key_files import TENANTS, read_key_file
from offload.sessions.key_file import open_key
from offload.tiers.sealing import Sealer

_CONTENT = (TENANTS, "http.sqlite3")


def open_data_key(section: EncryptionSection, data_path: Path) -> Sealer | None:
    """Return what encrypts the data of the daemon; None if nothing does.

    Raises
    ------
    ConfigError
        There is no key, or it is not that of the data; or what is there is not encrypted.
    StorageError
    """
    key = None
    if section.enabled:
        if section.key_file is None:
            raise ConfigError("tiers.disk.encryption.enabled needs tiers.disk.encryption.key_file")
        key = read_key_file(section.key_file)
        try:
            data_path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot use {data_path}: {error.strerror}") from error

    def is_new() -> bool:
        return not any((data_path / name).exists() for name in _CONTENT)

    return open_key(data_path, key, is_new)
