"""What an object store's refusals mean: try again, give up, or it is simply not there.

``obstore`` tells statuses apart only in its messages. These can carry URLs with signatures, so what
is quoted from them is the status, the store's own code for it, and the kind of a network error.
"""

import errno
import re
from enum import Enum, auto

from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    UnauthenticatedError,
)

from offload.errors import ConfigError, CorruptChunk, DiskFull, OffloadError, StorageError

REFUSALS = (BaseError, OSError, NotImplementedError)
"""What calls of ``obstore`` raise."""

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w{1,64})</Code>")
_NETWORK = re.compile(r"kind: (Timeout|Connect|Request|Interrupted|Decode)\b")
_QUERY = re.compile(r"\?\S*|[^/\s]*@")
"""Of URLs: signatures, users and passwords."""
_MOST_CHARS = 300
_RETRIED = {408, 425, 429, 500, 502, 503, 504}
_CONFLICTS = {"ConditionalRequestConflict", "OperationAborted"}
"""Two conditional writes met, and neither may have happened."""
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
_SKEWED = {"RequestTimeTooSkewed"}
_NO_BUCKET = {"NoSuchBucket", "ContainerNotFound", "NoSuchContainer"}
_FULL = {"InsufficientStorage", "QuotaExceeded", "XMinioStorageFull"}


class Refusal(Enum):
    """What to make of an error."""

    MISSING = auto()
    EXISTS = auto()
    PASSING = auto()
    """Another try may succeed."""
    FINAL = auto()


def classify(error: Exception) -> Refusal:
    """Return what to make of an error of ``obstore``."""
    status, code = _parts(error)
    if isinstance(error, FileNotFoundError):
        return Refusal.FINAL if code in _NO_BUCKET else Refusal.MISSING
    if code in _CONFLICTS:
        return Refusal.PASSING
    if isinstance(error, AlreadyExistsError):
        return Refusal.EXISTS
    if isinstance(error, (PermissionDeniedError, UnauthenticatedError, NotImplementedError)):
        return Refusal.FINAL
    if status is not None:
        return Refusal.PASSING if status in _RETRIED else Refusal.FINAL
    is_network = _NETWORK.search(str(error)) is not None
    is_cut = "non-partial response" in str(error)
    return Refusal.PASSING if is_network or is_cut else Refusal.FINAL


def as_ours(error: Exception, what: str) -> OffloadError:
    """Return our error for one of ``obstore``.

    Parameters
    ----------
    error : Exception
    what : str
        What was asked, with the URL as ``without_secrets`` gives it.
    """
    status, code = _parts(error)
    said = describe(error)
    if code in _NO_BUCKET:
        return ConfigError(f"{what}: there is no such bucket ({said})")
    if isinstance(error, NotImplementedError):
        return ConfigError(f"{what}: the store cannot do this ({said})")
    if code in _SKEWED:
        return StorageError(
            errno.EACCES, f"{what}: the clocks of this machine and of the store differ ({said})"
        )
    if code in _EXPIRED:
        return StorageError(errno.EACCES, f"{what}: the credentials have expired ({said})")
    if isinstance(error, (PermissionDeniedError, UnauthenticatedError)):
        return StorageError(errno.EACCES, f"{what}: the credentials do not allow it ({said})")
    if status == 416 or "range was invalid" in str(error):
        return CorruptChunk(f"{what}: the object ends before ({said})")
    if status == 507 or code in _FULL or "(os error 28)" in str(error):
        return DiskFull(errno.ENOSPC, f"{what}: the store is full ({said})")
    return StorageError(errno.EIO, f"{what}: refused ({said})")


def describe(error: Exception) -> str:
    """Return an error in a few words, none of them secret."""
    status, code = _parts(error)
    if status is not None:
        return f"status {status} {code}".rstrip()
    network = _NETWORK.search(str(error))
    if network is not None:
        return f"network: {network[1].lower()}"
    return _QUERY.sub("", str(error).partition("\n")[0])[:_MOST_CHARS]


def _parts(error: Exception) -> tuple[int | None, str]:
    text = str(error)
    status, code = _STATUS.search(text), _CODE.search(text)
    return None if status is None else int(status[1]), "" if code is None else code[1]
