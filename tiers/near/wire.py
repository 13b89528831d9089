"""What goes over the bus: queries down, partial results up, in a frame of shared memory."""

from dataclasses import dataclass

import torch
from torch import Tensor

from offload.types import Partial, round_up

_LARGEST = 32767


@dataclass(frozen=True, slots=True)
class CallFormat:
    """Where a call's query and answer lie in a frame.

    Queries travel as the model has them. Answers of 16-bit models travel as 16-bit integers with
    one scale per head: as short as bfloat16, with 1/128 of its error.

    Attributes
    ----------
    num_heads : int
        Query heads of the worker.
    key_dim, value_dim : int
    dtype : torch.dtype
        Of the query.
    """

    num_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    @property
    def is_short(self) -> bool:
        """Whether answers travel as 16-bit integers."""
        return self.dtype.itemsize == 2

    @property
    def query_bytes(self) -> int:
        """Bytes that the query of one row takes."""
        return self._sizes()[0]

    @property
    def answer_bytes(self) -> int:
        """Bytes that the answer to one row takes."""
        return sum(self._sizes()[1:])

    @property
    def row_bytes(self) -> int:
        """Bytes that the query and the answer of one row of the batch take, together."""
        return sum(self._sizes())

    def num_rows(self, frame_bytes: int) -> int:
        """Return how many rows of a batch fit into a frame."""
        return frame_bytes // self.row_bytes

    def put_query(self, frame: Tensor, query: Tensor) -> None:
        """Copy ``[num_rows, num_heads, key_dim]`` into a frame."""
        place, _, _ = self._parts(frame, len(query))
        place.copy_(query.reshape(len(query), -1))

    def query(self, frame: Tensor, num_rows: int, scale: float) -> Tensor:
        """Return the queries, scaled, ``[num_rows, num_heads, key_dim]`` float32."""
        place, _, _ = self._parts(frame, num_rows)
        return place.view(num_rows, self.num_heads, self.key_dim).float() * scale

    def put_answer(self, frame: Tensor, num_rows: int, row: int, answer: Partial) -> None:
        """Copy the answer to one row, ``out`` [..., value_dim] of all heads, into a frame."""
        _, outs, numbers = self._parts(frame, num_rows)
        out = answer.out.reshape(self.num_heads, self.value_dim)
        numbers[row, 0] = answer.lse.reshape(-1)
        if self.is_short:
            scales = out.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny) / _LARGEST
            numbers[row, 1] = scales
            out = (out / scales[:, None]).round_()
        outs[row] = out.reshape(-1).to(outs.dtype)

    def answer(self, frame: Tensor, num_rows: int) -> Partial:
        """Return a copy of the answers, ``out`` [num_rows, num_heads, value_dim] float32."""
        _, outs, numbers = self._parts(frame, num_rows)
        out = outs.view(num_rows, self.num_heads, self.value_dim).float()
        if self.is_short:
            out = out * numbers[:, 1, :, None]
        return Partial(out.clone(), numbers[:, 0].clone())

    def _sizes(self) -> tuple[int, int, int]:
        heads = self.num_heads
        width = 2 if self.is_short else 4
        numbers = 8 if self.is_short else 4
        return (
            round_up(heads * self.key_dim * self.dtype.itemsize, 8),
            round_up(heads * self.value_dim * width, 8),
            round_up(heads * numbers, 8),
        )

    def _parts(self, frame: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """View a frame: queries, outputs, and per row the log-sum-exp and the scales."""
        query, out, numbers = self._sizes()
        first, second = num_rows * query, num_rows * (query + out)
        queries = frame[:first].view(num_rows, query)[
            :, : self.num_heads * self.key_dim * self.dtype.itemsize
        ]
        width = torch.int16 if self.is_short else torch.float32
        outs = frame[first:second].view(num_rows, out)
        rest = frame[second : second + num_rows * numbers].view(num_rows, numbers)
        used = self.num_heads * self.value_dim * width.itemsize
        kinds = 2 if self.is_short else 1
        return (
            queries.view(self.dtype),
            outs[:, :used].view(width),
            rest[:, : kinds * self.num_heads * 4].view(torch.float32).view(num_rows, kinds, -1),
        )
