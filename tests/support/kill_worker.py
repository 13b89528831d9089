"""A process that works on a session store until it is killed.

Started as a module it is a zygote: everything is imported once, in one thread, and each line on its
standard input is an order for a child forked from it. The child says on standard output what it
begins and what it has done, one JSON object per line; ``Zygote`` is the other end.
"""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch

from offload.errors import DiskFull
from offload.sessions import garbage
from offload.sessions.rebuild import rebuild
from offload.sessions.store import SessionStore
from offload.tiers.record_io import RecordIo
from tests.support.model_sessions import save_model_session
from tests.support.recipes import Recipe, save

Event = dict[str, Any]
Operation = dict[str, Any]

_DURABILITIES = ("none", "relaxed", "strict")
_MAX_SESSIONS = 7


class Zygote:
    """Starts the process, gives it orders, and hears what comes of them. Not thread-safe."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.kill_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def order(self, **order: Any) -> int:
        """Have a child do something; return its process id."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order, default=str).encode() + b"\n")
        self._process.stdin.flush()
        return int(self.hear()["pid"])

    def hear(self) -> Event:
        """Return the next thing that the child says, or ``{"ended": status}`` of it."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the zygote died"
        event: Event = json.loads(line)
        assert "error" not in event, event["error"]
        return event

    def hear_all(self) -> list[Event]:
        """Return all that the child says until it has ended."""
        events = [self.hear()]
        while "ended" not in events[-1]:
            events.append(self.hear())
        return events

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def perform(store: SessionStore, operation: Operation) -> None:
    """Do one thing to a store."""
    match operation:
        case {"do": "save", "name": name, "recipe": recipe, "pin": pin}:
            save(store, name, Recipe(**recipe), pin=pin)
        case {"do": "save_model", "name": name, "seed": seed, "scratch": scratch}:
            save_model_session(store, name, seed, Path(scratch))
        case {"do": "delete", "name": name}:
            store.delete(name)
        case {"do": "rename", "name": name, "to": new_name}:
            store.rename(name, new_name)
        case {"do": "pin", "name": name, "pin": pin}:
            store.pin(name, pin)
        case {"do": "open", "name": name}:
            store.open(name)[1].release()
        case {"do": "fsck"}:
            store.fsck(repair=True)
        case _:
            raise ValueError(operation)


def work(order: Event) -> None:
    """Do what is drawn from a seed, until somebody kills us."""
    rng = random.Random(order["seed"])
    root, durability = Path(order["root"]), rng.choice(_DURABILITIES)
    store = SessionStore(root, durability=durability)
    _tell({"names": _names(store)})
    for number in range(10**6):
        if rng.random() < 0.05:
            _tell({"begin": {"do": "reopen"}})
            store.close()
            store = SessionStore(root, durability=durability)
            _tell({"done": True, "names": _names(store)})
            continue
        operation = _draw(rng, _names(store), number, order)
        _tell({"begin": operation})
        try:
            perform(store, operation)
        except DiskFull as error:
            _tell({"done": False, "reason": str(error), "names": _names(store)})
        else:
            _tell({"done": True, "names": _names(store)})


def _draw(rng: random.Random, names: list[str], number: int, order: Event) -> Operation:
    if order.get("model_scratch") and number == 1:
        scratch = order["model_scratch"]
        return {"do": "save_model", "name": "model", "seed": order["seed"], "scratch": scratch}
    choice = rng.random()
    if not names or choice < 0.5:
        recipe = Recipe(
            seed=rng.getrandbits(40),
            num_chunks=rng.randint(0, 6),
            family=rng.randint(0, 1),
            shared_chunks=rng.randint(0, 4),
            num_rows=rng.choice([1, 1, 2]),
            has_tokens=rng.random() < 0.8,
        )
        name, pin = f"s{rng.randrange(_MAX_SESSIONS)}", rng.random() < 0.15
        return {"do": "save", "name": name, "recipe": asdict(recipe), "pin": pin}
    name = rng.choice(names)
    if choice < 0.65:
        return {"do": "delete", "name": name}
    if choice < 0.75:
        free = sorted({f"s{i}" for i in range(_MAX_SESSIONS)} - set(names))
        return {"do": "rename", "name": name, "to": rng.choice([*free, name])}
    if choice < 0.85:
        return {"do": "pin", "name": name, "pin": rng.random() < 0.3}
    return {"do": "open", "name": name} if choice < 0.97 else {"do": "fsck"}


def stumble(order: Event) -> None:
    """Do one thing, and die at its n-th step: before a system call or a statement of SQL."""
    root, operation = Path(order["root"]), order["operation"]
    with _dying_at(order["step"]) as arm:
        if operation["do"] == "rebuild":
            arm()
            rebuild(root)
            return
        if operation["do"] == "start":
            arm()
        store = SessionStore(root, durability=order["durability"])
        if operation["do"] not in ("start", "stop"):
            arm()
            perform(store, operation)
            return
        arm()
        store.close()


@contextmanager
def _dying_at(step: int) -> Iterator[Callable[[], None]]:
    left, is_armed = step, False

    def tick(*_: object) -> None:
        nonlocal left
        left -= is_armed
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def ticking(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            tick()
            return call(*args, **kwargs)

        return wrapped

    def connect(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        db: sqlite3.Connection = real_connect(*args, **kwargs)
        db.set_trace_callback(tick)
        return db

    def arm() -> None:
        nonlocal is_armed
        is_armed = True

    # The process is about to end, one way or the other: nothing is put back.
    real_connect = sqlite3.connect
    sqlite3.connect = connect  # type: ignore[assignment]
    for name in ("open", "replace", "unlink", "mkdir", "fsync", "fdatasync", "posix_fallocate"):
        setattr(os, name, ticking(getattr(os, name)))
    vars(garbage)["punch_hole"] = ticking(vars(garbage)["punch_hole"])
    RecordIo.write = ticking(RecordIo.write)  # type: ignore[method-assign]
    yield arm


def _names(store: SessionStore) -> list[str]:
    return [info.name for info in store.list()]


def _tell(event: Event) -> None:
    # One call, so that a line is there whole or not at all.
    os.write(sys.stdout.fileno(), json.dumps(event).encode() + b"\n")


def _obey(order: Event) -> None:
    _tell({"pid": os.getpid()})
    try:
        {"work": work, "stumble": stumble}[order["task"]](order)
    except BaseException:
        _tell({"error": traceback.format_exc()[-3000:]})
    finally:
        os._exit(0)


def main() -> None:
    """Fork a child for each order, and say how it ended."""
    torch.set_num_threads(1)
    while line := sys.stdin.readline():
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _obey(order)
        _, status = os.waitpid(pid, 0)
        _tell({"ended": status})


if __name__ == "__main__":
    main()
