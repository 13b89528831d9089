"""Read an archive member by member, in the one order there is, and verify each."""

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from offload.errors import CorruptChunk
from offload.sessions.archive_check import unpack_foreign
from offload.sessions.archive_format import (
    END,
    MANIFEST,
    SESSION,
    TAR_BLOCK_BYTES,
    describe_header,
    distinct_blocks,
    member_bytes,
    member_header,
    parse_manifest,
    record_names,
)
from offload.sessions.archive_stream import ArchiveStream
from offload.sessions.keys import record_id
from offload.sessions.session_file import SessionFile
from offload.tiers.codec import unshuffle
from offload.tiers.record import RecordFormat
from offload.tiers.record_header import verify
from offload.tiers.transfer import CompletedTransfer, Transfer
from offload.types import PAGE_BYTES, ChunkInfo

_SKIP_BYTES = 1 << 20


class ArchiveReader:
    """An archive, of which the manifest has been read. One thread.

    Whoever has it decides by the manifest whether to go on.

    Parameters
    ----------
    stream : ArchiveStream
        At its start.

    Attributes
    ----------
    manifest : Manifest

    Raises
    ------
    ConfigError
        Another version of this package has written it.
    CorruptChunk
        It is no archive of a session.
    """

    def __init__(self, stream: ArchiveStream) -> None:
        self._stream = stream
        self._what = str(stream.path)
        self.manifest = parse_manifest(bytes(self._read_member(MANIFEST, PAGE_BYTES)), self._what)

    def read_session(self) -> SessionFile:
        """Return what the session's file says; comes before any record.

        Raises
        ------
        CorruptChunk
            It is damaged, or does not agree with the manifest.
        ConfigError
        """
        content = bytes(self._read_member(SESSION, self.manifest.session_bytes))
        file = unpack_foreign(content, self.manifest, f"{self._what}: {SESSION}")
        self._fmt = RecordFormat(file.layout, file.namespace.fingerprint)
        self._layers = file.layers
        self._blocks = [(ref.key, position) for ref, position in distinct_blocks(file).items()]
        room = member_bytes(self.manifest.record_bytes) - TAR_BLOCK_BYTES
        self._member = np.empty(room, np.uint8)
        self._payload = np.empty(self._fmt.payload_bytes, np.uint8)
        self._next = 0
        return file

    def verify(self, progress: Callable[[int], object]) -> None:
        """Read every record, and the end of the file; keep nothing.

        Parameters
        ----------
        progress : callable
            Told how many records are verified.

        Raises
        ------
        CorruptChunk
            Something is damaged, missing, or too much.
        """
        for number in range(self.manifest.num_records):
            self._read_record(self._payload)
            progress(number + 1)
        end = self._stream.read(len(END))
        if end != END:
            raise CorruptChunk(
                f"{self._what}: after {self.manifest.num_records} records there is "
                f"{describe_header(end)}"
            )
        self._stream.finish()

    def rewind(self) -> None:
        """Go back to the first record; ``read_session`` has been called."""
        self._stream.rewind()
        left = member_bytes(PAGE_BYTES) + member_bytes(self.manifest.session_bytes)
        scratch = memoryview(bytearray(min(left, _SKIP_BYTES)))
        while left:
            part = scratch[:left]
            self._stream.read_into(part)
            left -= len(part)
        self._next = 0

    def read(self, numbers: Sequence[int], out: Sequence[Tensor]) -> Transfer:
        """Fill buffers with payloads, verified again: the file may have changed.

        Parameters
        ----------
        numbers : sequence of int
            Of records, ascending from one call to the next.
        out : sequence of Tensor, uint8 [slot_bytes]

        Returns
        -------
        Transfer
            Done.
        """
        for number, buffer in zip(numbers, out, strict=True):
            assert number >= self._next, (number, self._next)
            while self._next < number:
                self._read_record(self._payload)
            self._read_record(buffer.numpy()[: self._fmt.payload_bytes])
        return CompletedTransfer(len(numbers) * self._fmt.payload_bytes)

    def _read_record(self, out: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        number, self._next = self._next, self._next + 1
        plain, planes = record_names(number)
        found = self._check_header((plain, planes), self.manifest.record_bytes)
        self._read_content(memoryview(self._member.data), self.manifest.record_bytes, found)
        page, payload = self._member[:PAGE_BYTES], self._member[PAGE_BYTES:][: len(out)]
        if found == planes:
            unshuffle(payload, self._fmt.layout.dtype.itemsize, out)
        else:
            out[:] = payload
        layer, block = divmod(number, len(self._blocks))
        key, position = self._blocks[block]
        first_token = position * self._fmt.layout.chunk_tokens
        info = ChunkInfo(record_id(key), self._layers[layer], first_token)
        verify(page.data, out.data, self._fmt, info)

    def _read_member(self, name: str, num_bytes: int) -> bytearray:
        self._check_header((name,), num_bytes)
        content = bytearray(member_bytes(num_bytes) - TAR_BLOCK_BYTES)
        self._read_content(memoryview(content), num_bytes, name)
        return content[:num_bytes]

    def _read_content(self, out: memoryview, num_bytes: int, name: str) -> None:
        """Read a member with what fills its last tar block."""
        self._stream.read_into(out)
        if any(out[num_bytes:]):
            raise CorruptChunk(f"{self._what}: something is hidden behind {name}")

    def _check_header(self, names: Sequence[str], num_bytes: int) -> str:
        """Return which of the names the next member has."""
        header = self._stream.read(TAR_BLOCK_BYTES)
        for name in names:
            is_named = header.startswith(name.encode() + b"\0")
            if is_named and header == member_header(name, num_bytes):
                return name
        raise CorruptChunk(
            f"{self._what}: a regular file {names[0]!r} of {num_bytes} bytes ({num_bytes:o} octal) "
            f"should come next, not {describe_header(header)}"
        )
