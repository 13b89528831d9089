"""Open object stores by their URLs, and name them without secrets."""

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from obstore.store import ObjectStore, from_url

from offload.errors import ConfigError
from offload.tiers.remote_errors import REFUSALS

_ALLOW_HTTP = ("AWS_ALLOW_HTTP", "AZURE_ALLOW_HTTP", "GOOGLE_ALLOW_HTTP")


def without_secrets(url: str) -> str:
    """Return a URL without user, password, query and fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def open_store(url: str, request_s: float, options: Mapping[str, Any]) -> ObjectStore:
    """Open the object store of a URL; nothing is asked of it.

    Parameters
    ----------
    url : str
    request_s : float
        Longest single request.
    options : mapping
        Of ``obstore``.

    Raises
    ------
    ConfigError
        The URL or an option is none that ``obstore`` knows.
    """
    request = timedelta(seconds=request_s)
    client = {
        "timeout": request,
        "connect_timeout": min(request, timedelta(seconds=5)),
        # Options given here replace those that the environment has.
        "allow_http": any(os.environ.get(name, "").lower() == "true" for name in _ALLOW_HTTP),
    }
    kinds: dict[str, Any] = {}
    if url.startswith("file:"):
        kinds = {"mkdir": True}
    elif not url.startswith("memory:"):
        # Retried here, where the deadline and the pauses are ours.
        retry = {"max_retries": 0, "retry_timeout": request}
        kinds = {"client_options": {**client, **options.get("client_options", {})}}
        kinds |= {"retry_config": retry}
    others = {name: value for name, value in options.items() if name != "client_options"}
    try:
        store: ObjectStore = from_url(url, **kinds, **others)
    except (*REFUSALS, ValueError, TypeError) as error:
        raise ConfigError(
            f"{without_secrets(url)!r} is no object store that can be opened "
            f"({type(error).__name__}); known: s3://, gs://, az://, file:///, memory:///"
        ) from error
    return store
