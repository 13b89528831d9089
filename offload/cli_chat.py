"""``offload chat``: talk to a daemon in the terminal, or through a pipe."""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from offload.cli_chat_history import ChatHistory
from offload.cli_client import (
    DaemonClient,
    Event,
    add_client_options,
    client_of,
    printable,
    session_path,
)
from offload.cli_progress import count_progress
from offload.errors import ConfigError, OffloadError
from offload.tiers.scratch import default_parent

_HELP: Final = """\
/sessions        the sessions of this daemon
/switch NAME     go on with another session, or begin it
/fork NAME       a copy of this session, and go on there
/stats           what the last answer took
/quit            leave (or Ctrl-D); sessions stay"""


@dataclass(slots=True)
class Stats:
    """What an answer took.

    Attributes
    ----------
    num_prompt_tokens, num_cached_tokens, num_tokens : int
    ttft_s, total_s : float
    by_source : dict of str to int
        Cached tokens by tier.
    """

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_tokens: int = 0
    ttft_s: float = 0.0
    total_s: float = 0.0
    by_source: dict[str, int] | None = None

    def __str__(self) -> str:
        tiers = ", ".join(f"{name} {count:,}" for name, count in (self.by_source or {}).items())
        return (
            f"{self.num_prompt_tokens:,} prompt tokens, "
            f"{self.num_cached_tokens:,} known ({tiers}); "
            f"first token after {self.ttft_s:.2f} s; {self.num_tokens:,} tokens in "
            f"{self.total_s:.2f} s"
        )


class Chat:
    """A conversation with a daemon, session by session.

    Parameters
    ----------
    client : DaemonClient
    history : ChatHistory
    session : str
    sampling : dict
        Fields of the request, such as ``max_tokens``.
    """

    def __init__(
        self, client: DaemonClient, history: ChatHistory, session: str, sampling: dict[str, Any]
    ) -> None:
        self._client = client
        self._history = history
        self._sampling = sampling
        self.session = session
        self.stats = Stats()

    def answer(self, text: str) -> Iterator[str]:
        """Yield the answer as it comes, and remember both once it is there."""
        messages = [*self._history.read(self.session), {"role": "user", "content": text}]
        body = {
            "messages": messages,
            "session_id": self.session,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_progress": True,
            **self._sampling,
        }
        began_s = time.monotonic()
        pieces: list[str] = []
        self.stats = Stats()
        for piece in self._pieces(body):
            if not pieces:
                self.stats.ttft_s = time.monotonic() - began_s
            pieces.append(piece)
            yield piece
        self.stats.total_s = time.monotonic() - began_s
        messages.append({"role": "assistant", "content": "".join(pieces)})
        self._history.write(self.session, messages)

    def fork(self, name: str) -> None:
        """Copy the session under another name, and go on there."""
        self._client.ask("POST", session_path(self.session, "fork"), {"name": name})
        self._history.write(name, self._history.read(self.session))
        self.session = name

    def sessions(self) -> list[dict[str, Any]]:
        """Return the sessions of this key."""
        found: list[dict[str, Any]] = self._client.ask("GET", "/v1/sessions")["data"]
        return found

    def _pieces(self, body: dict[str, Any]) -> Iterator[str]:
        events = self._client.events("/v1/chat/completions", body)
        chunk = _data(events)
        if chunk is not None and "prompt_progress" in chunk:
            with count_progress("reading the prompt", "tokens") as progress:
                while chunk is not None and "prompt_progress" in chunk:
                    done = chunk["prompt_progress"]
                    progress(done["processed"], done["total"])
                    chunk = _data(events)
        while chunk is not None:
            yield from self._read(chunk)
            chunk = _data(events)

    def _read(self, chunk: dict[str, Any]) -> Iterator[str]:
        if "error" in chunk:
            raise ConfigError(f"the daemon stopped: {chunk['error']['message']}")
        usage = chunk.get("usage")
        if usage is not None:
            self.stats.num_prompt_tokens = usage["prompt_tokens"]
            self.stats.num_tokens = usage["completion_tokens"]
            self.stats.num_cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
            self.stats.by_source = usage["kv"]["by_source"]
        for choice in chunk["choices"]:
            if choice["delta"].get("content"):
                yield choice["delta"]["content"]


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("chat", help="talk to a daemon; or pipe a question into it")
    add_client_options(parser)
    parser.add_argument("--session", default="chat", metavar="NAME", help="default: %(default)s")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=1024,
        metavar="N",
        help="of an answer (default: %(default)s)",
    )
    parser.add_argument("--temperature", type=float, metavar="T", help="0: no chance")
    text = "where conversations are kept (default: 'chat' in the user's cache folder)"
    parser.add_argument("--history", type=Path, metavar="DIR", help=text)


def run(args: argparse.Namespace) -> int:
    """Talk until there is nothing more to say.

    Raises
    ------
    ConfigError
        No daemon answers, or it refuses.
    """
    sampling = {"max_tokens": args.max_tokens, "temperature": args.temperature}
    chat = Chat(
        client_of(args),
        ChatHistory(args.history or default_parent() / "chat"),
        args.session,
        {name: value for name, value in sampling.items() if value is not None},
    )
    if not sys.stdin.isatty():
        _say(chat, sys.stdin.read().rstrip("\n"))
        return 0
    print(f"session {chat.session!r}; /help says what else there is")
    while (line := _read_line(chat.session)) not in (None, "/quit"):
        try:
            _turn(chat, str(line).strip())
        except OffloadError as error:
            print(f"offload: {error}", file=sys.stderr)
    return 0


def _read_line(session: str) -> str | None:
    try:
        return input(f"{session}> ")
    except EOFError:
        print()
        return None


def _turn(chat: Chat, line: str) -> None:
    command, _, name = line.partition(" ")
    match command, name.strip():
        case "", _:
            return
        case "/help", _:
            print(_HELP)
        case "/sessions", _:
            for session in chat.sessions():
                count, state = session["num_tokens"], session["state"]
                print(f"{printable(session['id'])}  {count:,} tokens, {state}")
        case "/stats", _:
            print(chat.stats)
        case (("/switch" | "/fork"), ""):
            print(f"{command} wants a name")
        case "/switch", name:
            chat.session = name
        case "/fork", name:
            chat.fork(name)
        case _ if command.startswith("/"):
            print(f"{command} is nothing; /help")
        case _:
            _say(chat, line)


def _say(chat: Chat, text: str) -> None:
    for piece in chat.answer(text):
        sys.stdout.write(printable(piece))
        sys.stdout.flush()
    print()


def _data(events: Iterator[Event]) -> Any:
    """Return the next event's data, or None at the end."""
    return next(events, ("", None))[1]
