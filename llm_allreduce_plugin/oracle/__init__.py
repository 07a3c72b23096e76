"""Wire formats in plain torch: the oracle that the kernels are compared with, and what ``accuracy`` computes with.

``encode`` takes values of any shape and floating dtype and gives a flat uint8 tensor of whole packets; ``decode`` gives
``count`` fp32 values back. Both are exact models of ``csrc/codec``: the same IEEE operations in the same order.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable

import torch

from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.wire import PACKETS


@dataclasses.dataclass(frozen=True)
class Codec:
    """One wire format.

    Attributes:
        code: its number in the C ABI (``lar_wire``).
        packet_values: values in a packet.
        packet_bytes: bytes of a packet.
        encode_packets: fp32 ``[packets, packet_values]`` to uint8 ``[packets, packet_bytes]``.
        decode_packets: the other way round.
        most_error: what the two-shot may be off by on normal data, relative; docs/low_precision.md has what it is.
    """

    code: int
    packet_values: int
    packet_bytes: int
    encode_packets: Callable[[torch.Tensor], torch.Tensor]
    decode_packets: Callable[[torch.Tensor], torch.Tensor]
    most_error: float

    def bytes_of(self, count: int) -> int:
        """Bytes of ``count`` values on the wire."""
        return -(-count // self.packet_values) * self.packet_bytes

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Whole packets; what the last one lacks is zero."""
        flat = values.reshape(-1).float()
        padding = -flat.numel() % self.packet_values
        padded = torch.nn.functional.pad(flat, (0, padding)).view(-1, self.packet_values)
        return self.encode_packets(padded).view(-1)

    def decode(self, packets: torch.Tensor, count: int) -> torch.Tensor:
        """The first ``count`` values, fp32."""
        return self.decode_packets(packets.view(-1, self.packet_bytes)).reshape(-1)[:count]

    def round_trip(self, values: torch.Tensor) -> torch.Tensor:
        """What the receiver sees of ``values``, fp32, in their shape."""
        return self.decode(self.encode(values), values.numel()).view(values.shape)


def _codec(wire: WireFormat) -> Codec:
    """Of the module that has the format's name."""
    module = importlib.import_module(f"{__name__}.{wire}")
    return Codec(
        PACKETS[wire].code,
        module.PACKET_VALUES,
        module.PACKET_BYTES,
        module.encode,
        module.decode,
        module.MOST_ERROR,
    )


CODECS: dict[WireFormat, Codec] = {wire: _codec(wire) for wire in WireFormat}
