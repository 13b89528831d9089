"""The exceptions of the runtime.

::

    OffloadError
    ├── ConfigError (ValueError)        asked for something impossible; nothing was started
    │   ├── SessionNotFound (LookupError)
    │   ├── SessionInUse                somebody has the session open
    │   └── NamespaceMismatch           a session of another model, dtype, layout or tenant
    ├── CapacityError                   a tier cannot hold what was asked
    ├── ClosedError (RuntimeError)      the object was closed
    ├── TransferError
    │   ├── TransferTimeout (TimeoutError)
    │   └── TransferCancelled
    └── StorageError (OSError)          the disk refused
        ├── CorruptChunk                a record is not what was written
        ├── CorruptCatalog              the index of a session store is damaged
        └── DiskFull                    no space left on the device

Every leaf mixes in the builtin that a caller would already catch. Messages say what was asked,
what was found, and the number.
"""


class OffloadError(Exception):
    """Root of every error this package raises on purpose."""


class ConfigError(OffloadError, ValueError):
    """The request cannot be met as written; raised before any work is done."""


class SessionNotFound(ConfigError, LookupError):
    """There is no session of that name, or it has expired."""


class SessionInUse(ConfigError):
    """A cache, perhaps of another process, has the session open.

    Parameters
    ----------
    message : str
    left_s : float or None
        Seconds after which it may be had, if nobody asks for it before; None: nobody knows.
    """

    def __init__(self, message: str, left_s: float | None = None) -> None:
        super().__init__(message)
        self.left_s = left_s


class NamespaceMismatch(ConfigError):
    """The session was made by another model, dtype, layout or tenant; names the field."""


class CapacityError(OffloadError):
    """A tier has no room for what was asked; the chunk stays where it was."""


class ClosedError(OffloadError, RuntimeError):
    """The cache or tier was closed."""


class TransferError(OffloadError):
    """A copy between tiers did not finish; the source still holds the data."""


class TransferTimeout(TransferError, TimeoutError):
    """A transfer missed its deadline. The message names the transfer."""


class TransferCancelled(TransferError):
    """A transfer was cancelled before it moved anything."""


class StorageError(OffloadError, OSError):
    """The file system refused a read or write."""


class CorruptChunk(StorageError):
    """A record on disk is not what was written: truncated, flipped, or another chunk's."""


class CorruptCatalog(StorageError):
    """The index of a session store is damaged; it can be made again from the files."""


class DiskFull(StorageError):
    """The device has no space left; the chunk stays in the tier above."""
