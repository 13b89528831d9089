"""Which tenant a request comes from. Knows headers and keys, and no server."""

import secrets
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Final

from offload.daemon.ops.tenants import LOCAL, ApiKey, Tenant, digest_of, read_keys

if TYPE_CHECKING:
    from offload.daemon.ops.configuration import ServerSection

OPEN_PATHS: Final = frozenset({"/health", "/v1/health", "/ready", "/ping"})
"""Probes: they say nothing about anybody."""

_BEARER: Final = "bearer "
_MAX_KEY_CHARACTERS: Final = 512


class Access:
    """Tells tenants by their keys.

    Any thread; ``replace`` swaps all keys at once, and requests under way keep their tenant.

    Parameters
    ----------
    keys : iterable of ApiKey
        None at all: everybody is the tenant ``local``, an administrator.
    """

    def __init__(self, keys: Iterable[ApiKey] = ()) -> None:
        self._keys = tuple(keys)

    @property
    def is_open(self) -> bool:
        """Whether no key is asked for."""
        return not self._keys

    def tenant_names(self) -> tuple[str, ...]:
        """Return the names of all tenants that have a key; without keys, of the only one."""
        names = {key.tenant.name for key in self._keys} or {LOCAL}
        return tuple(sorted(names))

    def replace(self, keys: Iterable[ApiKey]) -> None:
        """Use these keys from now on."""
        self._keys = tuple(keys)

    def tenant_of(self, headers: Mapping[str, str]) -> Tenant | None:
        """Return whose request it is; None: it shows no key, or none that is known.

        Parameters
        ----------
        headers : mapping of str to str
            By lower-case name. ``Authorization: Bearer`` goes before ``x-api-key``.
        """
        keys = self._keys
        if not keys:
            return Tenant(LOCAL, is_admin=True)
        shown = _shown_key(headers)
        if shown is None:
            return None
        digest = digest_of(shown)
        # Against every key, so that the time says nothing about which was near.
        found = [key for key in keys if secrets.compare_digest(key.digest, digest)]
        return found[0].tenant if found else None


def configured_keys(server: "ServerSection") -> tuple[ApiKey, ...]:
    """Return the keys that a configuration names.

    Raises
    ------
    ConfigError
        The file of keys will not do.
    """
    keys = () if server.api_keys_file is None else read_keys(server.api_keys_file.expanduser())
    if server.api_key is not None:
        keys = (*keys, ApiKey("default", digest_of(server.api_key.get_secret_value()), True))
    return keys


def _shown_key(headers: Mapping[str, str]) -> str | None:
    authorization = headers.get("authorization", "")
    if authorization[: len(_BEARER)].lower() == _BEARER:
        shown = authorization[len(_BEARER) :].strip()
    else:
        shown = headers.get("x-api-key", "").strip()
    return shown if 0 < len(shown) <= _MAX_KEY_CHARACTERS else None
