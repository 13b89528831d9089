"""Answer questions about a stream from the few frames that matter."""

import time
from collections.abc import Sequence
from contextlib import closing
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from offload.video import layers
from offload.video.adapter import Unit
from offload.video.question_pass import QuestionPass
from offload.video.retrieval import RetrievalPlan
from offload.video.stream import VideoStream
from offload.video.types import Answer, Evidence, Question

_MOST_EVIDENCE = 8


class Answerer:
    """Asks a model about what was encoded of a stream. One thread at a time.

    A question goes through the model once, and each layer reads the frames that it chooses itself.
    ReKV (arXiv 2503.00540, section 3.2) runs it twice: first to choose, then, with its template, to
    answer; ``is_twice`` does that. Nothing of the stream changes.

    Parameters
    ----------
    stream : VideoStream
    plan : RetrievalPlan
    max_tokens : int
        Of an answer.
    is_twice : bool
    """

    def __init__(
        self,
        stream: VideoStream,
        plan: RetrievalPlan | None = None,
        *,
        max_tokens: int = 32,
        is_twice: bool = False,
    ) -> None:
        self._stream = stream
        self._adapter = stream.adapter
        self.plan = RetrievalPlan() if plan is None else plan
        self._max_tokens = max_tokens
        self._is_twice = is_twice

    def ask(self, question: Question) -> Answer:
        """Answer a question from frames before its time.

        Raises
        ------
        CorruptChunk, StorageError, TransferTimeout
            Frames cannot be read.
        """
        started = time.perf_counter()
        store = self._stream.store
        bytes_before, seconds_before = store.bytes_from.copy(), store.seconds_from.copy()
        num_units = self._stream.units.before(question.time_s) - 1
        with closing(self._open(question, num_units)) as asked:
            logits = self._read_question(asked, question)
            first_token_s = time.perf_counter() - started
            text = self._generate(asked, logits)
        total_s = time.perf_counter() - started
        seconds = {
            "select": asked.select_s,
            "load": asked.load_s,
            "model": first_token_s - asked.select_s - asked.load_s,
            "first_token": first_token_s,
            "total": total_s,
            **{
                f"load_{tier}": spent - seconds_before.get(tier, 0.0)
                for tier, spent in store.seconds_from.items()
                if spent > seconds_before.get(tier, 0.0)
            },
        }
        places = self._stream.units.places
        return Answer(
            question,
            text,
            self._evidence(asked),
            places[num_units].first_frame + places[num_units].num_frames,
            {part: 1e3 * spent for part, spent in seconds.items()},
            dict(store.bytes_from - bytes_before),
            self._about(asked),
        )

    def _open(self, question: Question, num_units: int) -> QuestionPass:
        plan, scores, started = self.plan, None, time.perf_counter()
        if plan.needs_scores:
            assert plan.choose is not None
            scores = torch.tensor(list(plan.choose(question.text, num_units)))
        ids, _ = self._adapter.asking(question.text)
        lead = self._lead()
        asking = slice(lead, lead + len(ids))
        asked = QuestionPass(self._stream, plan, num_units, asking, scores)
        if not plan.is_consensus or not num_units or not plan.has_own_scores:
            return asked
        with closing(asked):
            self._run(asked, self._question_units(question))
        stacked = torch.stack([each / each.abs().max() for each in asked.scores.values()])
        agreed = QuestionPass(self._stream, plan, num_units, asking, stacked.mean(0))
        agreed.select_s = time.perf_counter() - started
        return agreed

    def _read_question(self, asked: QuestionPass, question: Question) -> Tensor:
        """Run a question through the model; return the logits of the first token of the answer."""
        if self._is_twice:
            self._run(asked, self._question_units(question))
            asked.forget_question()
        asked.is_answering = True
        return self._run(asked, self._question_units(question, has_template=True))

    def _generate(self, asked: QuestionPass, logits: Tensor) -> str:
        """Continue greedily until the model ends."""
        answer: list[int] = []
        while len(answer) < self._max_tokens:
            token = int(logits.argmax())
            if self._adapter.is_end(token):
                break
            answer.append(token)
            logits = self._run(asked, [self._adapter.text([token])])
        return str(self._adapter.tokenizer.decode(answer, skip_special_tokens=True)).strip()

    def _lead(self) -> int:
        closing = self._adapter.closing()
        return 0 if closing is None else closing.num_tokens

    def _question_units(self, question: Question, *, has_template: bool = False) -> list[Unit]:
        """Return what is said; with the template the choices and all up to the answer, too."""
        ids, template = self._adapter.asking(question.text)
        if has_template:
            choices = self._adapter.choosing(question.choices) if question.choices else ""
            ids = [*ids, *self._adapter.token_ids(choices), *template]
        closing_unit = self._adapter.closing()
        return [*([] if closing_unit is None else [closing_unit]), self._adapter.text(ids)]

    def _run(self, asked: QuestionPass, units: Sequence[Unit]) -> Tensor:
        start, parts = 0, []
        for unit in units:
            parts.append(unit.positions.cpu() + start)
            start += unit.advance
        asked.next(torch.cat(parts, 1), start)
        embeds = torch.cat([unit.embeds for unit in units])
        states = layers.run(self._adapter, embeds, asked)
        logits: Tensor = self._adapter.head(states[-1:])[0].float()
        return logits

    def _evidence(self, asked: QuestionPass) -> tuple[Evidence, ...]:
        """Return the units that the answer attended to most."""
        read: dict[int, int] = {}
        for context in asked.contexts.values():
            for unit in context.units:
                read[unit] = read.get(unit, 0) + 1
        ranked = sorted(read, key=lambda unit: -float(asked.masses[unit]))[:_MOST_EVIDENCE]
        places = self._stream.units.places
        return tuple(
            Evidence(
                places[1 + unit].time_s,
                places[1 + unit].first_frame,
                float(asked.masses[unit]),
                read[unit],
            )
            for unit in ranked
        )

    def _about(self, asked: QuestionPass) -> dict[str, Any]:
        plan, shares = self.plan, list(asked.coverage.values())
        return {
            "model": self._adapter.name,
            "coverage": fmean(shares) if shares else None,
            "mode": plan.mode,
            "units": plan.num_units,
            "recent": plan.num_recent,
        }
