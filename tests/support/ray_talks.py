"""Sessions with secrets of their own, told and asked for in turns, over HTTP."""

import random
import secrets
import threading
from dataclasses import dataclass, field
from typing import Any

import httpx

KEYS = ("qmzk", "vbtr", "hwex", "jdpn")
"""The same in every talk: who answers from another's keys and values answers wrong."""

PAGE = "The ferry leaves at noon, and nobody has seen the keeper since. "
MAX_TOKENS = 7
MAX_TRIES = 8


@dataclass
class Talk:
    """One session: what was said, and what the next turn has to find out.

    Attributes
    ----------
    name : str
    text : str
        Prompts and answers so far; a byte is a token.
    num_turns : int
    last_cached : int
        Tokens of the last turn that were known.
    """

    name: str
    text: str = ""
    num_turns: int = 0
    last_cached: int = 0
    _values: list[str] = field(default_factory=list)

    def ask(self, client: httpx.Client) -> None:
        """Have a turn, and check the answer: it is the secret of this talk."""
        prompt, value = self.next_prompt()
        answer = asked(client, body(prompt), self.headers)
        content = answer.json()
        text = content["choices"][0]["text"]
        assert text.startswith(f"{value}]"), (self.name, text, value)
        self.last_cached = content["usage"]["prompt_tokens_details"]["cached_tokens"]
        self.accept(prompt, text)

    @property
    def num_known(self) -> int:
        """Tokens whose keys and values were computed: all but the last one of the answer."""
        return max(0, len(self.text) - 1)

    @property
    def headers(self) -> dict[str, str]:
        return {"X-Session-ID": self.name}

    def next_prompt(self) -> tuple[str, str]:
        """Return the prompt of the next turn, and what the answer begins with."""
        turn = self.num_turns
        chosen = random.Random(f"{self.name} {turn}")
        if turn == len(self._values):
            self._values.append(str(chosen.randrange(10_000, 99_999)))
        asked = chosen.randrange(turn + 1)
        told = f"[{KEYS[turn % len(KEYS)]}:{self._values[turn]}]"
        if turn >= len(KEYS):
            told, asked = "", chosen.randrange(len(KEYS))
        prompt = f"{self.text}{told} {PAGE}\n[{KEYS[asked]}:"
        return prompt, self._values[asked]

    def accept(self, prompt: str, text: str) -> None:
        self.text, self.num_turns = prompt + text, self.num_turns + 1


def asked(client: httpx.Client, json: dict[str, Any], headers: dict[str, str]) -> httpx.Response:
    """Ask, and ask again when told to, as the official clients do."""
    for _ in range(MAX_TRIES):
        answer = client.post("/v1/completions", json=json, headers=headers)
        if answer.status_code not in (409, 503):
            break
        threading.Event().wait(float(answer.headers["retry-after"]))
    assert answer.status_code == 200, answer.text
    return answer


def body(prompt: str, **fields: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0} | fields


def computed(plain: httpx.Client, prompt: str, **fields: Any) -> str:
    """Return what a daemon answers that has never seen a word of the prompt."""
    asked = body(prompt, cache_salt=secrets.token_hex(8), **fields)
    content = plain.post("/v1/completions", json=asked).raise_for_status().json()
    assert content["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    return str(content["choices"][0]["text"])
