"""Answers are taken apart while they come."""

import json

import jsonschema  # type: ignore[import-untyped]
import pytest

from offload.daemon.http.tool_calls import (
    AnswerParser,
    Form,
    Parts,
    call_grammar,
    parse_answer,
    parse_call,
)

ALL = Form(has_tools=True, has_reasoning=True)
CALL = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
ANSWER = f"<think>because</think>\n\nSo: {CALL} and {CALL}."


def fed(text: str, form: Form, size: int) -> Parts:
    """Feed a text in pieces of a size."""
    parser, parts = AnswerParser(form), Parts()
    for start in range(0, len(text), size):
        for piece in parser.feed(text[start : start + size]):
            parts.add(piece)
    for piece in parser.finish():
        parts.add(piece)
    return parts


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_answer_in_pieces_of_any_size_is_taken_apart_alike(size: int) -> None:
    parts = fed(ANSWER, ALL, size)
    assert parts.reasoning == "because"
    assert parts.text.lstrip("\n") == "So:  and ."
    assert [(call.name, json.loads(call.arguments)) for call in parts.calls] == [
        ("f", {"x": 1})
    ] * 2


def test_answer_without_marks_comes_at_once() -> None:
    assert [piece.text for piece in AnswerParser(ALL).feed("hello")] == ["hello"]


def test_answer_that_may_become_a_mark_is_held_back_until_it_does_not() -> None:
    parser = AnswerParser(ALL)
    assert parser.feed("a <tool")[0].text == "a "
    assert parser.feed("box>")[0].text == "<toolbox>"


def test_answer_is_not_taken_apart_where_no_tools_were_given() -> None:
    assert parse_answer(CALL, Form()).text == CALL


@pytest.mark.parametrize(
    "inside", ["not json", "[]", '{"arguments": {}}', '{"name": 7}', "{" * 5000]
)
def test_call_that_is_none_stays_text(inside: str) -> None:
    text = f"<tool_call>{inside}</tool_call>"
    assert parse_answer(text, ALL).text == text


def test_call_that_is_cut_short_stays_text() -> None:
    text = '<tool_call>{"name": "f"'
    assert parse_answer(text, ALL).text == text


def test_call_with_half_a_surrogate_pair_is_none() -> None:
    assert parse_call('{"name": "f", "arguments": {"x": "\\ud800"}}') is None


def test_answer_that_begins_amid_its_reasoning_is_reasoning_first() -> None:
    parts = parse_answer("hm</think>yes", Form(has_reasoning=True, is_reasoning=True))
    assert (parts.reasoning, parts.text) == ("hm", "yes")


def test_answer_that_has_to_be_a_call_is_one() -> None:
    form = Form(has_tools=True, is_forced_call=True)
    parts = fed('{"name":"f","arguments":{"x":1}}', form, 3)
    assert [call.name for call in parts.calls] == ["f"]
    assert parts.text == ""


def test_answer_that_has_to_be_a_call_and_is_cut_short_is_text() -> None:
    assert parse_answer('{"name":"f"', Form(has_tools=True, is_forced_call=True)).text


def tool(name: str) -> dict[str, object]:
    parameters = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


GOOD_CALL = {"name": "b", "arguments": {"x": 1}}


@pytest.mark.parametrize(
    ("name", "call", "fits"),
    [
        (None, GOOD_CALL, True),
        ("b", GOOD_CALL, True),
        ("a", GOOD_CALL, False),
        (None, {"name": "c", "arguments": {"x": 1}}, False),
        (None, {"name": "b", "arguments": {}}, False),
        (None, {"name": "b"}, False),
    ],
)
def test_grammar_of_calls_takes_calls_of_the_tools_and_no_others(
    name: str | None, call: dict[str, object], fits: bool
) -> None:
    schema = json.loads(call_grammar([tool("a"), tool("b")], name))
    assert jsonschema.Draft202012Validator(schema).is_valid(call) is fits
