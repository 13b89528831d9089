"""What the daemon refuses. The HTTP side turns each into a status, a type and a code."""

from offload.errors import OffloadError


class DaemonError(OffloadError):
    """Something a client asked for cannot be done."""


class ContextTooLong(DaemonError, ValueError):
    """A prompt does not fit into the model's context, or leaves no room for an answer.

    Parameters
    ----------
    num_prompt_tokens, num_context_tokens : int
    """

    def __init__(self, num_prompt_tokens: int, num_context_tokens: int) -> None:
        super().__init__(
            f"the prompt has {num_prompt_tokens} tokens, the context holds {num_context_tokens}"
        )
        self.num_prompt_tokens = num_prompt_tokens
        self.num_context_tokens = num_context_tokens


class BadRequest(DaemonError, ValueError):
    """A request makes no sense.

    Parameters
    ----------
    message : str
    param : str or None
        The field that is wrong.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ModelNotFound(DaemonError, LookupError):
    """No model of that name is served."""


class UnknownSession(DaemonError, LookupError):
    """The tenant has no session of that name; another's is the same as none."""


class SessionBusy(DaemonError, RuntimeError):
    """A session is being written by another request, and others wait already.

    Parameters
    ----------
    message : str
    retry_after_s : float
    """

    def __init__(self, message: str, retry_after_s: float = 2.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(DaemonError, RuntimeError):
    """More requests wait than may.

    Parameters
    ----------
    message : str
    retry_after_s : float
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QuotaExceeded(DaemonError, RuntimeError):
    """A tenant holds as much as it may."""


class Draining(DaemonError, RuntimeError):
    """The daemon is loading or going down; another time, or another replica."""


class Incompatible(DaemonError, ValueError):
    """A session that was named explicitly belongs to another model or tenant."""
