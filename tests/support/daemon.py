"""An engine of the daemon over tiny models, run turn by turn on the test's own thread."""

import asyncio
import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from offload.daemon.engine_settings import EngineSettings, SessionSettings
from offload.daemon.requests import (
    Event,
    Finished,
    GenerationRequest,
    PrefillProgress,
    Sampling,
    Started,
    Token,
)
from offload.daemon.served_model import ServedModel, load_served_model, serve
from offload.daemon.work.mailbox import Mailbox
from offload.daemon.work.worker import Worker
from tests.support.models import make_model

CHUNK_TOKENS = 8
CAPACITY = {"gpu": "8MiB", "cpu": "8MiB", "disk": "64MiB"}
GREEDY = Sampling(temperature=0.0, max_tokens=8, ignore_eos=True)


@functools.cache
def recall() -> ServedModel:
    return load_served_model()


@functools.cache
def tiny(name: str = "qwen3") -> ServedModel:
    """Return a random model, with the byte tokenizer of the recall model."""
    return serve(make_model(name), recall().tokenizer, name)


def settings_in(path: Path, **changes: Any) -> EngineSettings:
    """Return settings of a small engine; those of its sessions go by their own names."""
    own = {name for name in changes if name in SessionSettings.__dataclass_fields__}
    sessions = {"auto_create_min_tokens": 4, **{name: changes.pop(name) for name in own}}
    defaults: dict[str, Any] = {
        "capacity": CAPACITY,
        "chunk_tokens": CHUNK_TOKENS,
        "prefill_tokens": 16,
        "min_free_bytes": 0,
    }
    return EngineSettings(path, **{**defaults, **changes}, sessions=SessionSettings(**sessions))


def sampled(**changes: Any) -> Sampling:
    """Return ``GREEDY`` with changes."""
    return dataclasses.replace(GREEDY, **changes)


def request(ids: Sequence[int], tenant: str = "ann", **changes: Any) -> GenerationRequest:
    sampling = changes.pop("sampling", GREEDY)
    return GenerationRequest("r", tenant, tuple(ids), sampling, **changes)


@torch.no_grad()
def greedy(model: ServedModel, ids: Sequence[int], count: int) -> list[int]:
    """Return what the model alone generates with transformers' own cache."""
    cache, found = DynamicCache(config=model.model.config), list(ids)
    fed = 0
    for _ in range(count):
        new = torch.tensor([found[fed:]])
        fed = len(found)
        found.append(int(model.model(input_ids=new, past_key_values=cache).logits[0, -1].argmax()))
    return found[len(ids) :]


class Client:
    """One request, and what has come of it."""

    def __init__(self, stepped: "Stepped", asked: GenerationRequest) -> None:
        self.asked = asked
        self.events: list[Event] = []
        self.error: Exception | None = None
        self._stepped = stepped
        self._mailbox = stepped.loop.run_until_complete(_make_mailbox())
        self._ticket = stepped.worker.submit(asked, self._mailbox)
        stepped.clients.append(self)

    @property
    def tokens(self) -> list[int]:
        return [event.token_id for event in self.events if isinstance(event, Token)]

    @property
    def text(self) -> str:
        parts = [event.text for event in self.events if isinstance(event, Token | Finished)]
        return "".join(parts)

    @property
    def started(self) -> Started:
        [event] = [event for event in self.events if isinstance(event, Started)]
        return event

    @property
    def progress(self) -> list[int]:
        return [each.num_done for each in self.events if isinstance(each, PrefillProgress)]

    @property
    def finished(self) -> Finished:
        self.take()
        assert self.error is None, self.error
        event = self.events[-1]
        assert isinstance(event, Finished)
        return event

    @property
    def is_done(self) -> bool:
        self.take()
        return self.error is not None or bool(self.events and isinstance(self.events[-1], Finished))

    def take(self) -> None:
        while self._mailbox.backlog:
            item = self._stepped.loop.run_until_complete(self._mailbox.take())
            if isinstance(item, Exception):
                self.error = item
            else:
                self.events.append(item)

    def leave(self) -> None:
        self.take()
        self._stepped.clients.remove(self)
        self._stepped.worker.leave(self._ticket, self._mailbox)


class Stepped:
    """A real worker without its thread. Every turn checks that the tiers are sound."""

    def __init__(self, model: ServedModel, settings: EngineSettings) -> None:
        self.loop = asyncio.new_event_loop()
        self.worker = Worker(model, settings)
        self.worker.open()
        self.clients: list[Client] = []

    @property
    def keeper(self) -> Any:
        return self.worker.keeper

    def ask(self, ids: Sequence[int], **changes: Any) -> Client:
        return Client(self, request(ids, **changes))

    def turn(self) -> None:
        self.worker.turn()
        self.check()

    def finish(self, *clients: Client, most: int = 2000) -> None:
        """Take turns until some clients are done; all, if none are given."""
        wanted = clients or tuple(self.clients)
        for _ in range(most):
            if all(client.is_done for client in wanted):
                return
            self.turn()
        raise AssertionError(f"not done after {most} turns")

    def run(self, ids: Sequence[int], **changes: Any) -> Client:
        """Ask, and wait for the end."""
        client = self.ask(ids, **changes)
        self.finish(client)
        assert client.error is None, client.error
        return client

    def check(self) -> None:
        """Raise AssertionError unless references, lengths and capacities are as they must be."""
        parts = self.worker.parts
        engine, book = parts.engine, parts.book
        engine.settle()
        engine.store.check_integrity()
        counted: Counter[int] = Counter()
        for cache in [parts.opener, *(branch.cache for branch in book.branches)]:
            runtime = cache._core.runtime
            for layer in () if runtime is None else runtime.layers.values():
                counted.update(layer.tables.rows[0])
        table = engine.store.table
        for chunk in table:
            assert table[chunk].ref_count == counted[chunk], f"chunk {chunk}"
        for branch in book.branches:
            assert branch.is_sound
            assert branch.cache.get_seq_length() == len(branch.tokens)
            assert branch.session is None or branch.session.branch is branch
        for tier in self.worker.snapshot(is_ready=True, is_draining=False).tiers:
            assert tier.peak_bytes <= tier.capacity_bytes, tier

    def close(self) -> None:
        try:
            self.worker.stop()
            self.worker.shut()
        finally:
            self.loop.close()

    def crash(self) -> None:
        """Give everything back but save nothing, as after a kill."""
        self.worker.parts.close()
        self.loop.close()

    def __enter__(self) -> "Stepped":
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()


async def _make_mailbox() -> Mailbox[Event | Exception]:
    return Mailbox()
