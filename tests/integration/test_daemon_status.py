"""The status page in a real browser: it shows what the daemon does, and acts on it."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.browser import CHROMIUM, Browser
from tests.support.daemon_process import DaemonProcess, chat_body

NAME = "seen & <b>bold</b>"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, which is not installed")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    options = ("--set", "tiers.disk.write_budget_per_day=1GiB")
    with (
        DaemonProcess(tmp_path_factory.mktemp("status"), *options) as daemon,
        daemon.client() as opened,
    ):
        body = chat_body("Something to be seen. " * 40, "live-one")
        opened.post("/v1/chat/completions", json=body).raise_for_status()
        yield opened


@pytest.fixture(scope="module")
def page(client: httpx.Client, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile"), str(client.base_url)) as browser:
        browser.until("document.querySelector('#state')?.textContent === 'ready'")
        yield browser


def session(client: httpx.Client, name: str) -> dict[str, Any]:
    state = client.get("/admin/api/state").json()
    return next(each for each in state["sessions"] if each["name"] == name)


def test_page_shows_the_live_session_its_tokens_and_the_tiers(
    client: httpx.Client, page: Browser
) -> None:
    text = page.until("document.querySelector('td.name')?.textContent.includes('live-one')")
    assert f"{session(client, 'live-one')['num_tokens']:,}" in text
    assert "Host memory" in text
    assert "of 1.0 GiB a day" in text
    assert "recall" in text


def test_request_that_begins_shows_up_without_a_reload(client: httpx.Client, page: Browser) -> None:
    body = chat_body("Go on", "answering", max_tokens=20_000, stream=True, ignore_eos=True)
    with client.stream("POST", "/v1/chat/completions", json=body) as stream:
        lines = stream.iter_lines()  # kept: without it the answer would be hung up on
        next(lines)
        row = "document.querySelector('#requests .request')?.textContent"
        page.until(f"{row}?.includes('answering') && {row}.includes('tokens written')")
    page.until("document.querySelector('#requests .empty') !== null")


def test_button_asks_before_it_deletes_and_then_does(client: httpx.Client, page: Browser) -> None:
    client.post("/v1/sessions/live-one/fork", json={"name": "fork-one"}).raise_for_status()
    page.until("document.body.innerText.includes('fork-one')")
    page.run(
        "[...document.querySelectorAll('tr')].find(each => each.textContent.includes('fork-one'))"
        ".querySelector('button[title^=for]').click()"
    )
    text = page.until("document.querySelector('dialog').open")
    assert "There is no way back" in text
    page.click("Cancel")
    assert session(client, "fork-one")
    page.run(
        "[...document.querySelectorAll('tr')].find(each => each.textContent.includes('fork-one'))"
        ".querySelector('button[title^=for]').click()"
    )
    page.until("document.querySelector('dialog').open")
    page.run("document.querySelector('#ask-yes').click()")
    page.until("!document.querySelector('#sessions').innerText.includes('fork-one')")
    assert client.get("/v1/sessions/fork-one").status_code == 404


def test_button_pins_a_session(client: httpx.Client, page: Browser) -> None:
    page.click("Pin")
    page.until("document.querySelector('#sessions').innerText.includes('pinned')")
    pinned = [each for each in client.get("/v1/sessions").json()["data"] if each["is_pinned"]]
    assert len(pinned) == 1


def test_name_that_is_markup_stays_text(page: Browser) -> None:
    shown = page.run(
        f"(() => {{ const state = structuredClone(shown); state.sessions[0].name = '{NAME}';"
        " show(state); return document.querySelector('#sessions').innerText; })()"
    )
    assert NAME in shown
    assert page.run("document.querySelector('td.name b')") is None
