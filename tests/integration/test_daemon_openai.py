"""The official client works with the daemon: sync, async, streaming, and after an error."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.support.daemon_http import ALICE, RunningDaemon, running_daemon

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"celsius": {"type": "boolean"}},
            "required": ["celsius"],
            "additionalProperties": False,
        },
    },
}
MESSAGES: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    with running_daemon(tmp_path_factory.mktemp("daemon")) as running:
        yield running


@pytest.fixture(scope="module")
def client(daemon: RunningDaemon) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{daemon.url}/v1", api_key=ALICE, max_retries=0) as made:
        yield made


def test_chat_in_pieces_says_what_it_says_at_once(client: OpenAI) -> None:
    settings: Any = {"model": "recall", "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**settings)
    chunks = list(
        client.chat.completions.create(
            **settings, stream=True, stream_options={"include_usage": True}
        )
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 8
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_second_turn_reports_the_first_as_cached(client: OpenAI) -> None:
    settings: Any = {"model": "recall", "max_tokens": 8, "temperature": 0}
    first = client.chat.completions.create(
        **settings, messages=[{"role": "user", "content": "a long question " * 20}]
    )
    assert first.usage is not None
    history: Any = [
        {"role": "user", "content": "a long question " * 20},
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "and then?"},
    ]
    second = client.chat.completions.create(**settings, messages=history)
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached is not None
    # The last token of the answer was never computed with.
    assert cached >= first.usage.total_tokens - 1
    extension: Any = second.usage.model_dump()["kv"]
    assert sum(extension["by_source"].values()) == cached


def test_async_clients_side_by_side_are_answered_alike(daemon: RunningDaemon) -> None:
    async def run() -> list[str | None]:
        async with AsyncOpenAI(base_url=f"{daemon.url}/v1", api_key=ALICE) as made:
            replies = await asyncio.gather(
                *(
                    made.chat.completions.create(
                        model="recall", messages=MESSAGES, max_tokens=6, temperature=0
                    )
                    for _ in range(4)
                )
            )
        return [reply.choices[0].message.content for reply in replies]

    assert len(set(asyncio.run(run()))) == 1


def test_async_stream_that_is_left_ends_the_request(daemon: RunningDaemon) -> None:
    async def run() -> int:
        async with AsyncOpenAI(base_url=f"{daemon.url}/v1", api_key=ALICE) as made:
            stream = await made.chat.completions.create(
                model="recall", messages=MESSAGES, max_tokens=5000, stream=True
            )
            count = 0
            async for _ in stream:
                count += 1
                if count == 3:
                    break
            await stream.close()
        return count

    assert asyncio.run(run()) == 3


def is_weather_call(choice: Any) -> bool:
    (call,) = choice.message.tool_calls
    arguments = json.loads(call.function.arguments)
    return call.function.name == "weather" and isinstance(arguments["celsius"], bool)


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_tool_that_must_be_called_is_called(client: OpenAI, choice: Any) -> None:
    completion = client.chat.completions.create(
        model="recall", messages=MESSAGES, tools=[WEATHER], tool_choice=choice, max_tokens=200
    )
    assert completion.choices[0].finish_reason == "tool_calls"
    assert is_weather_call(completion.choices[0])


def test_tool_that_must_be_called_is_called_in_a_stream(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model="recall", messages=MESSAGES, tools=[WEATHER], tool_choice="required", max_tokens=200
    ) as stream:
        completion = stream.get_final_completion()
    assert completion.choices[0].finish_reason == "tool_calls"
    assert is_weather_call(completion.choices[0])


def test_response_that_must_call_a_tool_does(client: OpenAI) -> None:
    tool: Any = {"type": "function", "strict": True, **WEATHER["function"]}
    with client.responses.stream(
        model="recall", input="hello", tools=[tool], tool_choice="required", max_output_tokens=200
    ) as stream:
        response = stream.get_final_response()
    call: Any = response.output[0]
    assert (call.type, call.name) == ("function_call", "weather")
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "20"}
    after = client.responses.create(
        model="recall", input=[result], previous_response_id=response.id, max_output_tokens=4
    )
    assert after.output[0].type == "message"


def test_answer_of_a_schema_fits_it(client: OpenAI) -> None:
    schema: Any = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"]}
    schema["additionalProperties"] = False
    completion = client.chat.completions.create(
        model="recall",
        messages=MESSAGES,
        max_tokens=100,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
    )
    assert json.loads(completion.choices[0].message.content or "")["x"] in (1, 2)


def test_logprobs_of_a_chat_are_of_its_tokens(client: OpenAI) -> None:
    completion = client.chat.completions.create(
        model="recall", messages=MESSAGES, max_tokens=4, logprobs=True, top_logprobs=2
    )
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 4
    assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 2 for entry in logprobs.content)


def test_completions_of_several_prompts_come_in_their_order(client: OpenAI) -> None:
    settings: Any = {"model": "recall", "max_tokens": 3, "temperature": 0}
    both = client.completions.create(prompt=["ab", "xyz"], n=2, echo=True, **settings)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert [choice.text[:2] for choice in both.choices] == ["ab", "ab", "xy", "xy"]
    assert both.choices[0].text == both.choices[1].text


def test_echoed_logprobs_are_of_prompt_and_answer(client: OpenAI) -> None:
    completion = client.completions.create(
        model="recall", prompt="hello", max_tokens=1, echo=True, logprobs=1, temperature=0
    )
    logprobs: Any = completion.choices[0].logprobs
    assert logprobs.tokens[:5] == list("hello")
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert logprobs.text_offset == [0, 1, 2, 3, 4, 5]


def test_streamed_completion_with_echo_begins_with_the_prompt(client: OpenAI) -> None:
    stream = client.completions.create(
        model="recall", prompt="hello", max_tokens=2, echo=True, stream=True
    )
    texts = [chunk.choices[0].text for chunk in stream]
    assert texts[0] == "hello"
    assert len("".join(texts)) > len("hello")


def test_response_that_follows_another_reads_it_from_the_cache(client: OpenAI) -> None:
    first = client.responses.create(model="recall", input="remember me " * 30, max_output_tokens=8)
    second = client.responses.create(
        model="recall", input="well?", previous_response_id=first.id, max_output_tokens=4
    )
    assert first.usage is not None
    assert second.usage is not None
    cached = second.usage.input_tokens_details.cached_tokens
    assert cached >= first.usage.total_tokens - 1
    assert client.responses.retrieve(second.id).output == second.output
    items = client.responses.input_items.list(second.id).data
    assert len(items) == 1


def test_streamed_response_ends_with_what_it_said(client: OpenAI) -> None:
    with client.responses.stream(
        model="recall", input="hello", max_output_tokens=6, temperature=0
    ) as stream:
        events = list(stream)
    numbers = [event.sequence_number for event in events if hasattr(event, "sequence_number")]
    assert numbers == sorted(set(numbers))
    said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == said


def test_response_in_the_background_is_there_later(client: OpenAI) -> None:
    started = client.responses.create(
        model="recall", input="hello", max_output_tokens=4, background=True
    )
    assert started.status == "queued"
    while (found := client.responses.retrieve(started.id)).status in ("queued", "in_progress"):
        pass
    assert found.status == "incomplete"
    assert len(found.output) == 1


def test_response_that_is_cancelled_says_so(client: OpenAI) -> None:
    started = client.responses.create(
        model="recall", input="hello", max_output_tokens=50_000, background=True
    )
    assert client.responses.cancel(started.id).status == "cancelled"
    assert client.responses.retrieve(started.id).status == "cancelled"


def test_conversation_grows_with_its_responses(client: OpenAI) -> None:
    conversation = client.conversations.create(
        items=[{"role": "user", "content": "first"}], metadata={"a": "b"}
    )
    client.responses.create(
        model="recall", input="second", conversation=conversation.id, max_output_tokens=4
    )
    items = client.conversations.items.list(conversation.id, order="asc").data
    assert [item.type for item in items] == ["message"] * 3
    client.conversations.delete(conversation.id)
    with pytest.raises(openai.NotFoundError):
        client.conversations.retrieve(conversation.id)


@pytest.mark.parametrize(
    ("settings", "error", "code"),
    [
        ({"model": "other"}, openai.NotFoundError, "model_not_found"),
        ({"messages": []}, openai.BadRequestError, "invalid_request"),
        ({"messages": [{"role": "user", "content": "x" * 140_000}]}, openai.BadRequestError,
         "context_length_exceeded"),
        ({"tool_choice": "required"}, openai.BadRequestError, "invalid_request"),
        ({"temperature": -1}, openai.BadRequestError, "invalid_request"),
    ],
)  # fmt: skip
def test_request_that_is_wrong_raises_the_clients_own_error(
    client: OpenAI, settings: dict[str, Any], error: type[openai.APIStatusError], code: str
) -> None:
    with pytest.raises(error) as caught:
        client.chat.completions.create(**{"model": "recall", "messages": MESSAGES, **settings})
    assert caught.value.code == code


def test_key_that_is_unknown_is_an_authentication_error(daemon: RunningDaemon) -> None:
    stranger = OpenAI(base_url=f"{daemon.url}/v1", api_key="sk-other", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_models_are_listed_with_their_context(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "recall"
    assert model.model_dump()["max_model_len"] == 131072
    assert client.models.retrieve("recall").id == "recall"
