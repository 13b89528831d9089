"""Runs the ``openai`` package's own tests of the endpoints that the daemon serves, against it.

::

    python -m venv /tmp/oai/venv
    /tmp/oai/venv/bin/pip install "openai[aiohttp]==3.54.0" pytest pytest-asyncio pytest-xdist rich
    pip download --no-binary openai --no-deps openai==3.54.0   # and unpack it
    python -m tests.support.daemon_openai_suite /tmp/oai/venv/bin/python openai-3.54.0

Those tests are written for a server that makes its answers up. So things of the names that they ask
for are put there before every request; models of any name are answered for.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from offload.daemon.http.app import build_app
from offload.daemon.http.options import HttpOptions
from offload.daemon.http.render_items import input_items
from offload.daemon.http.store import HttpStore, StoredResponse
from offload.daemon.ops.access import Access
from offload.daemon.ops.tenants import LOCAL
from tests.support.daemon_http import running_engine, serving

SUITES = {
    "create": ("chat/test_completions.py",),  # stored chats are not served
    "not all_params": ("test_completions.py",),  # all of them include a suffix, which is refused
    "not delete": ("test_models.py",),  # nobody deletes a model
    "not compact": (  # contexts are not compacted
        "test_responses.py",
        "responses/test_input_items.py",
        "responses/test_input_tokens.py",
        "test_conversations.py",
        "conversations/test_items.py",
    ),
}
"""Files by which of their tests are run."""

PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "1")
RESPONSES = ("response_id", "previous_response_id", "resp_677efb5139a88190b512bc3fef8e535d")
CONVERSATIONS = ("conv_123", "string")


class Seeded:
    """Puts the things there that the tests ask for, before each request."""

    def __init__(self, app: ASGIApp, store: HttpStore) -> None:
        self._app = app
        self._store = store

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] in ("GET", "POST", "DELETE"):
            seed(self._store)
        await self._app(scope, receive, send)


def seed(store: HttpStore) -> None:
    for name in CONVERSATIONS:
        body = {"id": name, "object": "conversation", "created_at": 0, "metadata": {}}
        store.put_conversation(LOCAL, body)
        items = [{"id": item, "role": "user", "content": "text"} for item in ("msg_abc", "after")]
        store.add_items(LOCAL, name, input_items(items))
    for name in RESPONSES:
        items = input_items([{"id": "after", "role": "user", "content": "text"}])
        store.put_response(LOCAL, StoredResponse(None, None, _response(name), items))


def _response(name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "response",
        "created_at": 0,
        "status": "completed",
        "model": "recall",
        "output": [],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": None,
    }


def main(python: str, source: str) -> int:
    """Serve, run the tests with another interpreter, and return the worst exit status."""
    with tempfile.TemporaryDirectory() as folder, running_engine(Path(folder)) as engine:
        options = HttpOptions(Path(folder) / "http", default_max_tokens=16, accept_any_model=True)
        app = build_app(engine, options, access=Access())
        app.add_middleware(Seeded, store=app.state.context.store)
        with serving(app) as url:
            environment = os.environ | {"TEST_API_BASE_URL": f"{url}/v1"}
            codes = [
                subprocess.run(
                    [
                        python,
                        *PYTEST,
                        "-k",
                        which,
                        *(f"tests/api_resources/{file}" for file in files),
                    ],
                    cwd=source,
                    env=environment,
                    check=False,
                ).returncode
                for which, files in SUITES.items()
            ]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
