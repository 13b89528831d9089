"""Anthropic's API: blocks, tools, streams of named events, and prompts that stay the same."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.daemon_http import ALICE, RunningDaemon, running_daemon

HELLO = [{"role": "user", "content": "hello"}]
TOOL = {
    "name": "weather",
    "description": "of a place",
    "input_schema": {
        "type": "object",
        "properties": {"celsius": {"type": "boolean"}},
        "required": ["celsius"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    with running_daemon(tmp_path_factory.mktemp("daemon")) as running:
        yield running


@pytest.fixture(scope="module")
def client(daemon: RunningDaemon) -> Iterator[httpx.Client]:
    headers = {"x-api-key": ALICE, "anthropic-version": "2023-06-01"}
    with httpx.Client(base_url=daemon.url, headers=headers, timeout=60) as made:
        yield made


def create(client: httpx.Client, **body: Any) -> dict[str, Any]:
    defaults = {"model": "recall", "max_tokens": 8, "messages": HELLO}
    response = client.post("/v1/messages", json=defaults | body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def events(client: httpx.Client, **body: Any) -> list[tuple[str, dict[str, Any]]]:
    """Return the events of a streamed message, each with its name."""
    body = {"model": "recall", "max_tokens": 8, "messages": HELLO, "stream": True} | body
    found, name = [], ""
    with client.stream("POST", "/v1/messages", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                found.append((name, json.loads(line.removeprefix("data: "))))
    return found


def test_message_has_blocks_a_reason_and_usage(client: httpx.Client) -> None:
    message = create(client)
    assert message["content"][0]["type"] == "text"
    assert message["stop_reason"] == "max_tokens"
    usage = message["usage"]
    parts = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    counted = client.post("/v1/messages/count_tokens", json={"messages": HELLO}).json()
    assert sum(usage[part] for part in parts) == counted["input_tokens"]
    assert usage["output_tokens"] == 8


def test_stream_has_the_events_of_the_api_in_their_order(client: httpx.Client) -> None:
    whole = create(client, temperature=0)
    found = events(client, temperature=0)
    names = [name for name, _ in found]
    assert [data["type"] for _, data in found] == names
    assert names[:2] == ["message_start", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    said = "".join(data["delta"]["text"] for name, data in found if name == "content_block_delta")
    assert said == whole["content"][0]["text"]
    assert found[-2][1]["usage"]["output_tokens"] == 8


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_tool_that_must_be_used_is_used(client: httpx.Client, choice: dict[str, str]) -> None:
    message = create(client, tools=[TOOL], tool_choice=choice, max_tokens=200)
    assert message["stop_reason"] == "tool_use"
    (block,) = message["content"]
    assert (block["type"], block["name"]) == ("tool_use", "weather")
    assert isinstance(block["input"]["celsius"], bool)


def test_tool_that_must_be_used_is_used_in_a_stream(client: httpx.Client) -> None:
    found = events(client, tools=[TOOL], tool_choice={"type": "any"}, max_tokens=200)
    starts = [data["content_block"] for name, data in found if name == "content_block_start"]
    assert [(block["type"], block["name"]) for block in starts] == [("tool_use", "weather")]
    spelled = [data["delta"]["partial_json"] for name, data in found if name.endswith("_delta")
               and data["type"] == "content_block_delta"]  # fmt: skip
    assert isinstance(json.loads("".join(spelled))["celsius"], bool)


def test_turn_after_a_tools_result_finds_all_before_it_in_the_cache(client: httpx.Client) -> None:
    question = {"role": "user", "content": "the weather, please " * 15}
    tools: dict[str, Any] = {"tools": [TOOL], "tool_choice": {"type": "any"}, "max_tokens": 200}
    first = create(client, messages=[question], **tools)
    (block,) = first["content"]
    result = {"type": "tool_result", "tool_use_id": block["id"], "content": [
        {"type": "text", "text": "warm"}]}  # fmt: skip
    history = [
        question,
        {"role": "assistant", "content": first["content"]},
        {"role": "user", "content": [result]},
    ]
    usage = create(client, messages=history, tools=[TOOL])["usage"]
    prompt = first["usage"]["cache_creation_input_tokens"] + first["usage"]["input_tokens"]
    prompt += first["usage"]["cache_read_input_tokens"]
    assert usage["cache_read_input_tokens"] >= prompt + first["usage"]["output_tokens"] - 2


def test_billing_header_that_changes_leaves_the_prompt_the_same(client: httpx.Client) -> None:
    def system(digits: str) -> list[dict[str, Any]]:
        header = f"x-anthropic-billing-header: cc_version=2; cch={digits};"
        cached = {"type": "ephemeral"}
        rules = {"type": "text", "text": "be brief " * 40, "cache_control": cached}
        return [{"type": "text", "text": header}, rules]

    create(client, system=system("0a1b2"))
    usage = create(client, system=system("fffee"))["usage"]
    assert usage["cache_read_input_tokens"] > 300


def test_answer_goes_on_with_a_last_message_of_the_assistant(client: httpx.Client) -> None:
    begun = [*HELLO, {"role": "assistant", "content": "I s"}]
    shorter = client.post("/v1/messages/count_tokens", json={"messages": HELLO}).json()
    longer = client.post("/v1/messages/count_tokens", json={"messages": begun}).json()
    assert longer["input_tokens"] == shorter["input_tokens"] + len("I s")


def test_stop_sequence_that_ends_an_answer_is_named(client: httpx.Client) -> None:
    text = create(client, temperature=0)["content"][0]["text"]
    message = create(client, temperature=0, stop_sequences=[text[2:4]])
    assert message["stop_reason"] == "stop_sequence"
    assert message["stop_sequence"] == text[2:4]
    assert text[2:4] not in message["content"][0]["text"]


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ({"model": "other"}, "not_found_error"),
        ({"max_tokens": None}, "invalid_request_error"),
        ({"messages": []}, "invalid_request_error"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "invalid_request_error"),
        ({"tool_choice": {"type": "any"}}, "invalid_request_error"),
    ],
)
def test_message_that_is_wrong_is_refused_in_the_apis_own_way(
    client: httpx.Client, body: dict[str, Any], kind: str
) -> None:
    defaults = {"model": "recall", "max_tokens": 8, "messages": HELLO}
    response = client.post("/v1/messages", json=defaults | body)
    found = response.json()
    assert response.status_code in (400, 404)
    assert (found["type"], found["error"]["type"]) == ("error", kind)
    assert found["request_id"] == response.headers["x-request-id"]


def test_session_of_claude_code_is_found_in_its_user_id(client: httpx.Client) -> None:
    user_id = json.dumps({"session_id": "claude-session"})
    messages = [{"role": "user", "content": "whose session is it?"}]
    body = {"max_tokens": 1, "messages": messages, "metadata": {"user_id": user_id}}
    response = client.post("/v1/messages", json=body)
    assert response.headers["x-session-id"] == "claude-session"
