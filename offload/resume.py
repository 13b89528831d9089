"""Save a cache as a session, load it again, and reuse what others have saved."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from offload.core import CacheCore
from offload.errors import ConfigError, NamespaceMismatch
from offload.identity import find_model, identify
from offload.layer_state import pack_layer, restore_layer
from offload.layers import OffloadedLayer
from offload.saved_indexes import INDEXES, pack_indexes, restore_indexes
from offload.session_link import SessionLink, common_length
from offload.sessions.listing import SessionInfo
from offload.sessions.namespace import make_namespace, model_digest, model_fields
from offload.sessions.opening import Held
from offload.sessions.session_file import SessionFile
from offload.sessions.store import SessionStore

Store = SessionStore | str | Path | None


def link_to(core: CacheCore, store: Store) -> SessionLink:
    """Return the bond of a cache with a store, opening the store if a path is given."""
    if isinstance(store, SessionStore):
        opened, owns = store, False
    else:
        path = None if store is None else Path(store).expanduser().absolute()
        for (root, _), link in core.links.items():
            if path is None or root == path:
                return link
        opened, owns = SessionStore(path), True
    link = SessionLink(opened, owns_store=owns)
    link = core.links.setdefault(link.key, link)
    if owns and link.store is not opened:
        opened.close()
    return link


def save(
    core: CacheCore,
    layers: list[Any],
    name: str,
    store: Store,
    model: PreTrainedModel,
    weights_id: str | None,
    token_ids: Tensor | None,
    ttl_s: float | None,
    pin: bool,
    progress: Callable[[int, int], object],
) -> tuple[SessionInfo, Tensor | None]:
    """Save a cache; see ``OffloadedCache.save``. Returns the token ids that were kept as well."""
    core.check_open()
    if core.runtime is None:
        raise ConfigError(
            "there is nothing to save: the cache is empty, or no layer of the model is offloaded"
        )
    link, runtime = link_to(core, store), core.runtime
    num_rows = next(iter(runtime.layers.values())).tables.num_rows
    ids = _fit_tokens(token_ids, num_rows, common_length(runtime))
    tensors: dict[str, Tensor] = {}
    state: dict[str, Any] = {}
    for index, layer in enumerate(layers):
        found, packed = pack_layer(layer, f"layer.{index}")
        if packed:
            tensors.update(found)
            state[str(index)] = packed
    facts, salt = _identity(model, weights_id), link.store.salt
    namespace = make_namespace(facts, runtime.engine.layout, sorted(runtime.layers), salt)
    with runtime.engine.lock:
        found, packed_indexes = pack_indexes(runtime)
        if packed_indexes:
            tensors.update(found)
            state[INDEXES] = packed_indexes
        content = link.content(runtime, namespace, ids, tensors, state)
        saved = link.store.save(name, content, ttl_s=ttl_s, pin=pin, progress=progress)
        link.adopt_saved(runtime, saved, is_shared=core.is_shared)
    return link.store.info(name), ids


def open_session(
    store: Store, name: str, model: PreTrainedModel, weights_id: str | None
) -> tuple[SessionStore, bool, SessionFile, Held]:
    """Open a session for a model.

    Returns
    -------
    store, owns_store, file, held

    Raises
    ------
    NamespaceMismatch
        Another model, dtype or tenant made it; names the first field that differs.
    """
    owns = not isinstance(store, SessionStore)
    opened = store if isinstance(store, SessionStore) else SessionStore(store)
    try:
        file, held = opened.open(name)
        try:
            facts, layers = _identity(model, weights_id), list(file.layers)
            expected = make_namespace(facts, file.layout, layers, opened.salt)
            difference = file.namespace.difference(expected)
            if difference is not None:
                raise NamespaceMismatch(f"session {name!r} does not fit the model: {difference}")
        except BaseException:
            held.release()
            raise
    except BaseException:
        if owns:
            opened.close()
        raise
    return opened, owns, file, held


def restore(
    core: CacheCore,
    layers: list[Any],
    link: SessionLink,
    file: SessionFile,
    held: Held,
    device: torch.device,
) -> None:
    """Fill a cache that was just made with a session.

    Raises
    ------
    NamespaceMismatch
        The model offloads other layers.
    """
    ours = [i for i, layer in enumerate(layers) if isinstance(layer, OffloadedLayer)]
    if tuple(ours) != file.layers:
        held.release()
        raise NamespaceMismatch(
            f"session {file.name!r} holds layers {list(file.layers)}, the model offloads {ours}"
        )
    try:
        runtime = core.open(file.layout, len(file.rows), device)
    except BaseException:
        held.release()
        raise
    link.restore(runtime, held, file.layers, file.tensors)
    for index, packed in file.state.items():
        if index != INDEXES:
            restore_layer(layers[int(index)], packed, file.tensors, device)
    restore_indexes(runtime, file.state.get(INDEXES, ()), file.tensors)


def fill(
    core: CacheCore,
    layers: list[Any],
    store: SessionStore,
    name: str,
    model: PreTrainedModel,
    weights_id: str | None,
) -> Tensor | None:
    """Fill an empty cache, perhaps a fork, with a session; returns the session's token ids.

    Raises
    ------
    SessionNotFound, NamespaceMismatch, CorruptChunk
        As ``OffloadedCache.load`` does. The cache may hold a part of the session: close it.
    ConfigError
        The session's chunks are of another layout than those of the cache's other forks.
    CapacityError
    """
    _, _, file, held = open_session(store, name, model, weights_id)
    restore(core, layers, link_to(core, store), file, held, model.device)
    return file.token_ids


def reuse(
    core: CacheCore,
    layers: list[Any],
    store: Store,
    token_ids: Tensor,
    model: PreTrainedModel,
    weights_id: str | None,
) -> int:
    """Fill an empty cache with the longest known prefix; see ``OffloadedCache.reuse``."""
    ours = [i for i, layer in enumerate(layers) if isinstance(layer, OffloadedLayer)]
    ids = _as_rows(token_ids)
    if len(ours) != len(layers) or core.config.scratch is None:
        return 0  # a window or a recurrent state cannot be had for a prefix
    link = link_to(core, store)
    size, salt = core.config.chunk_tokens, link.store.salt
    facts = _identity(model, weights_id)
    usable = ids[:, : max(0, ids.shape[1] - 1)]  # one token is left to ask the model about
    found = link.store.find_prefix(
        model_digest(model_fields(facts, salt)),
        size,
        usable,
        lambda layout: make_namespace(facts, layout, ours, salt).digest,
        ours,
    )
    if found is None:
        return 0
    layout, held = found
    try:
        runtime = core.open(layout, ids.shape[0], model.device)
    except BaseException:
        held.release()
        raise
    link.restore(runtime, held, ours, None)
    return len(held.rows[0]) * size


def the_model(model: Any, config: Any) -> PreTrainedModel:
    """Return the model whose keys and values a cache holds.

    Raises
    ------
    ConfigError
        It was not given, and cannot be found.
    """
    if model is not None:
        if not isinstance(model, PreTrainedModel):
            raise ConfigError(f"model must be a transformers model, not {type(model).__name__}")
        return model
    if config is None:
        raise ConfigError("which model filled the cache? pass model=")
    return find_model(config)


def _identity(model: PreTrainedModel, weights_id: str | None) -> Mapping[str, str]:
    return dataclasses.asdict(identify(model, weights_id))


def _as_rows(token_ids: Tensor) -> Tensor:
    ids = torch.as_tensor(token_ids).detach().cpu()
    if ids.is_floating_point() or ids.dim() not in (1, 2) or not ids.numel():
        raise ConfigError(
            f"token ids are integers [num_rows, num_tokens], not {ids.dtype} {list(ids.shape)}"
        )
    return ids.to(torch.int64).reshape(-1, ids.shape[-1])


def _fit_tokens(token_ids: Tensor | None, num_rows: int, num_tokens: int) -> Tensor | None:
    """Return the ids of the tokens in the cache; generated text has one more at its end."""
    if token_ids is None:
        return None
    ids = _as_rows(token_ids)
    if ids.shape[0] != num_rows or ids.shape[1] < num_tokens:
        raise ConfigError(
            f"the cache holds {num_rows} rows of {num_tokens} tokens, token_ids has "
            f"{ids.shape[0]} rows of {ids.shape[1]}"
        )
    return ids[:, :num_tokens].contiguous()
