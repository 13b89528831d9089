"""Save a stream under a name, and go on with it, or ask about it, in any process."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Self

import torch
from torch import Tensor

from offload.errors import ConfigError, NamespaceMismatch
from offload.identity import identify
from offload.session_link import SessionLink
from offload.sessions.listing import SessionInfo
from offload.sessions.namespace import Namespace, make_namespace
from offload.sessions.store import SessionStore
from offload.types import ChunkLayout
from offload.video.adapter import VideoAdapter
from offload.video.stream import VideoStream
from offload.video.thumbnails import Thumbnails
from offload.video.units import UnitPlace

_UNITS, _NUMBERS, _POSITIONS, _MEANS = "units", "numbers", "positions", "means"
_VIDEO = "video"
_UNROTATED = "not rotated"
"""Instead of the rotary embedding: these keys and values are no other cache's."""


class StreamSession:
    """The bond between a stream and a session store.

    What was saved before is not written again. A stream that was loaded reads frames where they
    lie in the store. One thread; any number of processes may read what one writes.

    Parameters
    ----------
    stream : VideoStream
    name : str
    store : SessionStore
        Stays open; the caller closes it after the stream.
    """

    def __init__(self, stream: VideoStream, name: str, store: SessionStore) -> None:
        self.stream = stream
        self.name = name
        self._store = store
        self._link = SessionLink(store, owns_store=False)

    @classmethod
    def load(cls, adapter: VideoAdapter, name: str, store: SessionStore, **options: Any) -> Self:
        """Open a stream that was saved.

        Parameters
        ----------
        adapter : VideoAdapter
            Of the model that encoded it.
        name : str
        store : SessionStore
        **options
            For ``VideoStream``; there has to be a disk tier.

        Raises
        ------
        SessionNotFound
        NamespaceMismatch
            Another model, or something that is no stream.
        """
        file, held = store.open(name)
        try:
            expected = _namespace(adapter, file.layout, list(file.layers), store.salt)
            difference = file.namespace.difference(expected)
            if difference is not None or _VIDEO not in file.state:
                raise NamespaceMismatch(
                    f"session {name!r} is no stream of this model: {difference or 'no frames'}"
                )
            stream = VideoStream(adapter, **{**options, "chunk_tokens": file.layout.chunk_tokens})
        except BaseException:
            held.release()
            raise
        session = cls(stream, name, store)
        try:
            session._link.restore(stream.store.runtime, held, file.layers, file.tensors)
            places = _unpack_units(file.tensors)
            stream.restore(places, _unpack_means(file.tensors, file.layers))
            stream.thumbnails.unpack(file.tensors)
        except BaseException:
            session.close()
            raise
        return session

    def save(
        self, progress: Callable[[int, int], object] = lambda _done, _total: None
    ) -> SessionInfo:
        """Save all frames that are encoded.

        Raises
        ------
        StorageError
            The store cannot be written; what was saved before is as it was.
        """
        stream, runtime = self.stream, self.stream.store.runtime
        if not stream.num_committed:
            raise ConfigError(f"there is nothing to save under {self.name!r}: no frame was encoded")
        engine = runtime.engine
        facts = _namespace(stream.adapter, engine.layout, sorted(runtime.layers), self._store.salt)
        with engine.lock:
            tensors = {
                **_pack_units(stream.units.places),
                **_pack_means(stream, sorted(runtime.layers)),
                **stream.thumbnails.pack(),
            }
            about = {"model": stream.adapter.name, "frames": stream.units.num_frames}
            content = self._link.content(runtime, facts, None, tensors, {_VIDEO: about})
            saved = self._store.save(self.name, content, ttl_s=None, pin=False, progress=progress)
            self._link.adopt_saved(runtime, saved, is_shared=False)
        return self._store.info(self.name)

    def close(self) -> None:
        """Close the stream and let go of what the store lent. Idempotent."""
        try:
            self.stream.close()
        finally:
            self._link.close()


def read_pictures(name: str, store: SessionStore) -> tuple[Thumbnails, float]:
    """Return the pictures of a saved stream and when its last frame was shown; needs no model.

    Raises
    ------
    SessionNotFound
    ConfigError
        The session is no stream.
    """
    file = store.describe(name)
    if _VIDEO not in file.state:
        raise ConfigError(f"session {name!r} is no stream: it has no frames")
    thumbnails = Thumbnails()
    thumbnails.unpack(file.tensors)
    return thumbnails, _unpack_units(file.tensors)[-1].complete_s


def _namespace(
    adapter: VideoAdapter, layout: ChunkLayout, layers: list[int], salt: str
) -> Namespace:
    facts: Mapping[str, str] = {**asdict(identify(adapter.model)), "rotary": _UNROTATED}
    return make_namespace(facts, layout, layers, salt)


def _pack_units(places: list[UnitPlace]) -> dict[str, Tensor]:
    counts = [
        (each.first_token, each.num_tokens, each.advance, each.first_frame, each.num_frames)
        for each in places
    ]
    # Tensors have no better word for none than not a number.
    numbers = [
        (each.time_s, math.nan if each.last_s is None else each.last_s, *each.start, *each.step)
        for each in places
    ]
    return {
        f"{_VIDEO}.{_UNITS}": torch.tensor(counts, dtype=torch.int64),
        f"{_VIDEO}.{_NUMBERS}": torch.tensor(numbers, dtype=torch.float64),
        f"{_VIDEO}.{_POSITIONS}": torch.cat([each.positions for each in places], 1).contiguous(),
    }


def _unpack_units(tensors: Mapping[str, Tensor]) -> list[UnitPlace]:
    counts = tensors[f"{_VIDEO}.{_UNITS}"].tolist()
    numbers = tensors[f"{_VIDEO}.{_NUMBERS}"].tolist()
    positions = tensors[f"{_VIDEO}.{_POSITIONS}"]
    axes, places, start = len(positions), list[UnitPlace](), 0
    for (first, count, advance, frame, frames), (time_s, last_s, *rest) in zip(
        counts, numbers, strict=True
    ):
        places.append(
            UnitPlace(
                first_token=first,
                num_tokens=count,
                positions=positions[:, start : start + count],
                start=tuple(rest[:axes]),
                advance=advance,
                step=tuple(rest[axes:]),
                time_s=time_s,
                last_s=None if math.isnan(last_s) else last_s,
                first_frame=frame,
                num_frames=frames,
            )
        )
        start += count
    return places


def _pack_means(stream: VideoStream, layers: list[int]) -> dict[str, Tensor]:
    count = stream.num_committed
    return {f"{_VIDEO}.{_MEANS}.{layer}": stream.means(layer, count).cpu() for layer in layers}


def _unpack_means(tensors: Mapping[str, Tensor], layers: tuple[int, ...]) -> dict[int, Tensor]:
    return {layer: tensors[f"{_VIDEO}.{_MEANS}.{layer}"] for layer in layers}
