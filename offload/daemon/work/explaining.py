"""Where and why a prompt leaves what a session has, for people to read."""

from transformers import PreTrainedTokenizerBase

from offload.daemon.requests import MissReason
from offload.daemon.state import Explanation
from offload.daemon.work.token_log import TokenIds

_AROUND_CHARS = 40
_AROUND_TOKENS = 80
"""Enough for so many characters, unless tokens are smaller than bytes."""


def explain(
    tokenizer: PreTrainedTokenizerBase,
    prompt: TokenIds,
    own: TokenIds,
    num_common: int,
    gone: MissReason,
) -> Explanation:
    """Compare a prompt with what a session has.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    prompt, own : int32 [num_tokens]
    num_common : int
        First tokens that are equal.
    gone : str
        Why the session is empty, if it is.
    """
    before, theirs = _around(tokenizer, own, num_common)
    _, asked = _around(tokenizer, prompt, num_common)
    reason, miss = _reason(len(prompt), len(own), num_common, gone)
    return Explanation(
        num_common_tokens=num_common,
        num_session_tokens=len(own),
        num_prompt_tokens=len(prompt),
        session_text=before + theirs,
        prompt_text=before + asked,
        split_at=len(before),
        reason=reason,
        miss=miss,
    )


def _around(tokenizer: PreTrainedTokenizerBase, ids: TokenIds, place: int) -> tuple[str, str]:
    before = str(tokenizer.decode(ids[max(0, place - _AROUND_TOKENS) : place].tolist()))
    after = str(tokenizer.decode(ids[place : place + _AROUND_TOKENS].tolist()))
    return before[-_AROUND_CHARS:], after[:_AROUND_CHARS]


def _reason(
    num_prompt: int, num_own: int, num_common: int, gone: MissReason
) -> tuple[str, MissReason | None]:
    if not num_own:
        return "the session has no tokens", gone
    if num_common == num_prompt:
        return f"all {num_prompt} tokens of the prompt are known", None
    if num_common == num_own:
        return f"the prompt goes on where the session ends, after {num_own} tokens", None
    return f"token {num_common} differs from what the session has there", "diverged"
