"""The end of a daemon, and the next one: drained, killed, and started again."""

import signal
import socket
import threading
from pathlib import Path
from typing import Any, Self

import httpx
import pytest

from offload.daemon.ops.notify import Notifier
from tests.support.daemon_process import DaemonProcess, chat_body

LONG = "A page of text that is worth keeping. " * 40


class Manager:
    """Hears what a daemon tells systemd."""

    def __init__(self, path: Path) -> None:
        self._channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._channel.bind(str(path))
        self._channel.settimeout(30.0)
        self.heard: list[str] = []

    def wait_for(self, state: str) -> None:
        while not any(line.startswith(state) for line in self.heard):
            self.heard += self._channel.recv(4096).decode().splitlines()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()


def stream_tokens(client: httpx.Client, body: dict[str, Any], has_begun: threading.Event) -> str:
    """Read an answer as it comes, and return all that came."""
    text = []
    with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as stream:
        for line in stream.iter_lines():
            text.append(line)
            if '"content"' in line:
                has_begun.set()
    return "\n".join(text)


def answer_of(client: httpx.Client, messages: list[dict[str, str]], session: str) -> Any:
    body = {"messages": messages, "session_id": session, "max_tokens": 8, "temperature": 0}
    return client.post("/v1/chat/completions", json=body).raise_for_status().json()


def turns(client: httpx.Client, session: str) -> list[dict[str, str]]:
    """Have one turn, and return the messages of the next."""
    messages = [{"role": "user", "content": LONG}]
    said = answer_of(client, messages, session)["choices"][0]["message"]["content"]
    return [*messages, {"role": "assistant", "content": said}, {"role": "user", "content": "So?"}]


def test_daemon_that_is_told_to_stop_finishes_what_runs_and_takes_no_more(tmp_path: Path) -> None:
    socket_path = tmp_path / "offload.sock"
    env = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
    with (
        Manager(tmp_path / "notify") as manager,
        DaemonProcess(tmp_path / "data", "--uds", str(socket_path), env=env) as daemon,
        daemon.client() as client,
        daemon.client() as other,
    ):
        assert socket_path.stat().st_mode & 0o777 == 0o600
        manager.wait_for("READY=1")
        has_begun, text = threading.Event(), []
        body = chat_body("Go on", "long", max_tokens=600, ignore_eos=True)
        reading = threading.Thread(
            target=lambda: text.append(stream_tokens(client, body, has_begun))
        )
        reading.start()
        assert has_begun.wait(30)
        daemon.signal(signal.SIGTERM)
        manager.wait_for("STOPPING=1")
        manager.wait_for("EXTEND_TIMEOUT_USEC=")
        assert other.get("/health").status_code == 200
        assert other.get("/ready").status_code == 503
        refused = other.post("/v1/chat/completions", json=chat_body("One more"))
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        reading.join()
        assert daemon.join() == 0
    assert '"finish_reason":"length"' in text[0]
    assert "data: [DONE]" in text[0]
    assert not socket_path.exists()


def test_session_of_a_killed_daemon_is_gone_on_with_and_a_second_signal_kills_too(
    tmp_path: Path,
) -> None:
    data = tmp_path / "data"
    with DaemonProcess(data) as daemon, daemon.client() as client:
        messages = turns(client, "kept")
        client.post("/v1/sessions/kept/persist").raise_for_status()
        daemon.kill()
    with DaemonProcess(data) as daemon, daemon.client() as client:
        answer = answer_of(client, messages, "kept")
        again = {"messages": messages, "max_tokens": 8, "temperature": 0}
        fresh = client.post(
            "/v1/chat/completions",
            json={**again, "cache_salt": "of nobody else"},
        ).json()
        stop_twice(daemon, client)
    assert answer["usage"]["kv"]["by_source"]["disk"] > len(LONG) - 64
    assert fresh["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert answer["choices"][0]["message"]["content"] == fresh["choices"][0]["message"]["content"]
    assert {path.stat().st_mode & 0o077 for path in data.rglob("*")} == {0}


def stop_twice(daemon: DaemonProcess, client: httpx.Client) -> None:
    """End a daemon by two signals while it answers, and assert that it did not wait."""
    has_begun = threading.Event()
    body = chat_body("Go on", max_tokens=20_000, ignore_eos=True)

    def read_until_it_breaks() -> None:
        with pytest.raises(httpx.HTTPError):
            stream_tokens(client, body, has_begun)

    reading = threading.Thread(target=read_until_it_breaks)
    reading.start()
    assert has_begun.wait(30)
    daemon.signal(signal.SIGTERM)
    daemon.wait_for_event("draining")
    daemon.signal(signal.SIGTERM)
    assert daemon.join(10) == 130
    reading.join()


def test_notifier_without_a_manager_says_nothing() -> None:
    notifier = Notifier({})
    notifier.send(READY=1)
    assert notifier.watchdog_s == 0.0


def test_notifier_whose_manager_has_gone_goes_on(tmp_path: Path) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone"), "WATCHDOG_USEC": "6000000"})
    notifier.send(READY=1)
    notifier.send(STATUS="fine")
    assert notifier.watchdog_s == 6.0


def test_notifier_speaks_to_an_abstract_socket(tmp_path: Path) -> None:
    name = f"offload-test-{tmp_path.name}-{id(tmp_path)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(f"\0{name}")
        channel.settimeout(5.0)
        notifier = Notifier({"NOTIFY_SOCKET": f"@{name}"})
        notifier.reloading()
        notifier.extend(1.5)
        assert channel.recv(4096).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
        assert channel.recv(4096) == b"EXTEND_TIMEOUT_USEC=1500000"
