"""Clients that mean harm, or do it without meaning to, against a real daemon with two tenants."""

import json
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from offload.daemon.ops.tenants import key_line
from tests.support.daemon_process import DaemonProcess, chat_body

ANN, BOB = "sk-ann", "sk-bob"
NUM_CLIENTS = 200
SECRET = "The word that only Ann knows is Xylophone-42. "
READ_TIMEOUT_S = 0.5
WRITE_TIMEOUT_S = 1.0


@dataclass
class Town:
    """A daemon, and where the keys of its two tenants are."""

    daemon: DaemonProcess
    folder: Path

    def raw(self) -> socket.socket:
        """Connect, and leave what is said to the test."""
        parts = urlsplit(self.daemon.address)
        return socket.create_connection((parts.hostname, parts.port), timeout=30)

    def head(self, path: str, num_bytes: int, key: str = ANN) -> bytes:
        return (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {num_bytes}\r\n\r\n"
        ).encode()

    def resident_bytes(self) -> int:
        return int(psutil.Process(self.daemon.pid).memory_info().rss)

    def is_well(self) -> None:
        """Assert that the daemon answers as if nothing had been."""
        with self.daemon.client(ANN) as client:
            assert client.get("/ready").status_code == 200
            answer = client.post("/v1/chat/completions", json=chat_body("Well?", max_tokens=2))
            assert answer.status_code == 200


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    folder = tmp_path_factory.mktemp("town")
    keys = folder / "keys"
    keys.write_text(
        "\n".join(key_line(name, f"sk-{name}", is_admin=False) for name in ("ann", "bob"))
    )
    keys.chmod(0o600)
    limits = {
        "body": "1MiB",
        "inflight": NUM_CLIENTS,
        "read_timeout": READ_TIMEOUT_S,
        "write_timeout": WRITE_TIMEOUT_S,
        "headers": "16KiB",
    }
    config = folder / "offload.yaml"
    config.write_text(json.dumps({"server": {"api_keys_file": str(keys), "limits": limits}}))
    with DaemonProcess(folder / "data", "--config", str(config)) as daemon:
        yield Town(daemon, folder)


@pytest.fixture(scope="module")
def secret_session(town: Town) -> str:
    with town.daemon.client(ANN) as ann:
        body = chat_body(SECRET * 20, "ann-private")
        ann.post("/v1/chat/completions", json=body).raise_for_status()
        ann.post("/v1/sessions/ann-private/persist").raise_for_status()
    return "ann-private"


def read_all(connection: socket.socket) -> bytes:
    """Read until the daemon hangs up."""
    pieces = []
    while piece := connection.recv(65536):
        pieces.append(piece)
    return b"".join(pieces)


def read_until_reset(connection: socket.socket) -> bytes:
    """Read until the daemon hangs up, politely or not."""
    try:
        return read_all(connection)
    except ConnectionResetError:
        return b""


@pytest.mark.parametrize("key", ["", "sk-ann ", "SK-ANN", "sk-an", "x" * 400, "sk-ann\0"])
def test_key_that_is_wrong_opens_nothing(town: Town, key: str) -> None:
    headers = {b"x-api-key": key.encode()} if key != "sk-ann " else {b"x-api-key": b"sk-anns"}
    with town.daemon.client() as nobody:
        try:
            answer = nobody.get("/v1/models", headers=headers)
        except httpx.LocalProtocolError:
            return  # not even a header
        assert answer.status_code in (400, 401)


@pytest.mark.parametrize(
    ("method", "action", "body"),
    [
        ("GET", "", None),
        ("DELETE", "", None),
        ("PATCH", "", {"pin": True}),
        ("POST", "/fork", {"name": "mine-now"}),
        ("POST", "/persist", {}),
        ("POST", "/evict", {"to": "disk"}),
        ("POST", "/prefetch", {}),
        ("POST", "/explain", {"prompt": SECRET}),
        ("GET", "/export", None),
    ],
)
def test_session_of_another_tenant_is_not_there(
    town: Town, secret_session: str, method: str, action: str, body: dict[str, Any] | None
) -> None:
    with town.daemon.client(BOB) as bob:
        stolen = bob.request(method, f"/v1/sessions/{secret_session}{action}", json=body)
        missing = bob.request(method, f"/v1/sessions/never-was{action}", json=body)
    assert stolen.status_code == missing.status_code == 404
    assert stolen.text.replace(secret_session, "") == missing.text.replace("never-was", "")


def test_prompt_of_another_tenant_under_its_session_finds_none_of_its_keys(
    town: Town, secret_session: str
) -> None:
    with town.daemon.client(BOB) as bob:
        body = chat_body(SECRET * 20, secret_session, max_tokens=2)
        usage = bob.post("/v1/chat/completions", json=body).raise_for_status().json()["usage"]
        bob.delete(f"/v1/sessions/{secret_session}").raise_for_status()
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    with town.daemon.client(ANN) as ann:
        assert ann.get(f"/v1/sessions/{secret_session}").status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"null",
        b"[]",
        b'"text"',
        b'{"messages": 5}',
        b'{"messages": [{"role": "user"}], "max_tokens": 1e999}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": 1}',
        b'{"messages": [], "max_tokens": -1}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_body_that_is_garbage_is_a_400_with_an_error_in_it(
    town: Town, path: str, body: bytes
) -> None:
    with town.daemon.client(ANN) as client:
        answer = client.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


def test_body_of_ten_megabytes_is_refused_and_not_kept(town: Town) -> None:
    before = town.resident_bytes()
    with town.daemon.client(ANN) as client:
        answer = client.post("/v1/chat/completions", content=b" " * 10_000_000)
    assert answer.status_code == 413
    assert "1048576 are allowed" in answer.json()["error"]["message"]
    assert town.resident_bytes() - before < 8 << 20
    town.is_well()


def test_body_of_ten_megabytes_in_pieces_is_refused_while_it_is_read(town: Town) -> None:
    def pieces() -> Iterator[bytes]:
        yield b'{"messages": [{"role": "user", "content": "'
        for _ in range(160):
            yield b"x" * 65536

    with town.daemon.client(ANN) as client:
        try:
            answer = client.post("/v1/chat/completions", content=pieces())
        except httpx.HTTPError:  # the daemon hung up while we were still writing
            pass
        else:
            assert answer.status_code == 413
    town.is_well()


def test_head_that_is_too_long_is_refused(town: Town) -> None:
    with town.daemon.client(ANN) as client:
        answer = client.get("/v1/models", headers={"x-padding": "x" * 100_000})
    assert answer.status_code == 431
    town.is_well()


def test_client_that_stops_amid_its_request_is_hung_up_on(town: Town) -> None:
    with town.raw() as connection:
        connection.sendall(town.head("/v1/chat/completions", 500) + b'{"messages"')
        assert b" 408 " in read_all(connection).partition(b"\r\n")[0]


def test_client_that_never_ends_its_head_is_hung_up_on(town: Town) -> None:
    with town.raw() as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
        assert read_until_reset(connection) == b""


def test_client_that_says_nothing_is_hung_up_on(town: Town) -> None:
    with town.raw() as connection:
        assert read_until_reset(connection) == b""


def test_client_that_reads_nothing_of_a_long_answer_is_given_up(town: Town) -> None:
    prompt = " ".join(["word"] * 60)
    body = json.dumps(
        chat_body(prompt, "unread", max_tokens=4000, stream=True, ignore_eos=True, logprobs=True)
        | {"top_logprobs": 20}
    ).encode()
    with socket.socket() as connection:
        # Little room, so that an answer of some megabytes cannot hide in the kernel.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        parts = urlsplit(town.daemon.address)
        connection.connect((parts.hostname, parts.port))
        connection.sendall(town.head("/v1/chat/completions", len(body)) + body)
        line = town.daemon.wait_for(lambda line: line.get("session") == "unread", 60)
    assert line["finish"] == "cancelled"
    assert line["generated_tokens"] < 4000
    town.is_well()


def test_client_that_leaves_amid_its_answer_stops_it(town: Town) -> None:
    body = chat_body("Go on until I leave", "left", max_tokens=20_000, stream=True, ignore_eos=True)
    with (
        town.daemon.client(ANN) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as stream,
    ):
        next(stream.iter_lines())
    line = town.daemon.wait_for(lambda line: line.get("session") == "left")
    assert (line["finish"], line["disconnect"]) == ("cancelled", True)


def test_client_that_closes_its_half_amid_a_plain_request_stops_it(town: Town) -> None:
    body = json.dumps(
        chat_body("Go on until I hang up", "half", max_tokens=20_000, ignore_eos=True)
    ).encode()
    with town.raw() as connection:
        connection.sendall(town.head("/v1/chat/completions", len(body)) + body)
        connection.shutdown(socket.SHUT_WR)
        line = town.daemon.wait_for(lambda line: line.get("session") == "half")
    assert line["finish"] == "cancelled"


def test_two_hundred_clients_at_once_are_answered_or_told_to_come_again(town: Town) -> None:
    def ask(client: httpx.Client, number: int) -> httpx.Response:
        body = chat_body(f"Client {number}", max_tokens=2)
        return client.post("/v1/chat/completions", json=body)

    limits = httpx.Limits(max_connections=NUM_CLIENTS)
    headers = {"Authorization": f"Bearer {ANN}"}
    with (
        httpx.Client(
            base_url=town.daemon.address, headers=headers, limits=limits, timeout=120
        ) as client,
        ThreadPoolExecutor(NUM_CLIENTS) as pool,
    ):
        answers = list(pool.map(lambda number: ask(client, number), range(NUM_CLIENTS)))
    statuses = {answer.status_code for answer in answers}
    assert statuses <= {200, 429}
    assert sum(answer.status_code == 200 for answer in answers) > NUM_CLIENTS / 2
    assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 429)
    town.is_well()


def test_daemon_after_all_this_has_no_error_in_its_log_and_few_files(town: Town) -> None:
    town.is_well()
    assert not [line for line in town.daemon.log if line.get("level") in ("error", "critical")]
    assert len(os.listdir(f"/proc/{town.daemon.pid}/fd")) < 100
    assert "Xylophone" not in json.dumps(town.daemon.log)
