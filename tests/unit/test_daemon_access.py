"""Who is let in: keys, tenants, and the pages of other people."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from offload.daemon.ops.access import Access, configured_keys
from offload.daemon.ops.access_guard import AccessMiddleware
from offload.daemon.ops.config_sources import load_configuration
from offload.daemon.ops.tenants import (
    ApiKey,
    Tenant,
    append_key,
    digest_of,
    key_line,
    new_key,
    read_keys,
)
from offload.errors import ConfigError

ANN = ApiKey("ann/laptop", digest_of("sk-ann"))
ROOT_KEY = ApiKey("root", digest_of("sk-root"), is_admin=True)
KEYS = (ANN, ROOT_KEY)


def key_file(tmp_path: Path, text: str, mode: int = 0o600) -> Path:
    path = tmp_path / "keys"
    path.write_text(text)
    path.chmod(mode)
    return path


def ask(access: Access, path: str, headers: dict[str, str], method: str = "GET") -> httpx.Response:
    """Send one request through the middleware to an application that answers everything."""

    async def answer(request: Request) -> PlainTextResponse:
        return PlainTextResponse(request.url.path)

    inner = Starlette(routes=[Route("/{path:path}", answer, methods=["GET", "POST", "OPTIONS"])])
    app = AccessMiddleware(
        inner, access, lambda: ("/",), lambda: ("kv.example",), lambda: ("https://a.example",)
    )
    transport = httpx.ASGITransport(app=app)

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(send())


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer sk-ann"},
        {"authorization": "bearer  sk-ann "},
        {"x-api-key": "sk-ann"},
    ],
)
def test_key_that_is_known_is_its_tenants(headers: dict[str, str]) -> None:
    assert Access(KEYS).tenant_of(headers) == Tenant("ann", False, "ann/laptop")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer sk-bob"},
        {"authorization": "Bearer "},
        {"authorization": "Basic sk-ann"},
        {"authorization": "Bearer sk-bob", "x-api-key": "sk-ann"},
        {"x-api-key": "sk-ann" * 1000},
        {"x-api-key": digest_of("sk-ann").hex()},
        {"authorization": "Bearer śk-ann"},
    ],
)
def test_key_that_is_not_known_is_nobodys(headers: dict[str, str]) -> None:
    assert Access(KEYS).tenant_of(headers) is None


def test_server_without_keys_has_one_tenant_who_is_administrator() -> None:
    assert Access().tenant_of({}) == Tenant("local", True)
    assert Access().tenant_names() == ("local",)


def test_keys_that_are_replaced_let_the_old_ones_in_no_more() -> None:
    access = Access([ANN])
    access.replace([ROOT_KEY])
    assert access.tenant_of({"x-api-key": "sk-ann"}) is None
    assert access.tenant_of({"x-api-key": "sk-root"}) == Tenant("root", True, "root")


def test_two_keys_of_one_tenant_are_one_tenant() -> None:
    both = Access([ANN, ApiKey("ann/phone", digest_of("sk-phone"))])
    assert both.tenant_names() == ("ann",)


def test_file_of_keys_with_comments_and_scopes_is_read(tmp_path: Path) -> None:
    lines = ["# people", "", key_line("ann/laptop", "sk-ann", is_admin=False)]
    lines.append(key_line("root", "sk-root", is_admin=True))
    assert read_keys(key_file(tmp_path, "\n".join(lines))) == KEYS


def test_line_that_is_added_makes_a_private_file_that_can_be_read(tmp_path: Path) -> None:
    path, key = tmp_path / "keys", new_key()
    append_key(path, key_line("ann", key, is_admin=False))
    assert path.stat().st_mode & 0o777 == 0o600
    assert Access(read_keys(path)).tenant_of({"x-api-key": key}) == Tenant("ann", False, "ann")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no keys"),
        ("ann:sk-secret", "keys:1 is not name:sha256"),
        (f"ann:{'a' * 64}:root", "keys:1 is not name:sha256"),
        (f"../x:{'a' * 64}", "keys:1 is not name:sha256"),
        (f"ann:{'a' * 64}\nann:{'b' * 64}", "appears twice"),
        (f"ann:{'a' * 64}\nbob:{'a' * 64}", "appears twice"),
    ],
)
def test_file_of_keys_that_is_wrong_is_refused_and_not_quoted(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_keys(key_file(tmp_path, text))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("mode", [0o644, 0o620, 0o602])
def test_file_of_keys_that_others_can_use_is_refused(tmp_path: Path, mode: int) -> None:
    path = key_file(tmp_path, key_line("ann", "sk-ann", is_admin=False), mode)
    with pytest.raises(ConfigError, match=f"{mode:o}"):
        read_keys(path)


def test_file_of_keys_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the keys"):
        read_keys(tmp_path / "none")


def test_key_of_the_environment_is_an_administrators() -> None:
    server = load_configuration(None, {"server.api_key": "sk-one"}, {}).server
    tenant = Access(configured_keys(server)).tenant_of({"x-api-key": "sk-one"})
    assert tenant == Tenant("default", True, "default")


@pytest.mark.parametrize("path", ["/health", "/v1/health", "/ready", "/ping", "/"])
def test_probe_and_page_without_a_key_are_answered(path: str) -> None:
    assert ask(Access(KEYS), path, {}).status_code == 200


@pytest.mark.parametrize(
    "path", ["/v1/models", "/metrics", "/tokenize", "/admin/api/state", "/slots", "/health/../x"]
)
def test_everything_else_without_a_key_is_a_401(path: str) -> None:
    answer = ask(Access(KEYS), path, {})
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"


def test_refusal_of_anthropics_path_has_anthropics_shape() -> None:
    answer: Any = ask(Access(KEYS), "/v1/messages", {}, "POST").json()
    assert (answer["type"], answer["error"]["type"]) == ("error", "authentication_error")


def test_admin_path_with_an_ordinary_key_is_a_403() -> None:
    assert ask(Access(KEYS), "/admin/api/state", {"x-api-key": "sk-ann"}).status_code == 403
    assert ask(Access(KEYS), "/admin/api/state", {"x-api-key": "sk-root"}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "evil.example:8000"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"host": "localhost", "origin": "http://localhost.evil.example"},
        {"origin": "http://[bad"},
    ],
)
def test_page_of_somebody_else_reaches_no_server_without_keys(headers: dict[str, str]) -> None:
    assert ask(Access(), "/v1/models", headers).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "127.0.0.1:8000"},
        {"host": "[::1]:8000", "origin": "http://[::1]:8000"},
        {"host": "kv.example"},
        {"host": "LOCALHOST:1"},
        {"origin": "https://a.example"},
        {"origin": "http://localhost:3000"},
    ],
)
def test_page_of_this_machine_or_a_configured_one_is_let_in(headers: dict[str, str]) -> None:
    assert ask(Access(), "/v1/models", headers).status_code == 200


def test_question_of_a_browser_before_it_shows_its_key_is_answered() -> None:
    assert ask(Access(KEYS), "/v1/models", {}, "OPTIONS").status_code == 200
