"""What settings choose among."""

from __future__ import annotations

import enum


class AllReduceStrategy(enum.StrEnum):
    """How the all-reduces of a tensor-parallel group are carried out. Names as in TensorRT-LLM."""

    AUTO = "AUTO"
    NCCL = "NCCL"
    UB = "UB"
    MINLATENCY = "MINLATENCY"
    ONESHOT = "ONESHOT"
    TWOSHOT = "TWOSHOT"
    LOWPRECISION = "LOWPRECISION"
    MNNVL = "MNNVL"

    @classmethod
    def parse(cls, value: object) -> AllReduceStrategy:
        """The strategy that ``value`` names, in any case; ``MIN_LATENCY`` is accepted too.

        Raises:
            ValueError: naming every strategy, when it names none. An unknown name is never taken for AUTO.
        """
        if isinstance(value, cls):
            return value
        allowed = ", ".join(cls)
        if not isinstance(value, str):
            message = f"must be a strategy name, one of {allowed}"
            raise ValueError(message)  # noqa: TRY004  (pydantic turns ValueError into a validation error)
        name = value.strip().upper()
        if name == "MIN_LATENCY":
            return cls.MINLATENCY
        try:
            return cls(name)
        except ValueError:
            message = f"must be one of {allowed}"
            raise ValueError(message) from None


class WireFormat(enum.StrEnum):
    """What LOWPRECISION sends values as; ``csrc/codec`` says what each is."""

    FP8 = "fp8"  # e4m3 and a scale for 496 values: 8.26 bits a value
    FP8_GROUP = "fp8_group"  # e4m3 and a scale for 32 values: 8.53 bits a value; a row's answer is its own
    TQ3 = "tq3"  # three levels and a scale for 32 values: 2.5 bits a value
    HADAMARD2 = "hadamard2"  # rotated, four levels and a scale for 32 values: 2.5 bits a value, with less error

    @property
    def keeps_rows(self) -> bool:
        """Whether the answer for a row is the same whatever rows are beside it; docs/low_precision.md says how."""
        return self is WireFormat.FP8_GROUP

    @property
    def goes_in_band(self) -> bool:
        """Whether no word of a packet could be taken for the in-band marker."""
        return self in (WireFormat.FP8, WireFormat.FP8_GROUP)


class LowPrecisionAlgorithm(enum.StrEnum):
    """How LOWPRECISION moves packets."""

    AUTO = "auto"  # one_shot or hierarchical where they are for, otherwise two_shot
    ONE_SHOT = "one_shot"  # fp8, fp8_group in band: everyone sends everything to everyone, and sums
    TWO_SHOT = "two_shot"  # compressed both ways; two steps whatever the world size
    RING = "ring"  # from neighbour to neighbour: compressed while it is summed, then the rounded sums as they are
    HIERARCHICAL = "hierarchical"  # sums within two NUMA domains first; half as much crosses between them, or less


class TransportChoice(enum.StrEnum):
    """Which memory GPU ranks share."""

    AUTO = "auto"  # peers' GPU memory where all can reach it, else host memory
    PEER = "peer"
    HOST = "host"


class StagedChoice(enum.StrEnum):
    """Whether two-shot messages through peers' memory move in stages: at any time one stream out of a GPU, one in."""

    AUTO = "auto"  # large ones, where NVLink does not join the GPUs
    ON = "on"  # all
    OFF = "off"


class MulticastChoice(enum.StrEnum):
    """Whether NVSwitch multicast is used: one store that reaches every rank."""

    OFF = "off"
    ON = "on"  # a warning says why where it cannot be
    AUTO = "auto"  # among three ranks or more, where the driver has it
