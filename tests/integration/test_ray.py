"""Two replicas on a real Ray Serve: sessions that stay, replicas that die, and an orderly end.

``OFFLOAD_TEST_RAY`` is an interpreter with Ray Serve and what the daemon needs; ``make ray`` makes
one and runs these tests. They run in the order of the file: the last ones end what the first use.
"""

import os
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest
import yaml  # type: ignore[import-untyped]

from tests.support.daemon_process import DaemonProcess
from tests.support.ray_cluster import PYTHON, Cluster, cluster, tier_sizes
from tests.support.ray_talks import Talk, asked, body, computed

pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="OFFLOAD_TEST_RAY names no interpreter with Ray Serve"),
    pytest.mark.slow,
    pytest.mark.timeout(420),
]
NUM_TALKS = 100
NUM_CLIENTS = 8


@pytest.fixture(scope="module")
def ray() -> Iterator[Cluster]:
    shared_memory = set(os.listdir("/dev/shm"))
    with cluster() as running:
        yield running
    assert set(os.listdir("/dev/shm")) <= shared_memory


@pytest.fixture(scope="module")
def client(ray: Cluster) -> Iterator[httpx.Client]:
    with ray.daemon.client(timeout_s=120) as client:
        yield client


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A daemon without Ray."""
    folder = tmp_path_factory.mktemp("plain")
    config = folder / "offload.yaml"
    config.write_text(yaml.safe_dump({"tiers": tier_sizes()}))
    options = ("--config", str(config))
    with DaemonProcess(folder, *options, python=PYTHON) as daemon, daemon.client() as client:
        yield client


@pytest.fixture(scope="module")
def talks(client: httpx.Client) -> list[Talk]:
    """Sessions that have had three turns each."""
    talks = [Talk(f"talk-{number}") for number in range(NUM_TALKS)]
    for turn in range(3):
        before = [talk.num_known for talk in talks]
        in_parallel(lambda talk: talk.ask(client), talks)
        if turn:
            assert [talk.last_cached for talk in talks] == before
    return talks


def shortfalls(ray: Cluster, talks: list[Talk], before: dict[str, int]) -> dict[str, Any]:
    """Return what is known of the talks whose last turn reused less than there was."""
    short = [talk for talk in talks if talk.last_cached < before[talk.name]]
    return {talk.name: (before[talk.name], ray.requests(talk.name)[-3:]) for talk in short}


def in_parallel(job: Any, items: list[Any]) -> list[Any]:
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        return list(pool.map(job, items))


def metric(replica: httpx.Client, name: str) -> float:
    lines = replica.get("/metrics").raise_for_status().text.splitlines()
    return float(next(line for line in lines if line.startswith(name)).rpartition(" ")[2])


def test_sessions_stay_on_their_replica_and_answer_as_a_plain_daemon(
    ray: Cluster, talks: list[Talk], plain: httpx.Client
) -> None:
    pids = [{line["pid"] for line in ray.requests(talk.name)} for talk in talks]
    assert all(len(each) == 1 for each in pids)
    assert len(set.union(*pids)) == 2

    def check(talk: Talk) -> None:
        assert computed(plain, talk.text[: -len(last(talk))]) == last(talk)

    in_parallel(check, talks)


def last(talk: Talk) -> str:
    """Return the last answer of a talk."""
    return talk.text.rpartition(":")[2]


def test_answer_is_streamed_while_it_is_computed(ray: Cluster, client: httpx.Client) -> None:
    question = body("Go on. ", max_tokens=400, ignore_eos=True, stream=True)
    with client.stream("POST", "/v1/completions", json=question) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("data: ")
        running = []
        for number in range(2):
            with ray.replica(number) as replica:
                running.append(replica.get("/load").json()["num_running"])
        assert sum(running) == 1
        assert sum(line.startswith("data: ") for line in lines) > 100


def test_client_that_leaves_ends_its_request_and_what_was_computed_is_kept(
    ray: Cluster, client: httpx.Client
) -> None:
    prompt, headers = "Stay a while, and listen. " * 4, {"x-session-id": "left"}
    question = body(prompt, max_tokens=4000, ignore_eos=True, stream=True)
    with client.stream("POST", "/v1/completions", json=question, headers=headers) as stream:
        next(stream.iter_lines())
    line = ray.daemon.wait_for(lambda line: line.get("session") == "left")
    assert line["disconnect"]
    assert line["generated_tokens"] < 4000
    again = client.post("/v1/completions", json=body(prompt), headers=headers).json()
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == len(prompt) - 1


def test_proxy_adds_milliseconds_to_a_request(ray: Cluster, client: httpx.Client) -> None:
    question, headers = body("How long? ", max_tokens=1), {"X-Session-ID": "timed"}
    asked(client, question, headers)
    times: dict[bool, list[float]] = {True: [], False: []}
    with ray.replica(ray.slot_of("timed")) as replica:
        for number in range(120):  # in turns, as others use this machine too
            is_proxied = number % 2 == 0
            begun_s = time.monotonic()
            asked(client if is_proxied else replica, question, headers)
            times[is_proxied].append(time.monotonic() - begun_s)
    through, alone = (statistics.median(times[which]) for which in (True, False))
    print(f"one known prompt, one token: {through * 1e3:.1f} ms, without Serve {alone * 1e3:.1f}")
    assert through - alone < 0.25


@pytest.mark.parametrize("path", ["/", "/metrics", "/admin/api/state"])
def test_what_is_of_one_replica_is_asked_on_its_socket(
    ray: Cluster, client: httpx.Client, path: str
) -> None:
    assert client.get(path).status_code == 404
    with ray.replica(0) as first, ray.replica(1) as second:
        assert [each.get(path).status_code for each in (first, second)] == [200, 200]


def test_stored_response_is_continued_on_any_replica(ray: Cluster, client: httpx.Client) -> None:
    question = {"model": "recall", "input": "Remember this.", "max_output_tokens": 4}
    with ray.replica(0) as first, ray.replica(1) as second:
        response = first.post("/v1/responses", json=question).raise_for_status().json()
        follow = question | {"previous_response_id": response["id"], "input": "And then?"}
        assert second.post("/v1/responses", json=follow).status_code == 200


def test_reload_reaches_both_replicas_and_a_bad_file_neither(ray: Cluster) -> None:
    name = "offload_config_last_reload_successful"
    with ray.replica(0) as first, ray.replica(1) as second:
        for limits, word, is_good in (
            ({"inflihgt": 1}, "reload refused", 1),  # refused before any replica is told
            ({"inflight": 70}, "reloaded", 1),
        ):
            seen = len(ray.daemon.log)
            ray.configure(server={"limits": limits})
            ray.daemon.signal(signal.SIGHUP)
            ray.wait_for_new(word, seen)
            assert [metric(each, name) for each in (first, second)] == [is_good, is_good]
    changed = [
        line["changed"]
        for line in ray.daemon.log
        if line.get("event") == "reloaded" and "pid" in line
    ]
    assert [keys for keys in changed if "server.limits.inflight" in keys] == changed[-2:]


def test_killed_replica_loses_no_session_and_its_stream_fails_at_once(
    ray: Cluster, client: httpx.Client, plain: httpx.Client, talks: list[Talk]
) -> None:
    victim = ray.pid_of(talks[0].name)
    moved = [talk for talk in talks if ray.pid_of(talk.name) == victim]
    prompt, value = talks[0].next_prompt()
    endless = body(prompt, max_tokens=4000, ignore_eos=True, stream=True)
    headers = talks[0].headers
    with client.stream("POST", "/v1/completions", json=endless, headers=headers) as stream:
        lines = stream.iter_lines()
        next(lines)
        os.kill(victim, signal.SIGKILL)
        killed_s = time.monotonic()
        with pytest.raises(httpx.HTTPError):
            list(lines)

    before = {talk.name: talk.num_known for talk in moved}
    moved[1].ask(client)
    first_s = time.monotonic() - killed_s
    again = asked(client, body(prompt), headers).json()
    retry_s = time.monotonic() - killed_s
    text = again["choices"][0]["text"]
    assert text.startswith(f"{value}]")
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= before[talks[0].name]
    talks[0].accept(prompt, text)
    in_parallel(lambda talk: talk.ask(client), moved[2:])
    assert not shortfalls(ray, moved[1:], before)
    for talk in moved[:10]:
        assert computed(plain, talk.text[: -len(last(talk))]) == last(talk)
    print(
        f"{len(moved)} sessions moved; answers after {first_s:.2f} s, retry after {retry_s:.2f} s"
    )


def test_redeployment_under_load_loses_no_session(
    ray: Cluster, client: httpx.Client, talks: list[Talk]
) -> None:
    old = {ray.pid_of(talk.name) for talk in talks}
    is_over = threading.Event()

    def go_on() -> int:
        turns = 0
        while not is_over.is_set():
            for talk in talks[:10]:
                before = talk.num_known
                talk.ask(client)
                assert talk.last_cached >= before
                turns += 1
        return turns

    with ThreadPoolExecutor(1) as pool:
        turns = pool.submit(go_on)
        try:
            ray.redeploy()
        finally:
            is_over.set()
        assert turns.result() > 0
    before = {talk.name: talk.num_known for talk in talks}
    in_parallel(lambda talk: talk.ask(client), talks)
    assert not shortfalls(ray, talks, before)
    assert not [pid for pid in old if psutil.pid_exists(pid)]


def test_signal_drains_the_replicas_and_leaves_nothing_behind(ray: Cluster) -> None:
    assert ray.processes()
    ray.daemon.signal(signal.SIGTERM)
    assert ray.daemon.join(180) == 0
    ray.wait_for_end()
    assert [ray.is_slot_free(number) for number in range(2)] == [True, True]
    assert not list(ray.data_path.rglob("*.sock"))
    assert not list(ray.data_path.rglob("scratch/offload-*"))
