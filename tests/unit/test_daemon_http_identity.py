"""Which session a request says it belongs to."""

import json
from typing import Any

import pytest

from offload.daemon.http.identity import clean_name, session_hint

USER_ID = "user_0123_account_4567_session_89abcdef-0123-4567-89ab-cdef01234567"

# From the strongest to the weakest.
SOURCES: list[tuple[dict[str, Any], dict[str, str], str]] = [
    ({"session_id": "s-body"}, {}, "s-body"),
    ({"conversation": {"id": "s-conversation"}}, {}, "s-conversation"),
    ({}, {"x-session-id": "s-header"}, "s-header"),
    ({"vllm_xargs": {"session_id": "s-xargs"}}, {}, "s-xargs"),
    ({}, {"x-claude-code-session-id": "s-claude"}, "s-claude"),
    ({"metadata": {"user_id": json.dumps({"session_id": "s-user"})}}, {}, "s-user"),
    ({"prompt_cache_key": "s-key"}, {}, "s-key"),
]
ID_HEADERS = ("X-Claude-Code-Session-Id", "session-id")


@pytest.mark.parametrize(("body", "headers", "expected"), SOURCES)
def test_hint_from_one_source_is_what_it_says(
    body: dict[str, object], headers: dict[str, str], expected: str
) -> None:
    assert session_hint(body, headers, ID_HEADERS) == expected


@pytest.mark.parametrize("number", range(len(SOURCES) - 1))
def test_hint_from_two_sources_is_the_stronger(number: int) -> None:
    (body, headers, expected), (weaker_body, weaker_headers, _) = SOURCES[number : number + 2]
    both = {**weaker_body, **body}
    assert session_hint(both, weaker_headers | headers, ID_HEADERS) == expected


def test_hint_of_a_previous_response_goes_before_the_headers() -> None:
    assert session_hint({}, {"x-session-id": "header"}, previous_session="before") == "before"


@pytest.mark.parametrize("name", ["X-Session-ID", "x_session_id", "X-SESSION_ID"])
def test_header_in_another_spelling_is_the_same(name: str) -> None:
    assert session_hint({}, {name: "s"}) == "s"


def test_header_of_codex_with_an_underscore_is_found() -> None:
    assert session_hint({}, {"session_id": "s"}, ID_HEADERS) == "s"


def test_user_id_in_the_legacy_form_gives_its_session() -> None:
    hint = session_hint({"metadata": {"user_id": USER_ID}}, {})
    assert hint == "89abcdef-0123-4567-89ab-cdef01234567"


@pytest.mark.parametrize("user_id", ["somebody", "{broken", "{}", 7, None, ["session_id"]])
def test_user_id_without_a_session_is_no_hint(user_id: object) -> None:
    assert session_hint({"metadata": {"user_id": user_id}}, {}) is None


@pytest.mark.parametrize("value", ["", "   ", None, 3, {"id": "x"}])
def test_name_that_says_nothing_is_none(value: object) -> None:
    assert clean_name(value) is None


@pytest.mark.parametrize("name", ["a/b", "../../etc/passwd", "x" * 129, "a\nb", "é", "\ud800"])
def test_name_that_the_store_would_refuse_is_replaced_by_its_digest(name: str) -> None:
    cleaned = clean_name(name)
    assert cleaned is not None
    assert cleaned.startswith("digest-")
    assert clean_name(cleaned) == cleaned


def test_names_that_differ_have_digests_that_differ() -> None:
    assert clean_name("a/b") != clean_name("a/c")
