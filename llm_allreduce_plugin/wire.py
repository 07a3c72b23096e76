"""The wire formats as the compiled library knows them. Without torch: the policy needs no more than their sizes."""

from __future__ import annotations

import dataclasses

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.config import WireFormat


@dataclasses.dataclass(frozen=True)
class Packet:
    """What values of one format travel in.

    Attributes:
        code: the format's number in the C ABI (``lar_wire``).
        values: in a packet.
        bytes: of a packet.
    """

    code: int
    values: int
    bytes: int


_CODES = {WireFormat.FP8: _C.WIRE_FP8, WireFormat.TQ3: _C.WIRE_TQ3, WireFormat.HADAMARD2: _C.WIRE_HADAMARD2}
PACKETS = {wire: Packet(code, *_C.packet_size(code)) for wire, code in _CODES.items()}
