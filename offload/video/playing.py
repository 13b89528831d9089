"""Encode a source and answer each question when its time has come."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from offload.video.answerer import Answerer
from offload.video.encoder import StreamEncoder
from offload.video.types import Answer, Frame, Question

_PIECE_FRAMES = 16


def play(
    frames: Iterable[Frame],
    encoder: StreamEncoder,
    answerer: Answerer,
    questions: Sequence[Question],
    follow_up: Callable[[Question, str], Question | None] = lambda _question, _reply: None,
    advance: Callable[[int], object] = lambda _count: None,
) -> Iterator[Answer]:
    """Yield the answers, each as soon as all frames before its time have come.

    Parameters
    ----------
    frames : iterable of Frame
    encoder : StreamEncoder
    answerer : Answerer
        On the stream that the encoder fills.
    questions : sequence of Question
        By time, those without one last.
    follow_up : callable
        Question and reply to what has to be asked next at the same time, or None.
    advance : callable
        Told how many frames were encoded.
    """
    waiting, piece = list(questions), list[Frame]()

    def encode() -> None:
        advance(encoder.add(piece))
        piece.clear()

    def ask(question: Question | None) -> Iterator[Answer]:
        while question is not None:
            answer = answerer.ask(question)
            yield answer
            question = follow_up(question, answer.text)

    for frame in frames:
        if _is_due(waiting, frame.time_s) or len(piece) == _PIECE_FRAMES:
            encode()
        while _is_due(waiting, frame.time_s):
            yield from ask(waiting.pop(0))
        piece.append(frame)
    encode()
    for question in waiting:
        yield from ask(question)


def _is_due(waiting: Sequence[Question], now_s: float) -> bool:
    """Whether everything that the next question may see has come."""
    return bool(waiting) and waiting[0].time_s is not None and waiting[0].time_s <= now_s
