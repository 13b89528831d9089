"""Encode a source and answer each question when its time has come."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from offload.video.answerer import Answerer
from offload.video.encoder import StreamEncoder
from offload.video.source import Source
from offload.video.types import Answer, Frame, Question

_PIECE_FRAMES = 16
"""Frames that go through the model together, where so many are there."""


def in_pieces(source: Source, after_s: float = -1.0) -> Iterator[list[Frame]]:
    """Yield the frames of a source: many at once where they wait, else each as it comes.

    Parameters
    ----------
    source : Source
    after_s : float
        Frames up to this time are passed over.
    """
    piece = list[Frame]()
    for frame in source:
        if frame.time_s > after_s:
            piece.append(frame)
        if piece and (len(piece) == _PIECE_FRAMES or not source.is_ahead):
            yield piece
            piece = []
    if piece:
        yield piece


def play(
    pieces: Iterable[Sequence[Frame]],
    encoder: StreamEncoder,
    answerer: Answerer,
    questions: Iterable[Question],
    *,
    follow_up: Callable[[Question, str], Question | None] = lambda _question, _reply: None,
    arriving: Callable[[], Iterable[Question]] = tuple,
    advance: Callable[[int], object] = lambda _count: None,
) -> Iterator[Answer]:
    """Yield the answers, each as soon as all frames before its time have come.

    Parameters
    ----------
    pieces : iterable of sequence of Frame
        In order of time.
    encoder : StreamEncoder
    answerer : Answerer
        On the stream that the encoder fills.
    questions : iterable of Question
        Those without a time are asked at the end.
    follow_up : callable
        Question and reply to what has to be asked next at the same time, or None.
    arriving : callable
        Returns the questions that came since, asked after each piece; without a time: about all
        frames so far.
    advance : callable
        Told how many frames were encoded.
    """
    waiting = sorted(questions, key=_time_s)

    def ask_until(time_s: float) -> Iterator[Answer]:
        while waiting and _time_s(waiting[0]) <= time_s:
            question: Question | None = waiting.pop(0)
            while question is not None:
                answer = answerer.ask(question)
                yield answer
                question = follow_up(question, answer.text)

    for piece in pieces:
        start = 0
        for place, frame in enumerate(piece):
            if waiting and _time_s(waiting[0]) <= frame.time_s:
                advance(encoder.add(piece[start:place]))
                start = place
                yield from ask_until(frame.time_s)
        advance(encoder.add(piece[start:]))
        for question in arriving():
            if question.time_s is None:
                yield answerer.ask(question)
            else:
                waiting = sorted([*waiting, question], key=_time_s)
        yield from ask_until(piece[-1].time_s)
    yield from ask_until(math.inf)


def _time_s(question: Question) -> float:
    return math.inf if question.time_s is None else question.time_s
