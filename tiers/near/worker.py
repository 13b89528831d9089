"""A storage-side worker: the process that owns the shards of some KV heads.

Forked by ``launcher``; ends when the process that it works for does, however that happens.
"""

import contextlib
import os
import threading
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import torch

from offload.errors import OffloadError, StorageError
from offload.kernels import dispatch, sparf
from offload.kernels.xxh3 import checksums
from offload.tiers.near.messages import Reply, Request, WorkerConfig
from offload.tiers.near.shard import Shard
from offload.tiers.near.shared_memory import SharedMemory
from offload.types import ChunkLayout


def warm_up() -> None:
    """Load what the first request would otherwise wait for."""
    layout = ChunkLayout(1, 16, 16, 16, torch.bfloat16)
    chunk = torch.ones(layout.shape, dtype=layout.dtype)
    query = torch.ones(1, 1, layout.key_dim)
    addresses = torch.tensor([[chunk.data_ptr()]])
    torch.set_num_threads(1)
    dispatch.attend_rows(query, addresses, layout.value_dim, layout.dtype, layout.chunk_tokens)
    own = sparf.encode_channels(chunk[..., : layout.key_dim])
    codes, scales = sparf.join_codes([own, own])
    asked = query.numpy()
    channels, coverage = sparf.choose_channels(asked, layout.key_dim)
    places = np.arange(layout.key_dim)[None, None] * codes.shape[2] + codes.ctypes.data
    first = np.zeros(2, np.int64)
    found = sparf.approximate(
        asked, channels, coverage, places, scales[None], first, np.arange(2), layout.chunk_tokens
    )
    sparf.choose_groups(found, layout.chunk_tokens, 1)
    checksums(np.array([chunk.data_ptr()]), chunk.nbytes)


def main(connection_fd: int, memory_fd: int) -> None:
    """Serve requests until the parent closes the connection or dies.

    Parameters
    ----------
    connection_fd, memory_fd : int
        One end of the connection, and the shared memory.
    """
    # The launcher ends with whoever is served; a fork of that may hold the connection open.
    launcher = os.pidfd_open(os.getppid())
    connection: Connection[Any, Any] = Connection(connection_fd)
    config: WorkerConfig = connection.recv()
    torch.set_num_threads(1)  # rows are attended side by side, each by one thread
    if config.cpus:
        os.sched_setaffinity(0, config.cpus)
    memory = SharedMemory(config.shared_bytes, memory_fd)
    try:
        shard = Shard(config, memory.bytes)
    except OffloadError as error:
        connection.send(Reply(-1, None, error))
        return
    connection.send(Reply(-1, os.getpid(), None))
    with contextlib.suppress(EOFError, OSError):
        _serve(connection, shard, launcher)
    # Whoever is in the middle of a read has nobody left to tell.
    os._exit(0)


def _serve(connection: "Connection[Any, Any]", shard: Shard, launcher: int) -> None:
    sending = threading.Lock()

    def reply(number: int, value: Any, error: Exception | None) -> None:
        if error is not None and not isinstance(error, OffloadError):
            error = StorageError(f"storage worker: {type(error).__name__}: {error}")
        # A parent that is gone is noticed by the thread that receives.
        with sending, contextlib.suppress(OSError):
            connection.send(Reply(number, value, error))

    while launcher not in wait([connection, launcher]):
        request: Request = connection.recv()
        shard.handle(request.body, partial(reply, request.number))
