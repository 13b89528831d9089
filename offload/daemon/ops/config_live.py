"""The configuration of now: read again on SIGHUP, and swapped where that is possible."""

import functools
from collections.abc import Callable
from typing import Any

from offload.daemon.ops.access import Access, configured_keys
from offload.daemon.ops.config_text import changes
from offload.daemon.ops.configuration import Configuration
from offload.daemon.ops.logs import LOG, configure_logs
from offload.errors import ConfigError


class LiveConfiguration:
    """Holds the configuration, and reads it again.

    Whoever needs a key that reloads asks ``current`` each time. Keys that need a restart keep their
    old value there. One event loop.

    Parameters
    ----------
    current : Configuration
    read : callable
        Reads all sources again; raises ConfigError.
    access : Access
        Is given new keys.

    Attributes
    ----------
    current : Configuration
    problem : str or None
        Why what was read last could not be used.
    """

    def __init__(
        self, current: Configuration, read: Callable[[], Configuration], access: Access
    ) -> None:
        self.current = current
        self.problem: str | None = None
        self._read = read
        self._access = access

    @property
    def is_good(self) -> bool:
        """Whether what was read last could be used."""
        return self.problem is None

    def reload(self) -> bool:
        """Check everything, then swap what can be swapped; or else keep all as it is.

        Returns
        -------
        bool
            Whether the new configuration is good.
        """
        try:
            new = self._read()
            keys = configured_keys(new.server)
        except ConfigError as error:
            self.refuse(str(error))
            return False
        found = changes(self.current, new)
        live = sorted(key for key, reload in found.items() if reload == "live")
        waiting = sorted(set(found) - set(live))
        self._access.replace(keys)
        self.current = _with(self.current, new, live)
        self.problem = None
        configure_logs(self.current.logging)
        LOG.info("reloaded", changed=live, after_restart=waiting, num_keys=len(keys))
        return True

    def refuse(self, problem: str) -> str:
        """Note what is wrong with what was read last, and return it."""
        self.problem = problem
        LOG.error("reload refused", reason=problem)
        return problem


def _with(old: Configuration, new: Configuration, keys: list[str]) -> Configuration:
    """Return the old configuration with some keys of the new one."""
    changed: Configuration = functools.reduce(
        lambda merged, key: _replaced(merged, new, key.split(".")), keys, old
    )
    return changed


def _replaced(old: Any, new: Any, path: list[str]) -> Any:
    name, *rest = path
    value = getattr(new, name)
    return old.model_copy(
        update={name: _replaced(getattr(old, name), value, rest) if rest else value}
    )
