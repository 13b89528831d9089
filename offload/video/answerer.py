"""Answer questions about a stream from the few frames that matter."""

import time
from collections.abc import Sequence
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
        before = self._stream.store.bytes_from.copy()
        num_units = self._stream.units.before(question.time_s) - 1
        asked = self._open(question, num_units)
        logits = self._read_question(asked, question)
        first_token_s = time.perf_counter() - started
        text = self._generate(asked, logits)
        read = self._stream.store.bytes_from
        places = self._stream.units.places
        return Answer(
            question,
            text,
            self._evidence(asked),
            places[num_units].first_frame + places[num_units].num_frames,
            {
                "first_token": 1e3 * first_token_s,
                "total": 1e3 * (time.perf_counter() - started),
            },
            {tier: count - before[tier] for tier, count in read.items() if count > before[tier]},
            self._about(),
        )

    def _open(self, question: Question, num_units: int) -> QuestionPass:
        plan, scores = self.plan, None
        if plan.needs_scores:
            assert plan.choose is not None
            scores = torch.tensor(list(plan.choose(question.text, num_units)))
        ids, _ = self._adapter.asking(question.text)
        lead = self._lead()
        asking = slice(lead, lead + len(ids))
        asked = QuestionPass(self._stream, plan, num_units, asking, scores)
        if not plan.is_consensus or not num_units or plan.mode not in ("rekv", "tokmax"):
            return asked
        self._run(asked, self._question_units(question.text, has_template=False))
        stacked = torch.stack([each / each.abs().max() for each in asked.scores.values()])
        return QuestionPass(self._stream, plan, num_units, asking, stacked.mean(0))

    def _read_question(self, asked: QuestionPass, question: Question) -> Tensor:
        """Run a question through the model; return the logits of the first token of the answer."""
        if self._is_twice:
            self._run(asked, self._question_units(question.text, has_template=False))
            asked.forget_question()
        asked.is_answering = True
        return self._run(asked, self._question_units(question.text, has_template=True))

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

    def _question_units(self, text: str, *, has_template: bool) -> list[Unit]:
        question, template = self._adapter.asking(text)
        closing = self._adapter.closing()
        units = [] if closing is None else [closing]
        return [*units, self._adapter.text([*question, *(template if has_template else [])])]

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

    def _about(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "model": self._adapter.name,
            "mode": plan.mode,
            "units": plan.num_units,
            "recent": plan.num_recent,
        }
