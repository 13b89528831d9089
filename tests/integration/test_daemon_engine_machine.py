"""Any order of requests, departures and changes of sessions, against plain generation."""

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from offload.daemon.errors import DaemonError, SessionBusy
from offload.daemon.requests import Sampling
from tests.support.daemon import Client, Stepped, greedy, settings_in, tiny

NAMES = st.sampled_from(["a", "b", None])
TENANTS = st.sampled_from(["ann", "bob"])
SEEDS = st.integers(0, 3)
LENGTHS = st.sampled_from([1, 3, 7, 8, 9, 17, 40, 120])
PROMPTS = st.tuples(TENANTS, NAMES, SEEDS, LENGTHS, LENGTHS, LENGTHS)
"""Whose, of which session, which text, and tokens of its beginning, of its own, and to answer."""


class EngineMachine(RuleBasedStateMachine):
    """Every answer must be the model's own, whatever was known, shared, moved or lost before."""

    architecture = "qwen3"

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="engine-machine-"))
        self.model = tiny(self.architecture)
        self.told: list[tuple[str, list[int]]] = []
        self.asked: list[Client] = []

    @initialize(tight=st.booleans())
    def open(self, tight: bool) -> None:
        # 150 slots of 4 KiB are a few conversations; the rest has to go to the disk.
        small = {"gpu": "640KiB", "cpu": "96KiB", "disk": "384KiB"}
        changes = {"capacity": small} if tight else {}
        self.settings = settings_in(
            self.folder, idle_to_disk_s=None, idle_to_host_s=None, **changes
        )
        self.engine = Stepped(self.model, self.settings)

    @rule(prompts=st.lists(PROMPTS, min_size=1, max_size=5))
    def ask(self, prompts: list[tuple[str, str | None, int, int, int, int]]) -> None:
        for tenant, name, seed, shared, own, count in prompts:
            ids = [3 + i * 7 % 80 for i in range(shared)]
            self._ask(tenant, name, ids + [3 + (i * i + seed) % 80 for i in range(own)], count)

    @precondition(lambda self: self.told)
    @rule(which=st.integers(0, 9), name=NAMES, own=LENGTHS, count=LENGTHS, cut=LENGTHS)
    def go_on(self, which: int, name: str | None, own: int, count: int, cut: int) -> None:
        tenant, ids = self.told[which % len(self.told)]
        kept = ids[: max(1, len(ids) - cut)] if own % 2 else ids
        self._ask(tenant, name, kept[:200] + [5 + i % 60 for i in range(own)], count)

    @rule(number=st.sampled_from([1, 2, 5, 30]))
    def take_turns(self, number: int) -> None:
        for _ in range(number):
            self.engine.turn()
        self._compare()

    @precondition(lambda self: self.asked)
    @rule(which=st.integers(0, 9))
    def leave(self, which: int) -> None:
        client = self.asked[which % len(self.asked)]
        client.leave()
        self.asked.remove(client)
        self.engine.turn()

    @rule(tenant=TENANTS, which=st.integers(0, 9), to=st.sampled_from(["host", "disk"]))
    def evict(self, tenant: str, which: int, to: str) -> None:
        views = self.engine.keeper.list(tenant)
        if views:
            view = views[which % len(views)]
            try:
                self.engine.keeper.evict(tenant, view.name, to)
            except SessionBusy:
                assert view.state == "running"
        self.engine.check()

    @rule(tenant=TENANTS, which=st.integers(0, 9), share=st.floats(0, 1))
    def fork(self, tenant: str, which: int, share: float) -> None:
        views = self.engine.keeper.list(tenant)
        if views:
            view = views[which % len(views)]
            place = int(share * view.num_tokens)
            name = f"fork-{len(views)}-{place}"
            if all(each.name != name for each in views):
                copy = self.engine.keeper.fork(tenant, view.name, name, place)
                assert copy.num_tokens == place
        self.engine.check()

    @rule(tenant=TENANTS, which=st.integers(0, 9))
    def persist(self, tenant: str, which: int) -> None:
        views = self.engine.keeper.list(tenant)
        if views:
            view = self.engine.keeper.persist(tenant, views[which % len(views)].name)
            assert not view.dirty_tokens
        self.engine.check()

    @rule(tenant=TENANTS, which=st.integers(0, 9))
    def delete(self, tenant: str, which: int) -> None:
        views = self.engine.keeper.list(tenant)
        if views:
            try:
                self.engine.keeper.delete(tenant, views[which % len(views)].name)
            except SessionBusy:
                assert views[which % len(views)].state == "running"
        self.engine.check()

    @precondition(lambda self: len(self.told) > 2)
    @rule(crash=st.booleans())
    def restart(self, crash: bool) -> None:
        if crash:
            self.engine.crash()
        else:
            self.engine.close()
        self.asked = []
        self.engine = Stepped(self.model, self.settings)

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.engine.finish()
            self._compare()
            self.engine.close()
        shutil.rmtree(self.folder)

    def _ask(self, tenant: str, name: str | None, ids: list[int], count: int) -> None:
        sampling = Sampling(temperature=0.0, max_tokens=count, ignore_eos=True)
        try:
            client = self.engine.ask(ids, tenant=tenant, session=name, sampling=sampling)
        except DaemonError:
            return
        self.asked.append(client)

    def _compare(self) -> None:
        for client in list(self.asked):
            if not client.is_done:
                continue
            self.asked.remove(client)
            assert client.error is None, client.error
            ids = list(client.asked.token_ids)
            count = client.asked.sampling.max_tokens
            assert count is not None
            assert client.tokens == greedy(self.model, ids, count)
            assert client.started.cached.total < len(ids)
            self.told = self.told[-9:]
            self.told.append((client.asked.tenant, ids + client.tokens))


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=10, stateful_step_count=20)
