"""Replicas of the daemon without Ray: their slots, their hooks, and their end."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog

from offload.cli import main
from offload.daemon import replica as module
from offload.daemon.replica import Replica, ReplicaArguments
from offload.daemon.slots import claim_slot
from offload.errors import ClosedError, ConfigError

SIZES = {"tiers.device.size": "16MiB", "tiers.host.size": "16MiB", "tiers.disk.size": "64MiB"}
TEXT = "A page of text that is worth keeping. " * 4


@pytest.fixture(autouse=True)
def _same_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The process is that of pytest, and its logs are as before afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    monkeypatch.setattr(module, "prepare_process", lambda _: None)
    yield
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()


def arguments(data_path: Path, **keys: Any) -> ReplicaArguments:
    keys = {"data_path": str(data_path), "tiers.disk.min_free": 0, **SIZES, **keys}
    config = data_path / "offload.yaml"
    config.touch()
    return ReplicaArguments(config=config, set=keys, replicas=2)


@asynccontextmanager
async def replica_of(given: ReplicaArguments) -> AsyncIterator[tuple[Replica, httpx.AsyncClient]]:
    """Enter with a replica, and with a client that asks it as a proxy does."""
    replica = Replica(given, given.replicas)
    transport = httpx.ASGITransport(await replica.start(), client=("127.0.0.1", 1))
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            yield replica, client
    finally:
        await replica.stop()


async def cached_tokens(client: httpx.AsyncClient, text: str, session: str) -> int:
    body = {"prompt": text, "max_tokens": 2, "temperature": 0}
    asked = await client.post("/v1/completions", json=body, headers={"x-session-id": session})
    details = asked.raise_for_status().json()["usage"]["prompt_tokens_details"]
    return int(details["cached_tokens"])


def test_replicas_have_folders_of_their_own_and_heirs_their_sessions(tmp_path: Path) -> None:
    async def run() -> None:
        given = arguments(tmp_path)
        async with replica_of(given) as (_, first), replica_of(given) as (_, second):
            assert await cached_tokens(first, TEXT, "notes") == 0
            assert await cached_tokens(second, TEXT, "notes") == 0
        async with replica_of(given) as (heir, client):
            assert heir.record_routing_stats()["num_sessions"] == 1
            assert await cached_tokens(client, TEXT + "So?", "notes") >= len(TEXT)

    asyncio.run(run())


def test_replica_answers_on_its_socket_and_leaves_nothing(tmp_path: Path) -> None:
    socket = tmp_path / "replica-0" / "daemon.sock"

    async def run() -> None:
        async with replica_of(arguments(tmp_path)):
            assert socket.stat().st_mode & 0o777 == 0o600
            transport = httpx.AsyncHTTPTransport(uds=str(socket))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as own:
                for path in ("/metrics", "/", "/admin/api/state"):
                    assert (await own.get(path)).status_code == 200

    asyncio.run(run())
    assert not socket.exists()
    slot = claim_slot(tmp_path, 1, 0.0)
    assert slot.number == 0
    slot.release()


def test_reload_takes_live_keys_from_file_and_from_serve(tmp_path: Path) -> None:
    async def run() -> None:
        given = arguments(tmp_path)
        async with replica_of(given) as (replica, _):
            await replica.check_health()
            assert given.config is not None
            given.config.write_text("server: {limits: {inflight: 3}}")
            assert replica.reload() is None
            limits = replica._daemon.live.current.server.limits
            assert limits.inflight == 3
            replica.reconfigure({"reload": 2, "set": {"server.limits.inflight": 5}})
            assert replica._daemon.live.current.server.limits.inflight == 5
            replica.reconfigure({"set": {"server.limits.inflight": "many"}})
            assert "inflight" in (replica._daemon.live.problem or "")
            assert replica._daemon.live.current.server.limits.inflight == 5
            assert replica.reload() is None
            assert replica._daemon.live.current.server.limits.inflight == 5

    asyncio.run(run())


@pytest.mark.parametrize(
    "live_keys", [{"set": {"server.limits.inflihgt": 1}}, {"sett": {}}, {"set": 3}]
)
def test_bad_live_keys_keep_a_replica_from_starting(
    tmp_path: Path, live_keys: dict[str, Any]
) -> None:
    async def run() -> None:
        async with replica_of(arguments(tmp_path)) as (replica, _):
            with pytest.raises(ConfigError):
                replica.reconfigure(live_keys)
            await replica.check_health()
            replica.reconfigure(live_keys)
            assert replica._daemon.live.problem

    asyncio.run(run())


def test_drained_replica_is_well_and_a_dead_one_is_not(tmp_path: Path) -> None:
    async def run() -> None:
        async with replica_of(arguments(tmp_path)) as (replica, client):
            assert await replica.drain()
            await replica.check_health()
            assert (await client.get("/ready")).status_code == 503
        async with replica_of(arguments(tmp_path)) as (replica, client):
            engine = replica._daemon.engine
            engine._worker.stop()
            engine._thread.join()
            with pytest.raises(ClosedError, match="replica 0"):
                await replica.check_health()

    asyncio.run(run())


def test_replica_that_cannot_be_built_gives_its_slot_back(tmp_path: Path) -> None:
    given = arguments(tmp_path, **{"model.path": str(tmp_path / "none")})
    with pytest.raises(ConfigError):
        Replica(given, 1)
    slot = claim_slot(tmp_path, 1, 0.0)
    assert slot.number == 0
    assert not (slot.path / "daemon.sock").exists()
    slot.release()


@pytest.mark.parametrize(
    "wrong", [{"replicas": 0}, {"cpus": 0}, {"gpus": -1}, {"replica": 2}, {"replicas": "two"}]
)
def test_builder_is_told_what_makes_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ReplicaArguments(**wrong)


def test_socket_of_the_configuration_is_refused_behind_a_proxy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"server\.uds"):
        arguments(tmp_path, **{"server.uds": "/run/offload.sock"}).read()


def test_options_of_ray_without_ray_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--replicas", "2"]) == 2
    assert "add --ray" in capsys.readouterr().err
