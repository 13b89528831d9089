"""The session of ``offload generate``: a text that one run ends and a later one goes on with."""

import time
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from offload.cache import OffloadedCache
from offload.cli_progress import count_progress
from offload.errors import ConfigError, SessionNotFound
from offload.prefill import prefill
from offload.sessions.listing import SessionInfo
from offload.sessions.names import check_name
from offload.sessions.store import SessionStore

_MIN_TTL_S: Final = 1.0
"""What is left to a session that has expired while it was being continued."""


class TextSession:
    """One session of a store, looked up before the model is loaded, and saved after it has run.

    Parameters
    ----------
    store : SessionStore
        To be closed after the cache.
    name : str

    Raises
    ------
    ConfigError
        It is no name for a session, or the session is no text that can be continued.
    """

    def __init__(self, store: SessionStore, name: str) -> None:
        self._store = store
        self._name = check_name(name)
        self._before = _find(store, name)

    @property
    def is_new(self) -> bool:
        """Whether there is nothing to resume."""
        return self._before is None

    def load(self, model: PreTrainedModel, settings: Mapping[str, Any]) -> OffloadedCache:
        """Return the cache of a session that is there; settings are those of ``OffloadedCache``."""
        return OffloadedCache.load(self._name, model, store=self._store, **settings)

    def reuse(self, cache: OffloadedCache, model: PreTrainedModel, token_ids: Tensor) -> int:
        """Fill an empty cache with what other sessions know; return the tokens that it then has."""
        return cache.reuse(token_ids, model, store=self._store)

    def save(self, cache: OffloadedCache, model: PreTrainedModel, token_ids: Tensor) -> SessionInfo:
        """Save a text, but for the token that ended it; it stays pinned, and expires, as before.

        Parameters
        ----------
        cache : OffloadedCache
        model : PreTrainedModel
        token_ids : Tensor, int64 [1, num_tokens]
            All of it, with tokens that the model has not seen yet.
        """
        if int(token_ids[0, -1]) in _end_tokens(model):
            token_ids = token_ids[:, :-1]
        # The token that was chosen last is in no cache yet; the next run is to read it.
        unseen = token_ids[:, cache.get_seq_length() :]
        prefill(model, cache, unseen, max(1, unseen.shape[1]), lambda count: None)
        before, ttl_s = self._before, None
        if before is not None and before.expires_at is not None:
            ttl_s = max(_MIN_TTL_S, before.expires_at - time.time())
        with count_progress(f"saving {self._name}", "chunks") as progress:
            return cache.save(
                self._name,
                store=self._store,
                model=model,
                token_ids=token_ids,
                ttl_s=ttl_s,
                pin=before is not None and before.is_pinned,
                progress=progress,
            )


def _find(store: SessionStore, name: str) -> SessionInfo | None:
    try:
        info = store.info(name)
    except SessionNotFound:
        return None
    if info.num_rows != 1:
        raise ConfigError(f"session {name!r} has {info.num_rows} rows; one can be continued")
    if store.describe(name).token_ids is None:
        raise ConfigError(f"session {name!r} was saved without its tokens; its text is unknown")
    return info


def _end_tokens(model: PreTrainedModel) -> list[int]:
    config = model.generation_config
    found = None if config is None else config.eos_token_id
    if found is None:
        return []
    return [found] if isinstance(found, int) else list(torch.as_tensor(found).reshape(-1).tolist())
