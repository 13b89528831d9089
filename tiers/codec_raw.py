"""``raw``: the rows as they are."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offload.tiers.codec_payload import Bytes, check_size, check_unit, decode_each
from offload.tiers.codecs import Unit


@dataclass(frozen=True)
class RawCodec:
    """Encodes nothing: payloads have no first byte of their own, so that reading is a copy."""

    name = "raw"
    number = 0
    is_lossless = True

    def max_bytes(self, unit: Unit) -> int:  # noqa: D102 - docstring inherited
        check_unit(self.name, unit)
        return unit.num_bytes

    def encode(self, rows: Tensor, unit: Unit) -> list[bytes]:  # noqa: D102 - docstring inherited
        check_unit(self.name, unit)
        return [own.tobytes() for own in rows.view(torch.uint8).numpy()]

    def decode(  # noqa: D102 - docstring inherited
        self, payloads: Sequence[memoryview], unit: Unit, out: Tensor
    ) -> None:
        def copy(payload: Bytes, rows: Tensor) -> None:
            check_size(self.name, payload, unit.num_bytes)
            rows.view(torch.uint8).numpy().reshape(-1)[:] = payload

        decode_each(self.name, copy, payloads, out)
