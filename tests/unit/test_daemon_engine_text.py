"""Tokens of an answer: how they are chosen, turned into text, and compared."""

import math

import numpy as np
import pytest
import torch

from offload.daemon.requests import Sampling
from offload.daemon.work.sampling import Sampler
from offload.daemon.work.text_stream import TextStream
from offload.daemon.work.token_log import TokenLog, num_common
from tests.support.daemon import recall

PLAIN = Sampling(temperature=0.0)


def text_of(written: str, *stops: str) -> tuple[list[str], str | None]:
    tokenizer = recall().tokenizer
    stream, parts = TextStream(tokenizer, stops), []
    for token in tokenizer.encode(written):
        parts.append(stream.add(token))
        if stream.stop_text is not None:
            return parts, stream.stop_text
    return [*parts, stream.finish()], None


def choose(sampling: Sampling, logits: list[float], *before: int) -> int:
    sampler = Sampler(sampling, [0], frozenset([1]), None)
    for token in before:
        sampler.note(token)
    return sampler.choose(torch.tensor(logits))[0]


@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 1e30])
def test_any_temperature_gives_a_token(temperature: float) -> None:
    sampling = Sampling(temperature=temperature, repetition_penalty=1e-38, seed=1)

    assert choose(sampling, [-40.0, 3.0, 40.0, -1e30], 2) in range(4)


@pytest.mark.parametrize("written", ["héllo", "漢字 and 😀!", "a\tb\n"])
def test_text_comes_in_whole_characters(written: str) -> None:
    parts, _ = text_of(written)

    assert "".join(parts) == written
    assert [part for part in parts if part] == list(written)


def test_bytes_that_are_no_character_do_not_hold_up_what_follows() -> None:
    stream = TextStream(recall().tokenizer, ())

    parts = [stream.add(token) for token in [0xFF, 0xFE, 0xFD, 0xFC, ord("a")]]

    assert "".join(parts).endswith("a")


@pytest.mark.parametrize(
    ("written", "stops", "text", "stopped"),
    [
        ("one STOP two", ("STOP",), "one ", "STOP"),
        ("one ST two", ("STOP",), "one ST two", None),
        ("one ST", ("STOP",), "one ST", None),
        ("a<xy>b", ("<xy>", "<x"), "a", "<x"),
        ("abab!", ("abb", "ba!"), "abab!", None),
        ("x\n\ny", ("\n\n",), "x", "\n\n"),
    ],
)
def test_stop_text_ends_the_answer_and_is_no_part_of_it(
    written: str, stops: tuple[str, ...], text: str, stopped: str | None
) -> None:
    parts, found = text_of(written, *stops)

    assert ("".join(parts), found) == (text, stopped)


def test_text_that_may_become_a_stop_is_held_back() -> None:
    parts, _ = text_of("a STO b", "STOP")

    assert parts[2:5] == ["", "", ""]
    assert parts[5] == "STO "


def test_stop_text_is_text_while_no_stop_is_allowed() -> None:
    stream = TextStream(recall().tokenizer, ["ab"])

    text = stream.add(ord("a"), may_stop=False) + stream.add(ord("b"), may_stop=False)

    assert text + stream.finish() == "ab"
    assert stream.stop_text is None


@pytest.mark.parametrize(
    ("sampling", "before", "token"),
    [
        (PLAIN, (), 2),
        (Sampling(temperature=0.0, logit_bias={3: 5.0}), (), 3),
        (Sampling(temperature=0.0, presence_penalty=2.0), (2,), 0),
        (Sampling(temperature=0.0, frequency_penalty=0.3), (2,), 2),
        (Sampling(temperature=0.0, frequency_penalty=0.3), (2, 2, 2, 2), 0),
        (Sampling(temperature=0.0, repetition_penalty=4.0), (2,), 1),
        (Sampling(temperature=1.0, top_k=1), (), 2),
        (Sampling(temperature=1.0, top_p=1e-6), (), 2),
        (Sampling(temperature=1.0, min_p=1.0), (), 2),
        (Sampling(temperature=1e-4), (), 2),
    ],
)
def test_token_is_chosen_as_asked(sampling: Sampling, before: tuple[int, ...], token: int) -> None:
    assert choose(sampling, [1.5, 1.0, 2.0, -1.0], *before) == token


def test_stop_token_is_not_chosen_before_the_fewest_tokens() -> None:
    sampling = Sampling(temperature=0.0, min_tokens=1)

    assert choose(sampling, [1.0, 9.0, 2.0]) == 2
    assert choose(sampling, [1.0, 9.0, 2.0], 0) == 1


def test_log_probabilities_are_the_models_own() -> None:
    sampling = Sampling(temperature=0.0, top_logprobs=2, logit_bias={3: 50.0})
    sampler = Sampler(sampling, [], frozenset(), None)

    token, logprob, tops = sampler.choose(torch.tensor([0.0, math.log(2), math.log(4), 0.0]))

    assert token == 3
    assert logprob == pytest.approx(math.log(1 / 8))
    assert [top.token_id for top in tops] == [2, 1]
    assert tops[0].logprob == pytest.approx(math.log(1 / 2))


def test_same_seed_draws_the_same_tokens() -> None:
    logits = torch.zeros(100)
    first, second = (Sampler(Sampling(seed=5), [], frozenset(), None) for _ in range(2))

    drawn = [first.choose(logits)[0] for _ in range(20)]

    assert drawn == [second.choose(logits)[0] for _ in range(20)]
    assert len(set(drawn)) > 5


def test_frequencies_are_those_of_the_probabilities() -> None:
    sampler = Sampler(Sampling(seed=1), [], frozenset(), None)
    logits = torch.tensor([0.7, 0.2, 0.1]).log()

    drawn = [sampler.choose(logits)[0] for _ in range(2000)]

    assert drawn.count(0) / 2000 == pytest.approx(0.7, abs=0.04)


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 191, 192, 193, 1000])
def test_common_length_is_found_wherever_arrays_part(length: int) -> None:
    first = np.arange(1000, dtype=np.int32)
    second = np.concatenate([first[:length], first[length:] + 1])

    assert num_common(first, second) == length
    assert num_common(first, first[:length]) == length


def test_log_grows_and_is_cut() -> None:
    log = TokenLog([1, 2])
    for i in range(100):
        log.extend([i])
    log.truncate(3)
    log.extend([7])

    assert log.view.tolist() == [1, 2, 0, 7]
