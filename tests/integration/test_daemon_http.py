"""The daemon's HTTP side under clients that are rude, slow, gone, or somebody else."""

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from offload.daemon.requests import Finished, GenerationRequest
from tests.support.daemon_http import ALICE, BOB, RunningDaemon, running_daemon

MESSAGES = [{"role": "user", "content": "hello"}]
LONG = [{"role": "user", "content": "a long story " * 200}]
LONGER = [{"role": "user", "content": "a long story " * 1500}]
BODY_BYTES = 1 << 20


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    folder = tmp_path_factory.mktemp("daemon")
    options: dict[str, Any] = {"keepalive_s": 0.002, "max_body_bytes": BODY_BYTES}
    # A piece of a prompt takes longer than a sign of life.
    settings = {"prefill_tokens": 1024}
    with running_daemon(folder, settings=settings, **options) as running:
        yield running


@pytest.fixture
def client(daemon: RunningDaemon) -> Iterator[httpx.Client]:
    with daemon.client() as made:
        yield made


class Ends:
    """Waits for the end of requests of a session."""

    def __init__(self, daemon: RunningDaemon, session: str) -> None:
        self._session = session
        self._ended = threading.Event()
        self.finished: Finished | None = None
        daemon.engine.on_finished(self._note)

    def _note(self, finished: Finished, request: GenerationRequest) -> None:
        if request.session == self._session:
            self.finished = finished
            self._ended.set()

    def wait(self) -> Finished:
        assert self._ended.wait(60)
        assert self.finished is not None
        return self.finished


def post(url: str, path: str, body: dict[str, Any]) -> socket.socket:
    """Send a request, and return its connection."""
    host, port = url.removeprefix("http://").split(":")
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ALICE}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    connection = socket.create_connection((host, int(port)))
    connection.sendall(head.encode() + raw)
    return connection


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("path", "limit"),
    [
        ("/v1/chat/completions", "max_tokens"),
        ("/v1/messages", "max_tokens"),
        ("/v1/responses", "max_output_tokens"),
    ],
)
def test_client_that_leaves_ends_its_request(
    daemon: RunningDaemon, path: str, limit: str, stream: bool
) -> None:
    session = f"left-{limit}-{stream}-{path.rpartition('/')[2]}"
    ends = Ends(daemon, session)
    given = {"input": "hello"} if path == "/v1/responses" else {"messages": MESSAGES}
    body = given | {limit: 100_000, "stream": stream, "session_id": session}
    post(daemon.url, path, body).close()
    assert ends.wait().reason == "cancelled"


def test_client_that_leaves_while_its_prompt_is_read_ends_its_request(
    daemon: RunningDaemon,
) -> None:
    ends = Ends(daemon, "left-early")
    body = {"messages": LONGER, "stream": True, "session_id": "left-early", "max_tokens": 4}
    connection = post(daemon.url, "/v1/chat/completions", body)
    assert connection.recv(1)
    connection.close()
    finished = ends.wait()
    assert (finished.reason, finished.num_generated_tokens) == ("cancelled", 0)


def lines_of(client: httpx.Client, path: str, body: dict[str, Any]) -> list[str]:
    with client.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        return list(response.iter_lines())


def test_stream_that_is_silent_for_long_is_kept_alive_by_comments(client: httpx.Client) -> None:
    body = {"messages": LONG, "max_tokens": 2, "cache_salt": "comments"}
    lines = lines_of(client, "/v1/chat/completions", body)
    assert ": keep-alive" in lines
    assert lines[-2] == "data: [DONE]"


def test_messages_that_are_silent_for_long_are_kept_alive_by_events(client: httpx.Client) -> None:
    body = {"messages": LONG, "max_tokens": 2, "cache_salt": "pings"}
    lines = lines_of(client, "/v1/messages", body)
    assert lines[0] == "event: message_start"
    assert "event: ping" in lines
    assert not any(line.startswith(":") for line in lines)


def test_progress_of_a_prompt_is_told_where_it_is_wanted(client: httpx.Client) -> None:
    body = {"messages": LONG, "max_tokens": 1, "return_progress": True, "cache_salt": "progress"}
    lines = lines_of(client, "/v1/chat/completions", body)
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    told = [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk]
    done = [entry["processed"] for entry in told]
    assert done == sorted(done)
    assert done[-1] == told[-1]["total"]
    assert len(done) > 1


RUDE: list[tuple[bytes, int]] = [
    (b"", 400),
    (b"{", 400),
    (b"\xff\xff", 400),
    (b'{"messages": NaN}', 400),
    (b'{"messages":' + b"[" * 50_000, 400),
    (b'"text"', 400),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
    (b"x" * (BODY_BYTES + 1), 413),
]


@pytest.mark.parametrize(("raw", "status"), RUDE, ids=range(len(RUDE)))
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/tokenize"])
def test_body_that_will_not_do_is_refused(
    client: httpx.Client, path: str, raw: bytes, status: int
) -> None:
    response = client.post(path, content=raw, headers={"Content-Type": "application/json"})
    assert response.status_code == status
    body = response.json()
    assert body["error"]["message"]
    assert (body.get("type") == "error") is (path == "/v1/messages")


@pytest.mark.parametrize("is_chunked", [False, True], ids=["declared", "in chunks"])
def test_body_of_ten_megabytes_is_refused_and_its_sender_hears_it(
    client: httpx.Client, is_chunked: bool
) -> None:
    pieces = (bytes(1 << 16) for _ in range(160))
    content = pieces if is_chunked else b"".join(pieces)
    response = client.post("/v1/completions", content=content)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"


@pytest.mark.parametrize("path", ["/health", "/v1/health", "/ready", "/ping"])
def test_probe_without_a_key_is_answered(daemon: RunningDaemon, path: str) -> None:
    assert httpx.get(daemon.url + path).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("GET", "/v1/sessions"),
        ("GET", "/slots"),
        ("GET", "/version"),
        ("GET", "/load"),
        ("GET", "/is_sleeping"),
        ("GET", "/props"),
        ("GET", "/v1/responses/x"),
        ("GET", "/v1/conversations/x"),
        ("DELETE", "/v1/sessions/x"),
        ("GET", "/v1/sessions/x/export"),
    ],
)
@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"x-api-key": ""}])
def test_anything_else_without_a_key_is_refused(
    daemon: RunningDaemon, method: str, path: str, headers: dict[str, str]
) -> None:
    response = httpx.request(method, daemon.url + path, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["chat/completions", "messages", "responses", "completions"])
def test_post_without_a_key_is_refused(daemon: RunningDaemon, path: str) -> None:
    body = {"messages": MESSAGES, "max_tokens": 1, "prompt": "x", "input": "x"}
    assert httpx.post(f"{daemon.url}/v1/{path}", json=body).status_code == 401


def test_session_id_of_another_tenant_shows_and_reuses_nothing(daemon: RunningDaemon) -> None:
    secret = [{"role": "user", "content": "alice's secret " * 40}]
    body = {"messages": secret, "max_tokens": 1, "session_id": "shared-name"}
    with daemon.client(ALICE) as alice, daemon.client(BOB) as bob:
        alice.post("/v1/chat/completions", json=body).raise_for_status()
        assert bob.get("/v1/sessions/shared-name").status_code == 404
        usage = bob.post("/v1/chat/completions", json=body).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == 0
        again = alice.post("/v1/chat/completions", json=body).json()["usage"]
        assert again["prompt_tokens_details"]["cached_tokens"] > 0
        bob.delete("/v1/sessions/shared-name").raise_for_status()
        assert alice.get("/v1/sessions/shared-name").status_code == 200


def test_stored_response_of_another_tenant_is_not_found(daemon: RunningDaemon) -> None:
    with daemon.client(ALICE) as alice, daemon.client(BOB) as bob:
        made = alice.post("/v1/responses", json={"input": "x", "max_output_tokens": 1}).json()
        path = f"/v1/responses/{made['id']}"
        assert alice.get(path).status_code == 200
        for method, suffix in (("GET", ""), ("DELETE", ""), ("POST", "/cancel")):
            assert bob.request(method, path + suffix).status_code == 404
        follow = {"input": "y", "previous_response_id": made["id"]}
        assert bob.post("/v1/responses", json=follow).status_code == 404


def test_headers_name_request_session_and_cached_tokens(client: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "of headers"}], "max_tokens": 1}
    headers = {"X-Request-Id": "my-request", "x_session_id": "my-session"}
    response = client.post("/v1/chat/completions", json=body, headers=headers)
    assert response.headers["x-request-id"] == "my-request"
    assert response.headers["x-session-id"] == "my-session"
    cached = response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert response.headers["x-kv-cached-tokens"] == str(cached)


@pytest.mark.parametrize("value", ["a b", "x" * 200, "\u00e9"])
def test_request_id_that_will_not_do_is_replaced(client: httpx.Client, value: str) -> None:
    headers = {b"X-Request-Id": value.encode("latin-1")}
    response = client.get("/v1/models", headers=headers)
    assert response.headers["x-request-id"].startswith("req_")


def test_error_after_the_first_byte_comes_in_the_stream(client: httpx.Client) -> None:
    body = {"prompt": ["x", "y" * 140_000], "max_tokens": 1}
    lines = lines_of(client, "/v1/completions", body)
    last = json.loads([line for line in lines if line.startswith("data: ")][-1][6:])
    assert last["error"]["code"] == "context_length_exceeded"
    assert last["error"]["n_ctx"] == 131072


def test_choices_of_one_prompt_differ_by_luck_and_count_its_prompt_once(
    client: httpx.Client,
) -> None:
    body = {"messages": MESSAGES, "max_tokens": 12, "n": 3, "seed": 7}
    first = client.post("/v1/chat/completions", json=body).json()
    second = client.post("/v1/chat/completions", json=body).json()
    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert len(set(texts)) == 3
    assert texts == [choice["message"]["content"] for choice in second["choices"]]
    assert first["usage"]["completion_tokens"] == 36


def test_prompt_too_long_forgets_its_oldest_turns_where_that_is_wanted(
    client: httpx.Client,
) -> None:
    items = [{"role": "user", "content": f"turn {number} " + "x" * 40_000} for number in range(5)]
    body = {"input": items, "max_output_tokens": 1, "truncation": "disabled"}
    path = "/v1/responses/input_tokens"
    assert client.post("/v1/responses", json=body).status_code == 400
    whole = client.post(path, json=body).json()["input_tokens"]
    shortened = client.post(path, json=body | {"truncation": "auto"}).json()["input_tokens"]
    assert shortened < 131072 < whole
    assert shortened > 100_000
