"""What travels between hosts: sums as they are, or packets of a wire format, encoded and decoded once on each side."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Protocol

import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.runtime.calls import DTYPE_CODES, current_stream_of
from llm_allreduce_plugin.wire import PACKETS, Packet


class Wire(Protocol):
    """How sums travel. ``count``: of the elements that a sum has; its tensor may be longer."""

    def pack(self, sums: torch.Tensor, count: int) -> torch.Tensor:
        """What this rank sends, in a tensor as long on every host."""

    def unpack(self, gathered: torch.Tensor, count: int, elements: int) -> torch.Tensor:
        """The sums of all hosts, fp32 ``[hosts * elements]``, from what they have sent, one after another."""


class Raw:
    """As they are: nothing to do."""

    def pack(self, sums: torch.Tensor, count: int) -> torch.Tensor:  # noqa: ARG002
        """See :class:`Wire`."""
        return sums

    def unpack(self, gathered: torch.Tensor, count: int, elements: int) -> torch.Tensor:  # noqa: ARG002
        """See :class:`Wire`."""
        return gathered


@dataclasses.dataclass(frozen=True)
class Packed:
    """In packets, which begin with each sum. The host's own sum counts as decoded, too: all hosts take the same.

    What a tensor has behind ``count`` elements nobody has written, and it must not be seen: one of those values would
    decide on the scale of a packet.

    Attributes:
        packet: of the wire format.
        hosts: whose sums come.
        device: this rank's.
        stream: a function for the current one.
    """

    packet: Packet
    hosts: int
    device: torch.device
    stream: Callable[[int], int]

    @classmethod
    def of(cls, wire_format: WireFormat, hosts: int, device: torch.device) -> Packed:
        """For a launch."""
        return cls(PACKETS[wire_format], hosts, device, current_stream_of(device))

    def _place(self) -> tuple[contextlib.AbstractContextManager[object], int | None]:
        """Codecs run on the current device, in a stream of it; on the CPU in none."""
        if self.device.type != "cuda":
            return contextlib.nullcontext(), None
        return torch.cuda.device(self.device), self.stream(self.device.index)

    def pack(self, sums: torch.Tensor, count: int) -> torch.Tensor:
        """See :class:`Wire`."""
        packets = max(1, -(-count // self.packet.values))  # an exchange of nothing is none
        sent = torch.empty(packets * self.packet.bytes, dtype=torch.uint8, device=self.device)
        where, stream = self._place()
        with where:
            _C.encode(self.packet.code, DTYPE_CODES[sums.dtype], sums.data_ptr(), count, sent.data_ptr(), stream)
        return sent

    def unpack(self, gathered: torch.Tensor, count: int, elements: int) -> torch.Tensor:
        """See :class:`Wire`."""
        sums = torch.empty(self.hosts * elements, dtype=torch.float32, device=self.device)
        size = gathered.numel() // self.hosts
        code, dtype = self.packet.code, DTYPE_CODES[sums.dtype]
        where, stream = self._place()
        with where:
            for host in range(self.hosts):
                from_, to = gathered[host * size :].data_ptr(), sums[host * elements :].data_ptr()
                _C.decode(code, dtype, from_, count, to, stream)
        return sums
