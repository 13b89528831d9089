"""How many questions each policy answers, beside the same with exact attention."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from offload.errors import ConfigError
from offload.evals.cases import Case
from offload.evals.contenders import Contender
from offload.evals.exam import Exam, Examiner, Reply

MakeCase = Callable[[int, int, random.Random], Case]
"""From tokens, questions at most and a generator to a case."""


@dataclass(frozen=True, slots=True)
class TaskRow:
    """One policy on one task at one length.

    Attributes
    ----------
    task, policy : str
    num_tokens : int
        Of a document, as asked for.
    num_documents, num_answers : int
        Answers that were scored.
    accuracy, exact_accuracy : float
        Mean score, and that of exact attention on the same questions.
    points : float
        By how many points of a hundred the accuracy differs from that.
    agreement : float
        Share of all answers whose tokens are those of exact attention.
    divergence : float
        Of the distribution of the first token of an answer from that of exact attention
        (Kullback-Leibler, nats), over those that had the same history.
    share_read : float
        What the tokens of questions and answers read of all that they could see, per layer and KV
        head, sinks and window included.
    tokens_read : float
        The same, in tokens.
    error_median, error_p95 : float
        Of attention outputs, relative, in ``num_checks`` checks of the runtime; means over
        documents.
    num_checks : int
    prefill_s, answer_s : float
        Per document; building an index counts toward answers, where it was not built before.
    """

    task: str
    policy: str
    num_tokens: int
    num_documents: int
    num_answers: int
    accuracy: float
    exact_accuracy: float
    points: float
    agreement: float
    divergence: float
    share_read: float
    tokens_read: float
    error_median: float
    error_p95: float
    num_checks: int
    prefill_s: float
    answer_s: float


def make_cases(
    make: MakeCase, num_tokens: int, num_samples: int, max_documents: int, seed: int
) -> list[Case]:
    """Make documents until there are enough answers to score, or enough documents.

    Raises
    ------
    ConfigError
        There is nothing to ask about a document of so few tokens.
    """
    cases: list[Case] = []
    num_left = num_samples
    while num_left > 0 and len(cases) < max_documents:
        # Seeded by text, because a tuple would need a hash, and that may differ between versions.
        case = make(num_tokens, num_left, random.Random(f"{seed} {num_tokens} {len(cases)}"))
        num_scored = sum(bool(turn.expected) for turns in case.conversations for turn in turns)
        if num_scored == 0:
            raise ConfigError(f"{case.task}: {num_tokens} tokens are too few to ask about")
        cases.append(case)
        num_left -= num_scored
    return cases


def compare(
    examiner: Examiner,
    cases: Sequence[Case],
    num_tokens: int,
    exact: Contender,
    contenders: Sequence[Contender],
    advance: Callable[[], None],
) -> Iterator[TaskRow]:
    """Ask the same questions with exact attention, and then with every policy.

    Parameters
    ----------
    examiner : Examiner
    cases : sequence of Case
        Of one task.
    num_tokens : int
        As asked for.
    exact : Contender
    contenders : sequence of Contender
    advance : callable
        Called after every document that was read and asked about.

    Yields
    ------
    TaskRow
        The first is that of exact attention.
    """
    truth: list[Exam] = []
    for contender in (exact, *contenders):
        exams = []
        for case in cases:
            exams.append(examiner.ask(case, contender))
            advance()
        truth = truth or exams
        yield _row(cases[0].task, contender.name, num_tokens, exams, truth)


def _row(
    task: str, policy: str, num_tokens: int, exams: Sequence[Exam], truth: Sequence[Exam]
) -> TaskRow:
    replies, expected = _replies(exams), _replies(truth)
    pairs = list(zip(replies, expected, strict=True))
    scores = [reply.score for reply in replies if reply.score is not None]
    exact_accuracy = fmean(reply.score for reply in expected if reply.score is not None)
    visible = sum(exam.reads.visible_tokens for exam in exams)
    read = sum(exam.reads.read_tokens for exam in exams)
    positions = sum(exam.reads.num_positions for exam in exams)
    return TaskRow(
        task=task,
        policy=policy,
        num_tokens=num_tokens,
        num_documents=len(exams),
        num_answers=len(scores),
        accuracy=fmean(scores),
        exact_accuracy=exact_accuracy,
        points=100 * (fmean(scores) - exact_accuracy),
        agreement=fmean(ours.token_ids == theirs.token_ids for ours, theirs in pairs),
        divergence=fmean(
            _divergence(*pair) for pair in pairs if pair[0].history == pair[1].history
        ),
        share_read=read / visible if visible else 1.0,
        tokens_read=read / positions if positions else 0.0,
        error_median=fmean(exam.error_median for exam in exams),
        error_p95=fmean(exam.error_p95 for exam in exams),
        num_checks=sum(exam.num_checks for exam in exams),
        prefill_s=fmean(exam.prefill_s for exam in exams),
        answer_s=fmean(exam.answer_s for exam in exams),
    )


def _replies(exams: Sequence[Exam]) -> list[Reply]:
    return [reply for exam in exams for talk in exam.replies for reply in talk]


def _divergence(ours: Reply, exact: Reply) -> float:
    terms = exact.first.exp() * (exact.first - ours.first)
    return max(0.0, float(terms.nansum()))
