"""Configuration files: YAML or TOML into plain values, with ``${env:NAME}`` filled in."""

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml  # type: ignore[import-untyped]

from offload.errors import ConfigError

_FROM_ENV: Final = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)\}")
_MAX_BYTES: Final = 1 << 20


def read_config_file(path: Path, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Read a configuration file.

    Parameters
    ----------
    path : Path
        TOML if it ends in ``.toml``, else YAML.
    env : mapping of str to str, optional
        What ``${env:NAME}`` may name; the process's environment by default.

    Raises
    ------
    ConfigError
        The file cannot be read or parsed, is no mapping, or names a variable that is not set.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if len(content) > _MAX_BYTES:
        raise ConfigError(f"{path} has {len(content)} bytes; a configuration has {_MAX_BYTES}")
    try:
        values = _parse(path, content.decode())
    except (tomllib.TOMLDecodeError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is a {type(values).__name__}, not sections with keys")
    filled: dict[str, Any] = _filled(values, os.environ if env is None else env, path)
    return filled


def _parse(path: Path, text: str) -> Any:
    return tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)


def _filled(value: Any, env: Mapping[str, str], path: Path) -> Any:
    if isinstance(value, dict):
        return {str(key): _filled(item, env, path) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, env, path) for item in value]
    if not isinstance(value, str):
        return value

    def found(match: re.Match[str]) -> str:
        if match[1] not in env:
            raise ConfigError(f"{path}: the variable {match[1]} of {match[0]} is not set")
        return env[match[1]]

    return _FROM_ENV.sub(found, value)
