"""Archives of sessions on their way in and out, by private files that nobody else names."""

import os
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import aiofiles  # type: ignore[import-untyped]
from fastapi import Request

from offload.daemon.http.sse import ArchiveStream

_FOLDER: Final = "transfers"
_PIECE_BYTES: Final = 1 << 20


def clean_transfers(data_path: Path) -> None:
    """Delete what a killed process has left."""
    for path in (data_path / _FOLDER).glob("*"):
        path.unlink()


@asynccontextmanager
async def temporary_file(data_path: Path) -> AsyncIterator[Path]:
    """Enter with a path that is free, in a private folder; what is there at the end is deleted."""
    folder = data_path / _FOLDER
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / secrets.token_hex(16)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


async def write_body(request: Request, path: Path) -> None:
    """Write a request's body to a file, a piece at a time."""
    async with aiofiles.open(path, "xb", opener=_private) as file:
        async for piece in request.stream():
            await file.write(piece)


async def sent_archive(path: Path, send_timeout_s: float) -> ArchiveStream:
    """Return the response that sends a file, which may lose its name meanwhile."""
    async with AsyncExitStack() as stack:
        file = await stack.enter_async_context(aiofiles.open(path, "rb"))
        size = os.stat(file.fileno()).st_size
        headers = {
            "Content-Length": str(size),
            "Content-Disposition": 'attachment; filename="session.kv"',
        }
        return ArchiveStream(_pieces(file), send_timeout_s, headers, stack.pop_all())


async def _pieces(file: Any) -> AsyncGenerator[bytes, None]:
    while piece := await file.read(_PIECE_BYTES):
        yield piece


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
