"""The commands around the daemon, as far as they need none that runs."""

import json
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from offload.cli import main
from offload.cli_chat import Stats
from offload.cli_chat_history import ChatHistory
from offload.cli_client import DaemonClient, printable, session_path
from offload.cli_ps import tier_strip
from offload.errors import ConfigError, StorageError

NOBODY = "http://127.0.0.1:9"


class _Answers(BaseHTTPRequestHandler):
    """Answers every request with what the server was told."""

    server: "_Server"

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.path} {self.headers.get('Authorization')}")
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(self.server.content)

    def log_message(self, *_: object) -> None:
        """Say nothing on standard error."""


class _Server(HTTPServer):
    status = 200
    content = b""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.asked: list[str] = []


@contextmanager
def answering(content: bytes, status: int = 200) -> Iterator[tuple[str, _Server]]:
    with _Server() as server:
        server.content, server.status = content, status
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", server
        server.shutdown()
        thread.join()


def written(tmp_path: Path, text: str) -> str:
    (tmp_path / "offload.yaml").write_text(text)
    return str(tmp_path / "offload.yaml")


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OFFLOAD_URL", "OFFLOAD_API_KEY", "OFFLOAD_CONFIG"):
        monkeypatch.delenv(name, raising=False)


def test_config_that_is_good_is_said_to_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "check", written(tmp_path, "server: {port: 1}")]) == 0
    assert "good; 0 keys" in capsys.readouterr().out


def test_config_that_is_wrong_ends_with_2_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "check", written(tmp_path, "server: {prot: 1}")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_config_whose_keys_are_wrong_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, f"server: {{api_keys_file: {tmp_path}/none}}")
    assert main(["config", "check", path]) == 2
    assert "cannot read the keys" in capsys.readouterr().err


def test_config_is_shown_as_all_sources_make_it_without_secrets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, "server: {api_key: hidden}")
    assert main(["config", "show", "--config", path, "--set", "server.port=5", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["server"]["port"] == 5
    assert "hidden" not in json.dumps(shown)


def test_schema_says_what_a_reload_changes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    limits = json.loads(capsys.readouterr().out)["$defs"]["LimitsSection"]["properties"]
    assert limits["inflight"]["reload"] == "live"


def test_config_file_that_is_begun_is_good_and_never_overwritten(tmp_path: Path) -> None:
    path = str(tmp_path / "new.yaml")
    assert main(["config", "init", path]) == 0
    assert main(["config", "check", path]) == 0
    assert main(["config", "init", path]) == 2


def test_key_that_is_made_is_shown_once_and_kept_as_a_digest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys"
    assert main(["config", "key", "ann/laptop", "--admin", "--file", str(path)]) == 0
    key = capsys.readouterr().out.strip()
    assert key.startswith("sk-")
    assert key not in path.read_text()
    assert path.read_text().endswith(":admin\n")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_key_of_an_impossible_name_is_refused() -> None:
    assert main(["config", "key", "../ann"]) == 2


def test_serve_beyond_loopback_without_keys_is_refused_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["serve", "--host", "0.0.0.0", "--model", str(tmp_path / "no-model")]
    assert main(args) == 2
    assert "there are no keys" in capsys.readouterr().err


def test_set_without_a_value_is_refused() -> None:
    assert main(["config", "show", "--set", "server.port"]) == 2


@pytest.mark.parametrize(
    "args",
    [
        ["ps"],
        ["ps", "--watch"],
        ["sessions", "list"],
        ["sessions", "fork", "a", "b"],
        ["sessions", "delete", "a"],
    ],
)
def test_command_without_a_daemon_says_that_none_answers(
    args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*args, "--url", NOBODY]) == 2
    assert f"no daemon answers at {NOBODY}" in capsys.readouterr().err


def test_action_that_needs_a_root_is_refused_by_a_daemon(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["sessions", "verify", "a", "--url", NOBODY]) == 2
    assert "works on a root" in capsys.readouterr().err


def test_client_shows_its_key_and_reads_json() -> None:
    with answering(b'{"a": 1}') as (url, server):
        assert DaemonClient(url, "sk-x").ask("GET", "/v1/models") == {"a": 1}
    assert server.asked == ["/v1/models Bearer sk-x"]


def test_client_tells_what_the_daemon_refuses() -> None:
    content = b'{"error": {"message": "not for you"}}'
    with (
        answering(content, 403) as (url, _),
        pytest.raises(ConfigError, match=r"403\)?: not for you"),
    ):
        DaemonClient(url).ask("GET", "/admin/api/state")


def test_client_reads_events_with_and_without_names() -> None:
    content = b': alive\n\nevent: state\ndata: {"a": 1}\n\ndata: {"b": 2}\n\ndata: [DONE]\n\n'
    with answering(content) as (url, _):
        events = list(DaemonClient(url).events("/admin/api/events"))
    assert events == [("state", {"a": 1}), ("message", {"b": 2}), ("message", None)]


def test_client_downloads_to_a_file_that_was_not_there(tmp_path: Path) -> None:
    with answering(b"archive") as (url, _):
        client = DaemonClient(url)
        assert client.download("/x", tmp_path / "file") == 7
        with pytest.raises(FileExistsError):
            client.download("/x", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"archive"


def test_client_of_a_socket_that_nobody_serves_says_so(tmp_path: Path) -> None:
    path = tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(ConfigError, match="no daemon answers at unix:"):
        DaemonClient(f"unix:{path}").ask("GET", "/ready")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", ""])
def test_client_of_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="is not http://HOST:PORT"):
        DaemonClient(url)


def test_name_of_a_session_is_one_part_of_a_path() -> None:
    assert session_path("a/../b c", "fork") == "/v1/sessions/a%2F..%2Fb%20c/fork"


def test_text_of_a_daemon_steers_no_terminal() -> None:
    assert printable("a\x1b[31mb\x07\x9bc\u202ed\n\te") == "a�[31mb��c�d\n\te"


def test_conversation_is_kept_for_its_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "chat"
    messages = [{"role": "user", "content": "Hi"}]
    ChatHistory(folder).write("../x", messages)
    assert ChatHistory(folder).read("../x") == messages
    assert ChatHistory(folder).read("other") == []
    [file] = folder.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_conversation_that_is_damaged_is_an_error_and_stays(tmp_path: Path) -> None:
    history = ChatHistory(tmp_path)
    history.write("x", [])
    [file] = tmp_path.iterdir()
    file.write_text("{")
    with pytest.raises(StorageError, match="cannot read"):
        history.read("x")
    assert file.read_text() == "{"


@pytest.mark.parametrize(
    ("tokens", "cells"),
    [((0, 0, 0), 0), ((1, 0, 0), 16), ((1, 1, 2), 16), ((1, 1000, 1), 16)],
)
def test_strip_of_a_session_is_as_long_as_what_it_has(
    tokens: tuple[int, int, int], cells: int
) -> None:
    session = {"tokens": dict(zip(("device", "host", "disk"), tokens, strict=True))}
    strip = tier_strip(session)
    coloured = sum(span.end - span.start for span in strip.spans if span.style != "bright_black")
    assert (len(strip.plain), coloured) == (16, cells)


def test_stats_of_an_answer_say_where_its_tokens_were() -> None:
    text = str(Stats(10, 8, 3, 0.5, 1.0, {"device": 0, "disk": 8}))
    assert "8 known (device 0, disk 8)" in text
