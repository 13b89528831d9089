"""Running the model: a piece of one prompt, or one token of every answer."""

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from offload.daemon.requests import PrefillProgress, PromptLogprobs, TokenLogprob
from offload.daemon.served_model import ServedModel
from offload.daemon.work.job import Job
from offload.daemon.work.sampling import likeliest
from offload.daemon.work.session_book import Branch
from offload.daemon.work.step_attention import StepAttention
from offload.daemon.work.step_cache import RowFailed, StepCache, can_share, cut_back
from offload.daemon.work.tally import Tally
from offload.daemon.work.token_log import TokenIds

_MOST_LOGITS = 1 << 24
"""Of a piece whose tokens' log-probabilities are wanted: 64 MiB."""

_FEWEST_TOKENS = 16


class Compute:
    """Runs the model for jobs, and hands out what comes of it. Used by the engine's thread.

    Parameters
    ----------
    model : ServedModel
    prefill_tokens : int
        Longest piece of a prompt.
    max_piece_s : float
        About how long a piece may take while others wait for their next token.
    tally : Tally
    """

    def __init__(
        self, model: ServedModel, prefill_tokens: int, max_piece_s: float, tally: Tally
    ) -> None:
        self._model = model
        self._prefill_tokens = prefill_tokens
        self._max_piece_s = max_piece_s
        self._tally = tally
        self._together = StepAttention()
        self._s_per_token = 0.0

    @torch.no_grad()
    def prefill(self, job: Job, *, is_alone: bool) -> None:
        """Compute the next piece of what a job misses; choose a token if that was the last.

        Parameters
        ----------
        job : Job
        is_alone : bool
            Nobody waits for a next token meanwhile.

        Raises
        ------
        OffloadError
            The branch is as it was.
        """
        branch = job.branch
        assert branch is not None
        wants_all = job.request.sampling.prompt_logprobs and not job.answer.num_tokens
        size = self._piece_tokens(job, is_alone=is_alone, wants_all=wants_all)
        done = len(branch.tokens)
        piece = job.ids.view[done : done + size]
        began = time.monotonic()
        logits = self._run(branch, piece, 0 if wants_all else 1)
        took = time.monotonic() - began
        branch.tokens.extend(piece)
        self._note_rate(len(piece), took)
        announce(job)
        if wants_all:
            self._add_prompt_logprobs(job, done, logits)
        if done < job.num_prompt_tokens:
            _tell_progress(job)
        if job.num_missing == 0:
            self._choose([job], logits[:, -1])

    @torch.no_grad()
    def decode(self, jobs: Sequence[Job]) -> None:
        """Compute the one token that every job misses, and choose the next ones.

        Raises
        ------
        RowFailed
            For one of them; ``__cause__`` says why. All branches are as they were.
        """
        began = time.monotonic()
        branches = [job.branch for job in jobs if job.branch is not None]
        tokens = [job.ids.view[-1:] for job in jobs]
        if can_share(branches[0].cache):
            logits = self._run_together(branches, tokens)
        else:
            logits = self._run_apart(branches, tokens)
        for job, branch, token in zip(jobs, branches, tokens, strict=True):
            branch.tokens.extend(token)
            announce(job)
            if job.first_token_s is None:
                _tell_progress(job)
        self._choose(jobs, logits)
        self._tally.decode_s += time.monotonic() - began

    def _piece_tokens(self, job: Job, *, is_alone: bool, wants_all: bool) -> int:
        size = self._prefill_tokens
        if not is_alone and self._s_per_token:
            size = min(size, int(self._max_piece_s / self._s_per_token))
        if wants_all:
            size = min(size, _MOST_LOGITS // self._model.vocab_size)
        return min(max(size, _FEWEST_TOKENS), job.num_missing)

    def _note_rate(self, num_tokens: int, took_s: float) -> None:
        """Keep the time per token of recent pieces; it grows with what they attend to."""
        now = took_s / num_tokens
        self._s_per_token = now if not self._s_per_token else (self._s_per_token + now) / 2
        self._tally.prefill_s += took_s
        self._tally.computed_tokens += num_tokens

    def _run(self, branch: Branch, ids: TokenIds, logits_to_keep: int) -> Tensor:
        """Return logits ``[1, num_kept, vocab_size]``; 0 keeps all."""
        model = self._model.model
        tokens = torch.as_tensor(ids, dtype=torch.int64, device=model.device)[None]
        try:
            logits: Tensor = model(
                input_ids=tokens,
                past_key_values=branch.cache,
                use_cache=True,
                logits_to_keep=logits_to_keep,
            ).logits
        except BaseException:
            if branch.cache._core.can_undo:
                cut_back(branch.cache, len(branch.tokens))
            raise
        return logits

    def _run_together(self, branches: Sequence[Branch], tokens: Sequence[TokenIds]) -> Tensor:
        model = self._model.model
        step = StepCache([branch.cache for branch in branches], self._together)
        try:
            logits: Tensor = model(
                input_ids=torch.tensor(np.stack(tokens), device=model.device, dtype=torch.int64),
                position_ids=step.position_ids.to(model.device),
                past_key_values=step,
                use_cache=True,
            ).logits
        except BaseException:
            step.undo()
            raise
        return logits[:, -1]

    def _run_apart(self, branches: Sequence[Branch], tokens: Sequence[TokenIds]) -> Tensor:
        """Run one row after the other: layers of bounded size have no common length."""
        [branch], [token] = branches, tokens
        try:
            return self._run(branch, token, 1)[:, -1]
        except Exception as error:
            raise RowFailed(0) from error

    def _choose(self, jobs: Sequence[Job], logits: Tensor) -> None:
        """Choose the next token of every job, from logits ``[num_jobs, vocab_size]``."""
        plain = logits.argmax(-1).tolist()
        for i, job in enumerate(jobs):
            if job.first_token_s is None:
                job.first_token_s = time.monotonic()
            if job.answer.reason is not None:
                continue  # nothing but the prompt was asked for
            if job.answer.is_plain:
                token = job.answer.add_plain(plain[i])
            else:
                token = job.answer.add(logits[i].float().cpu())
            job.ids.extend([token.token_id])
            self._tally.generated_tokens += 1
            job.mailbox.put(token)

    def _add_prompt_logprobs(self, job: Job, done: int, logits: Tensor) -> None:
        """Note how likely every token of the prompt was after those before it."""
        own = logits[0].float().cpu().log_softmax(-1)
        ids, num_tops = job.ids.view, job.request.sampling.top_logprobs or 0
        for row, after in zip(own, range(done + 1, done + 1 + len(own)), strict=True):
            if after < job.num_prompt_tokens:
                token = int(ids[after])
                found = TokenLogprob(token, float(row[token]))
                job.prompt_logprobs.append((found, likeliest(row, num_tops)))
        if done + len(own) >= job.num_prompt_tokens:
            tokens = tuple(token for token, _ in job.prompt_logprobs)
            tops = tuple(each for _, each in job.prompt_logprobs)
            job.mailbox.put(PromptLogprobs(tokens, tops))


def _tell_progress(job: Job) -> None:
    assert job.branch is not None
    assert job.started_s is not None
    num_done = min(len(job.branch.tokens), job.num_prompt_tokens)
    spent = time.monotonic() - job.started_s
    job.mailbox.put(PrefillProgress(num_done, job.num_prompt_tokens, spent))


def announce(job: Job) -> None:
    """Tell the client that a job has been started, unless that was done."""
    if job.started is not None:
        job.mailbox.put(job.started)
        job.started = None
