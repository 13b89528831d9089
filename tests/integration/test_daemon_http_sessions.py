"""Sessions, slots, tokens and probes over HTTP."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from offload.daemon.http.app import build_app
from tests.support.daemon_http import BOB, RunningDaemon, running_daemon, serving, two_tenants


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    with running_daemon(tmp_path_factory.mktemp("daemon"), max_import_bytes=1 << 22) as running:
        yield running


@pytest.fixture(scope="module")
def client(daemon: RunningDaemon) -> Iterator[httpx.Client]:
    with daemon.client() as made:
        yield made


@pytest.fixture
def session(client: httpx.Client, request: pytest.FixtureRequest) -> Iterator[str]:
    """Name a session that has some tokens."""
    name = f"s-{abs(hash(request.node.name)):x}"
    body = {"prompt": f"{name} " * 20, "max_tokens": 4, "session_id": name}
    client.post("/v1/completions", json=body).raise_for_status()
    yield name
    client.delete(f"/v1/sessions/{name}")


def ok(response: httpx.Response) -> Any:
    assert response.status_code == 200, response.text
    return response.json()


def test_session_of_a_request_is_listed_with_its_tokens(client: httpx.Client, session: str) -> None:
    found = ok(client.get(f"/v1/sessions/{session}"))
    assert found in ok(client.get("/v1/sessions"))["data"]
    assert found["num_tokens"] > 20
    assert sum(found["tokens"][tier] for tier in ("device", "host", "disk")) == found["num_tokens"]


def test_session_that_is_made_pinned_and_deleted_is_gone(client: httpx.Client) -> None:
    made = ok(client.post("/v1/sessions", json={"name": "made", "ttl_s": 60, "pin": True}))
    assert (made["is_pinned"], made["ttl_s"]) == (True, 60)
    patched = ok(client.patch("/v1/sessions/made", json={"pin": False, "ttl_s": None}))
    assert (patched["is_pinned"], patched["ttl_s"]) == (False, None)
    assert client.delete("/v1/sessions/made").status_code == 204
    assert client.get("/v1/sessions/made").status_code == 404


def test_change_of_one_thing_leaves_the_others(client: httpx.Client, session: str) -> None:
    ok(client.patch(f"/v1/sessions/{session}", json={"ttl_s": 99}))
    assert ok(client.patch(f"/v1/sessions/{session}", json={"pin": True}))["ttl_s"] == 99


def test_fork_has_the_first_tokens_of_its_parent(client: httpx.Client, session: str) -> None:
    body = {"name": f"{session}-fork", "at_token": 10}
    fork = ok(client.post(f"/v1/sessions/{session}/fork", json=body))
    assert (fork["num_tokens"], fork["parent"]) == (10, session)
    assert client.post(f"/v1/sessions/{session}/fork", json=body).status_code == 400
    assert client.delete(f"/v1/sessions/{session}-fork").status_code == 204


def test_session_that_is_evicted_is_on_disk_until_it_is_prefetched(
    client: httpx.Client, session: str
) -> None:
    evicted = ok(client.post(f"/v1/sessions/{session}/evict"))
    assert (evicted["state"], evicted["dirty_tokens"]) == ("disk", 0)
    assert ok(client.post(f"/v1/sessions/{session}/prefetch"))["state"] != "disk"
    assert ok(client.post(f"/v1/sessions/{session}/persist"))["dirty_tokens"] == 0


@pytest.mark.parametrize("form", ["query", "prompt", "tokens", "messages"])
def test_explanation_names_the_first_token_that_differs(
    client: httpx.Client, session: str, form: str
) -> None:
    prompt = session[:3] + "?" + session[4:]
    path = f"/v1/sessions/{session}/explain"
    if form == "query":
        found = ok(client.get(path, params={"prompt": prompt}))
    else:
        messages = [{"role": "user", "content": "x"}]
        bodies = {"prompt": prompt, "tokens": list(prompt.encode()), "messages": messages}
        key = "messages" if form == "messages" else "prompt"
        found = ok(client.post(path, json={key: bodies[form]}))
    assert found["num_common_tokens"] == (0 if form == "messages" else 3)
    assert found["miss"] is not None
    assert found["reason"]


def test_session_that_is_exported_and_imported_is_known_again(
    client: httpx.Client, session: str, daemon: RunningDaemon
) -> None:
    archive = client.get(f"/v1/sessions/{session}/export")
    assert archive.headers["content-type"] == "application/octet-stream"
    assert int(archive.headers["content-length"]) == len(archive.content)
    params = {"name": f"{session}-copy"}
    copy = ok(client.post("/v1/sessions/import", params=params, content=archive.content))
    assert copy["num_tokens"] == ok(client.get(f"/v1/sessions/{session}"))["num_tokens"]
    assert client.post("/v1/sessions/import", params=params, content=b"x").status_code == 400
    folder = daemon.app.state.context.options.data_path / "transfers"
    assert list(folder.iterdir()) == []
    assert folder.stat().st_mode & 0o777 == 0o700


def test_archive_of_another_tenant_is_refused(
    client: httpx.Client, session: str, daemon: RunningDaemon
) -> None:
    archive = client.get(f"/v1/sessions/{session}/export").content
    with daemon.client(BOB) as bob:
        refused = bob.post("/v1/sessions/import", params={"name": "stolen"}, content=archive)
        assert refused.status_code == 409
        assert refused.json()["error"]["code"] == "kv_incompatible"
        assert refused.headers["x-should-retry"] == "false"
        assert bob.get("/v1/sessions/stolen").status_code == 404


def test_archive_that_is_too_long_is_refused(client: httpx.Client, daemon: RunningDaemon) -> None:
    pieces = (b"x" * (1 << 20) for _ in range(8))
    response = client.post("/v1/sessions/import", params={"name": "big"}, content=pieces)
    assert response.status_code == 413
    assert list((daemon.app.state.context.options.data_path / "transfers").iterdir()) == []


def test_what_a_killed_process_has_left_is_deleted(daemon: RunningDaemon, tmp_path: Path) -> None:
    left = tmp_path / "transfers" / "left"
    left.parent.mkdir()
    left.write_bytes(b"x")
    options = type(daemon.app.state.context.options)(data_path=tmp_path)
    with serving(build_app(daemon.engine, options, access=two_tenants())):
        assert not left.exists()


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "", None),
        ("PATCH", "", {"pin": True}),
        ("DELETE", "", None),
        ("POST", "/fork", {"name": "x"}),
        ("POST", "/persist", None),
        ("POST", "/evict", None),
        ("POST", "/prefetch", None),
        ("GET", "/explain?prompt=x", None),
        ("GET", "/export", None),
    ],
)
def test_session_of_another_tenant_is_not_found(
    daemon: RunningDaemon, session: str, method: str, path: str, body: Any
) -> None:
    with daemon.client(BOB) as bob:
        response = bob.request(method, f"/v1/sessions/{session}{path}", json=body)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "session_not_found"


@pytest.mark.parametrize("name", ["../x", "a/b", "", "é", "x" * 129])
def test_name_that_will_not_do_is_refused(client: httpx.Client, name: str) -> None:
    assert client.post("/v1/sessions", json={"name": name}).status_code == 400


def test_slot_that_is_saved_erased_and_restored_knows_its_prompt(client: httpx.Client) -> None:
    prompt = "what a slot is for " * 10
    body = {"prompt": prompt, "n_predict": 2, "id_slot": 1, "temperature": 0}
    first = ok(client.post("/completion", json=body))
    assert first["timings"]["prompt_n"] == len(prompt)
    saved = ok(client.post("/slots/1?action=save", json={"filename": "a.bin"}))
    assert saved.keys() == {"id_slot", "filename", "n_saved", "n_written", "timings"}
    assert ok(client.post("/slots/1?action=erase"))["n_erased"] == saved["n_saved"]
    assert ok(client.get("/slots"))[1]["n_tokens"] == 0
    restored = ok(client.post("/slots/1?action=restore", json={"filename": "a.bin"}))
    assert restored["n_restored"] == saved["n_saved"]
    again = ok(client.post("/completion", json=body))
    assert again["timings"]["cache_n"] == len(prompt) - 1
    assert again["content"] == first["content"]


@pytest.mark.parametrize("filename", ["../x", "a/b", "a\\b", "..", "", None])
def test_slot_file_that_is_no_plain_name_is_refused(client: httpx.Client, filename: Any) -> None:
    response = client.post("/slots/0?action=restore", json={"filename": filename})
    assert response.status_code == 400


def test_slot_file_that_is_not_there_is_not_found(client: httpx.Client) -> None:
    assert client.post("/slots/0?action=restore", json={"filename": "no"}).status_code == 404


@pytest.mark.parametrize("path", ["/slots/99?action=erase", "/slots/0?action=format"])
def test_slot_action_that_cannot_be_is_refused(client: httpx.Client, path: str) -> None:
    assert client.post(path).status_code == 400


def test_completion_without_the_cache_reads_all_of_its_prompt(client: httpx.Client) -> None:
    body = {"prompt": "again and again " * 20, "n_predict": 1}
    for cached in (True, False):
        client.post("/completion", json=body | {"cache_prompt": cached})
    assert ok(client.post("/completion", json=body))["timings"]["cache_n"] > 0
    uncached = ok(client.post("/completion", json=body | {"cache_prompt": False}))
    assert uncached["timings"]["cache_n"] == 0


def test_completion_in_a_stream_ends_with_its_timings(client: httpx.Client) -> None:
    body = {"prompt": [104, "ello"], "n_predict": 3, "stream": True, "return_progress": True}
    with client.stream("POST", "/completion", json=body) as response:
        lines = [line for line in response.iter_lines() if line]
    assert '"prompt_progress"' in lines[0]
    assert '"stop":true' in lines[-1]
    assert '"prompt_n":5' in lines[-1]


@pytest.mark.parametrize("body", [{"prompt": "hello"}, {"content": "hello"}])
def test_text_becomes_tokens_and_text_again(client: httpx.Client, body: dict[str, str]) -> None:
    tokens = ok(client.post("/tokenize", json=body))
    assert (tokens["tokens"], tokens["count"]) == (list(b"hello"), 5)
    text = ok(client.post("/detokenize", json={"tokens": tokens["tokens"]}))
    assert text == {"prompt": "hello", "content": "hello"}


def test_conversation_becomes_the_tokens_of_its_template(client: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}]}
    text = ok(client.post("/apply-template", json=body))["prompt"]
    tokens = ok(client.post("/tokenize", json=body | {"with_pieces": True}))["tokens"]
    assert "".join(token["piece"] for token in tokens) == text


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/apply-template"])
def test_tokens_of_nothing_are_refused(client: httpx.Client, path: str) -> None:
    assert client.post(path, json={}).status_code == 400


def test_token_that_is_none_is_refused(client: httpx.Client) -> None:
    assert client.post("/detokenize", json={"tokens": [99_999]}).status_code == 400


def test_probes_say_how_the_daemon_is(client: httpx.Client) -> None:
    assert ok(client.get("/ready")) == {"status": "ok"}
    assert ok(client.get("/is_sleeping")) == {"is_sleeping": False}
    assert ok(client.get("/load"))["num_running"] == 0
    assert ok(client.get("/version"))["version"]
    assert ok(client.get("/props"))["total_slots"] == 4
