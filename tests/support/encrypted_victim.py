"""What encrypted stores are tried with, and a process that saves to one until it is killed."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from offload.tiers.transfer import Transfer
from tests.support.sessions import (
    expected_payloads,
    make_content,
    make_token_ids,
    save,
    small_store,
)

KEY = bytes(range(32))
NUM_CHUNKS, SEED = 4, 11
TOKENS = make_token_ids(NUM_CHUNKS, SEED)

_CONTENT = make_content(NUM_CHUNKS, SEED, token_ids=TOKENS)
NEEDLES = {
    "tokens": TOKENS[0, 3:9].numpy().tobytes(),
    "payload": expected_payloads(_CONTENT)[2][64:96],
    "tail": _CONTENT.tensors["tail.1"].numpy().tobytes()[128:192],
    "state": b'"seed"',
}
"""Bytes that a plain root has in some file."""


def main(root: Path) -> None:
    """Save a session, and begin with another, until somebody ends the process."""
    store = small_store(root, key=KEY)
    save(store, "chat", _CONTENT)
    other = make_content(900, SEED)
    num_calls = 0

    def read(chunks: Sequence[int], out: Sequence[Tensor]) -> Transfer:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3:  # the first burst is written by now
            print("in the middle", flush=True)
            sys.stdin.read()
        return other.read(chunks, out)

    store.save("other", dataclasses.replace(other, read=read))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
