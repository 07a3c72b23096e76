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


_CODES = _C.wire_codes()
PACKETS = {wire: Packet(_CODES[wire], *_C.packet_size(_CODES[wire])) for wire in WireFormat}
# Those that travel between hosts. There parts of a message begin at any 8 values, so that none keeps rows.
FORMATS_BETWEEN_HOSTS = tuple(wire for wire in WireFormat if not wire.keeps_rows)
