"""A running daemon with keys: what it answers, to whom, and how it is watched and reloaded."""

import io
import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from offload.cli import main
from offload.daemon.ops.tenants import key_line
from tests.support.daemon_process import DaemonProcess, chat_body

ANN, BOB, ADMIN = "sk-ann", "sk-bob", "sk-admin"


@dataclass
class Running:
    """A daemon, the file it was configured with, and who may talk to it."""

    daemon: DaemonProcess
    config: Path
    ann: httpx.Client
    bob: httpx.Client
    admin: httpx.Client

    def reload(self, text: str) -> dict[str, Any]:
        """Write the file anew, and return what the daemon logs of it."""
        self.config.write_text(text)
        seen = len(self.daemon.log)
        self.daemon.signal(signal.SIGHUP)
        return self.daemon.wait_for(
            lambda line: (
                line.get("event") in ("reloaded", "reload refused")
                and self.daemon.log.index(line) >= seen
            )
        )


def config_text(folder: Path, **limits: Any) -> str:
    return json.dumps(
        {
            "server": {
                "api_keys_file": str(folder / "keys"),
                "limits": limits,
                "cors_origins": ["https://page.example"],
            },
            "tiers": {
                "device": {"size": "64MiB"},
                "host": {"size": "64MiB"},
                "disk": {"size": "256MiB", "min_free": 0, "write_budget_per_day": "1GiB"},
            },
        }
    )


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("daemon")
    keys, config = folder / "keys", folder / "offload.yaml"
    lines = [key_line("ann", ANN, is_admin=False), key_line("bob/phone", BOB, is_admin=False)]
    keys.write_text("\n".join([*lines, key_line("root", ADMIN, is_admin=True)]))
    keys.chmod(0o600)
    config.write_text(config_text(folder))
    with (
        DaemonProcess(folder / "data", "--config", str(config)) as daemon,
        daemon.client(ANN) as ann,
        daemon.client(BOB) as bob,
        daemon.client(ADMIN) as admin,
    ):
        yield Running(daemon, config, ann, bob, admin)


class Shell:
    """Runs commands of ``offload`` against the daemon, as one of its tenants."""

    def __init__(
        self, running: Running, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self._patch = patch
        self._capsys = capsys
        patch.setenv("OFFLOAD_URL", running.daemon.address)

    def run(self, *args: str, stdin: str = "", key: str = ANN) -> str:
        """Run a command that succeeds, and return what it prints."""
        self._patch.setenv("OFFLOAD_API_KEY", key)
        self._patch.setattr(sys, "stdin", io.StringIO(stdin))
        assert main(args) == 0
        return self._capsys.readouterr().out


@pytest.fixture
def shell(
    running: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Shell:
    return Shell(running, monkeypatch, capsys)


def metrics(client: httpx.Client) -> dict[str, float]:
    """Return metrics by name and labels, as one text."""
    families = text_string_to_metric_families(client.get("/metrics").raise_for_status().text)
    return {
        f"{sample.name}{json.dumps(sample.labels, sort_keys=True)}": sample.value
        for family in families
        for sample in family.samples
    }


def test_chat_of_a_tenant_is_answered_and_logged_without_its_text(running: Running) -> None:
    body = chat_body("The word is zebra-crossing.", "first")
    answer = running.ann.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200
    line = running.daemon.wait_for(lambda line: line.get("session") == "first")
    assert (line["tenant"], line["finish"], line["generated_tokens"]) == ("ann", "length", 8)
    assert "zebra" not in json.dumps(running.daemon.log)


def test_session_is_in_the_state_of_the_administrator_and_of_nobody_else(running: Running) -> None:
    running.ann.post("/v1/chat/completions", json=chat_body("Seen?", "seen")).raise_for_status()
    state = running.admin.get("/admin/api/state").raise_for_status().json()
    assert ("ann", "seen") in {(each["tenant"], each["name"]) for each in state["sessions"]}
    assert running.ann.get("/admin/api/state").status_code == 403


def test_metrics_count_what_was_asked(running: Running) -> None:
    name = 'vllm:generation_tokens_total{"engine": "0", "model_name": "recall"}'
    before = metrics(running.admin)[name]
    running.ann.post("/v1/chat/completions", json=chat_body("Count me", max_tokens=5))
    after = metrics(running.admin)
    assert after[name] == before + 5
    assert not [name for name in after if "session" in name.partition("{")[2]]


def test_metrics_without_a_key_are_refused_where_there_are_keys(running: Running) -> None:
    with running.daemon.client() as nobody:
        assert nobody.get("/metrics").status_code == 401
        assert nobody.get("/health").status_code == 200


def test_page_is_static_and_allows_nothing_from_elsewhere(running: Running) -> None:
    with running.daemon.client() as nobody:
        page = nobody.get("/")
    assert page.status_code == 200
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    assert "http://" not in page.text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page.text


def test_browser_of_a_configured_origin_may_ask_and_another_may_not(running: Running) -> None:
    question = {"access-control-request-method": "POST"}
    with running.daemon.client() as nobody:
        for origin, is_let_in in (("https://page.example", True), ("https://evil.example", False)):
            answer = nobody.options("/v1/chat/completions", headers={"origin": origin, **question})
            assert (answer.headers.get("access-control-allow-origin") == origin) == is_let_in


def test_events_begin_with_the_whole_state(running: Running) -> None:
    with running.admin.stream("GET", "/admin/api/events") as stream:
        lines = stream.iter_lines()
        assert next(lines) == "event: state"
        state = json.loads(next(lines).removeprefix("data: "))
    assert [tier["name"] for tier in state["tiers"]] == ["device", "host", "disk"]
    assert state["write_budget_bytes"] == 1 << 30


@pytest.mark.parametrize(
    ("action", "field", "value"), [("pin", "is_pinned", True), ("unpin", "is_pinned", False)]
)
def test_administrator_changes_a_session_of_any_tenant(
    running: Running, action: str, field: str, value: bool
) -> None:
    running.ann.post("/v1/chat/completions", json=chat_body("Pin me", "pinned")).raise_for_status()
    what = {"tenant": "ann", "name": "pinned", "action": action}
    assert running.admin.post("/admin/api/sessions", json=what).status_code == 200
    state = running.admin.get("/admin/api/state").json()
    [session] = [each for each in state["sessions"] if each["name"] == "pinned"]
    assert session[field] is value


@pytest.mark.parametrize(
    ("what", "status"),
    [
        ({"tenant": "bob", "name": "first", "action": "delete"}, 404),
        ({"tenant": "ann", "name": "first", "action": "explode"}, 400),
        ({"tenant": "ann", "name": "first"}, 400),
        ({"tenant": "ann", "name": "first", "action": "pin", "path": "x"}, 400),
    ],
)
def test_action_that_makes_no_sense_is_refused(
    running: Running, what: dict[str, str], status: int
) -> None:
    assert running.admin.post("/admin/api/sessions", json=what).status_code == status


def test_fork_and_delete_of_the_page_do_what_they_say(running: Running) -> None:
    running.bob.post("/v1/chat/completions", json=chat_body("Fork me", "trunk")).raise_for_status()
    for what in (
        {"action": "fork", "name": "trunk", "new_name": "branch"},
        {"action": "delete", "name": "trunk"},
    ):
        answer = running.admin.post("/admin/api/sessions", json={"tenant": "bob", **what})
        assert answer.status_code == 200
    state = running.admin.get("/admin/api/state").json()
    assert {each["name"] for each in state["sessions"] if each["tenant"] == "bob"} == {"branch"}


def test_reload_of_a_good_file_takes_effect_without_a_restart(running: Running) -> None:
    line = running.reload(config_text(running.config.parent, body="1MiB", inflight=7))
    assert line["event"] == "reloaded"
    assert "server.limits.inflight" in line["changed"]
    assert metrics(running.admin)["offload_config_last_reload_successful{}"] == 1


def test_reload_of_a_bad_file_keeps_the_old_and_says_so(running: Running) -> None:
    line = running.reload("server: {limits: {inflihgt: 1}}")
    assert line["event"] == "reload refused"
    assert "the nearest is 'server.limits.inflight'" in line["reason"]
    assert metrics(running.admin)["offload_config_last_reload_successful{}"] == 0
    assert running.ann.get("/v1/models").status_code == 200
    assert running.reload(config_text(running.config.parent))["event"] == "reloaded"


def test_key_that_is_added_by_a_reload_is_let_in(running: Running) -> None:
    keys = running.config.parent / "keys"
    keys.write_text(keys.read_text() + "\n" + key_line("carol", "sk-carol", is_admin=False))
    assert running.reload(config_text(running.config.parent))["num_keys"] == 4
    with running.daemon.client("sk-carol") as carol:
        assert carol.get("/v1/models").status_code == 200


def test_ps_shows_tiers_and_sessions(running: Running, shell: Shell) -> None:
    running.ann.post("/v1/chat/completions", json=chat_body("In ps", "listed")).raise_for_status()
    shown = shell.run("ps", key=ADMIN)
    assert "listed" in shown
    assert "device" in shown
    assert json.loads(shell.run("ps", "--json", key=ADMIN))["model"] == "recall"


def test_chat_of_a_pipe_goes_on_where_it_was(
    running: Running, shell: Shell, tmp_path: Path
) -> None:
    args = ("chat", "--session", "piped", "--max-tokens", "4", "--history", str(tmp_path))
    assert shell.run(*args, stdin="How does it begin?\n").strip()
    assert shell.run(*args, stdin="And then?\n").strip()
    wait_for = running.daemon.wait_for
    first = wait_for(lambda line: line.get("session") == "piped")
    known = first["prompt_tokens"]
    second = wait_for(lambda line: line.get("session") == "piped" and line is not first)
    assert sum(second["cached"].values()) >= known


def test_sessions_of_a_daemon_are_listed_changed_and_moved(
    running: Running, shell: Shell, tmp_path: Path
) -> None:
    said = chat_body("A text that is long enough to keep. " * 20, "moved")
    running.ann.post("/v1/chat/completions", json=said).raise_for_status()
    url = ("--url", running.daemon.address)
    archive = str(tmp_path / "moved.kv.tar.zst")
    assert "pinned" in shell.run("sessions", "pin", "moved", *url)
    assert "copy" in shell.run("sessions", "fork", "moved", "copy")
    assert "moved" in shell.run("sessions", "persist", "moved")
    assert "disk" in shell.run("sessions", "evict", "copy", "--to", "disk")
    shell.run("sessions", "export", "moved", archive, *url)
    shell.run("sessions", "import", archive, "--name", "again", *url)
    listed = json.loads(shell.run("sessions", "list", "--json", *url))["sessions"]
    by_name = {each["id"]: each for each in listed}
    assert by_name["again"]["num_tokens"] == by_name["moved"]["num_tokens"] > 500
    shell.run("sessions", "delete", "copy", "again", *url)
    assert "copy" not in shell.run("sessions", "list", *url)


def test_explanation_of_a_miss_shows_where_the_texts_part(running: Running, shell: Shell) -> None:
    body = {"prompt": "The cat sat on the mat, and slept.", "session_id": "cat", "max_tokens": 2}
    running.ann.post("/v1/completions", json=body).raise_for_status()
    shown = shell.run("sessions", "explain", "cat", "The cat sat on the hat, and slept.")
    assert "session: " in shown
    assert "mat, and" in shown
    assert "hat, and" in shown
