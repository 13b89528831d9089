"""Prompts: the very tokens of earlier answers stand where the answers stood."""

from array import array
from typing import Any

import pytest
import torch

from offload.daemon.errors import BadRequest
from offload.daemon.http.render import Recall, Renderer
from offload.daemon.http.render_builtin import render_builtin
from offload.daemon.http.render_messages import (
    Message,
    chain_digests,
    for_template,
    steady_system_text,
    text_of,
)
from offload.recall_model import load_recall_model

CHATML = """{% for m in messages %}<|{{ m.role }}|>
{{ m.content.split('</think>')[-1] }}
{%- for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
<think>
{% endif %}"""
"""Like those of reasoning models: an answer begins amid its reasoning, and loses it later."""

USER: Message = {"role": "user", "content": "hi"}
NEXT: Message = {"role": "user", "content": "and now?"}


def renderer_of(template: str | None) -> Renderer:
    _, tokenizer = load_recall_model(torch.float32)
    tokenizer.chat_template = template
    return Renderer(tokenizer, frozenset({257}))


@pytest.fixture(scope="module")
def builtin() -> Renderer:
    return renderer_of(None)


@pytest.fixture(scope="module")
def chatml() -> Renderer:
    return renderer_of(CHATML)


def remembered(renderer: Renderer, before: list[Message], answer: Message, said: str) -> Recall:
    """Remember what was said by a model whose answer looks like this."""
    prompt = renderer.chat(before)
    tokens = array("I", renderer.encode(said)).tobytes()
    digest = chain_digests([*before, answer])[-1]
    return {digest: (prompt.opening, tokens)}.get


def texts_of(renderer: Renderer, *conversation: Message, recall: Recall | None = None) -> str:
    return renderer.decode(renderer.chat(conversation, recall=recall).token_ids)


def test_builtin_template_of_more_turns_only_adds_to_fewer() -> None:
    answer = {"role": "assistant", "content": "hello"}
    shorter, longer = render_builtin([USER]), render_builtin([USER, answer, NEXT])
    assert longer.startswith(shorter + "hello")


def test_builtin_template_tells_of_the_tools() -> None:
    function = {"name": "weather", "parameters": {}}
    text = render_builtin([USER], [{"type": "function", "function": function}])
    assert text.startswith("System:\n")
    assert "weather" in text


@pytest.mark.parametrize("said", ["why</think>\n\nhello", "x</think>\n\nhello  "])
def test_answer_with_reasoning_is_found_in_a_history_without_it(
    chatml: Renderer, said: str
) -> None:
    answer = {"role": "assistant", "content": "hello"}
    recall = remembered(chatml, [USER], answer, said)
    first = chatml.decode(chatml.chat([USER]).token_ids)
    assert texts_of(chatml, USER, answer, NEXT, recall=recall).startswith(first + said)
    assert not texts_of(chatml, USER, answer, NEXT).startswith(first + said)


@pytest.mark.parametrize("arguments", ['{"a":1,"b":2}', '{"b": 2, "a": 1}', {"a": 1, "b": 2}])
def test_tool_call_in_another_spelling_is_found_as_it_was_said(
    chatml: Renderer, arguments: Any
) -> None:
    said = 'so</think><tool_call>{ "name":"f", "arguments":{"b":2,  "a":1} }</tool_call>'
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"b":2,"a":1}'}}
    recall = remembered(
        chatml, [USER], {"role": "assistant", "content": "", "tool_calls": [call]}, said
    )
    sent = {"id": "2", "type": "function", "function": {"name": "f", "arguments": arguments}}
    history = {"role": "assistant", "content": None, "tool_calls": [sent]}
    result = {"role": "tool", "content": "ok", "tool_call_id": "2"}
    text = texts_of(chatml, USER, {**history, "content": ""}, result, recall=recall)
    assert said in text
    assert chain_digests([USER, history]) == chain_digests([USER, {**history, "content": ""}])


def test_answer_to_another_question_is_not_taken(chatml: Renderer) -> None:
    answer = {"role": "assistant", "content": "hello"}
    recall = remembered(chatml, [USER], answer, "why</think>hello")
    assert "why" not in texts_of(chatml, NEXT, answer, NEXT, recall=recall)


def test_text_that_looks_like_a_mark_is_left_alone(chatml: Renderer) -> None:
    answer = {"role": "assistant", "content": "hello"}
    question = {"role": "user", "content": "[0123456789abcdef:1]"}
    recall = remembered(chatml, [question], answer, "hm</think>hello")
    text = texts_of(chatml, question, answer, NEXT, recall=recall)
    assert "[0123456789abcdef:1]" in text
    assert "hm</think>hello" in text


def test_template_without_an_answers_place_is_written_plainly() -> None:
    renderer = renderer_of("{% for m in messages %}{{ m.role }};{% endfor %}")
    answer = {"role": "assistant", "content": "hello"}
    recall = remembered(renderer, [USER], answer, "hello")
    assert texts_of(renderer, USER, answer, recall=recall) == "user;assistant;"


def test_answer_tokens_without_what_ended_the_answer_are_its_text(builtin: Renderer) -> None:
    ids = builtin.encode("hello\n\nUser:")
    assert builtin.answer_tokens([*ids, 257], "hello") == array("I", ids[:5]).tobytes()


@pytest.mark.parametrize(("ids", "text"), [([], ""), ([257], ""), ([104, 105], "ho")])
def test_answer_tokens_that_are_not_the_text_are_none(
    builtin: Renderer, ids: list[int], text: str
) -> None:
    assert builtin.answer_tokens(ids, text) is None


def test_last_message_that_is_continued_stays_open(builtin: Renderer) -> None:
    begun = [USER, {"role": "assistant", "content": "I sa"}]
    prompt = builtin.chat(begun, is_continued=True)
    assert builtin.decode(prompt.token_ids).endswith("Assistant:\nI sa")


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "messages", "return_dict"])
def test_template_argument_that_is_ours_is_refused(chatml: Renderer, name: str) -> None:
    with pytest.raises(BadRequest, match=name):
        chatml.chat([USER], template_kwargs={name: "x"})


def test_template_that_refuses_is_a_bad_request() -> None:
    renderer = renderer_of("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(BadRequest, match="roles must alternate"):
        renderer.chat([USER])


def test_reasoning_is_noticed_where_the_template_begins_it(chatml: Renderer) -> None:
    assert chatml.chat([USER]).is_reasoning
    assert chatml.has_reasoning


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, ""),
        ("a", "a"),
        (["a", "b"], "ab"),
        ([{"type": "input_text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
        ([{"type": "refusal", "refusal": "no"}], "no"),
    ],
)
def test_text_of_content_is_all_its_text(content: object, expected: str) -> None:
    assert text_of(content) == expected


@pytest.mark.parametrize("content", [7, [{"type": "image_url"}], [{"type": "text"}], [None], {}])
def test_text_of_something_else_is_refused(content: object) -> None:
    with pytest.raises(BadRequest):
        text_of(content)


def test_billing_header_of_two_requests_becomes_the_same() -> None:
    first, second = (
        f"x-anthropic-billing-header: v=1; cch={digits};" for digits in ("0a1b2", "fffee")
    )
    assert steady_system_text(first) == steady_system_text(second)
    assert steady_system_text("cch=0a1b2") == "cch=0a1b2"


def test_arguments_for_a_template_are_objects_where_they_can_be() -> None:
    def arguments(text: str) -> object:
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": text}}
        message = {"role": "assistant", "content": "", "tool_calls": [call]}
        found: object = for_template(message)["tool_calls"][0]["function"]["arguments"]
        return found

    assert arguments('{"x": 1}') == {"x": 1}
    assert arguments("{broken") == "{broken"
