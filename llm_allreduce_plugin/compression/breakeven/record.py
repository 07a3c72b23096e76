"""What ``llm-allreduce breakeven --json`` writes, as others read it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llm_allreduce_plugin.base.validation import PlainText, read_document
from llm_allreduce_plugin.compression.breakeven.model import CodecSpeed
from llm_allreduce_plugin.config import WireFormat

Speed = Annotated[float, Field(ge=1e-6, le=1e9, allow_inf_nan=False)]  # GB/s


class Row(BaseModel):
    """One codec. What follows from its speeds is worked out anew."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    wire_format: WireFormat
    encode: Speed
    decode: Speed


class Record(BaseModel):
    """Codecs of one device."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    where: PlainText
    rows: tuple[Row, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _no_codec_twice(self) -> Self:
        names = [row.wire_format for row in self.rows]
        if len(set(names)) < len(names):
            message = f"rows: a wire format is there twice: {', '.join(names)}"
            raise ValueError(message)
        return self

    def speeds(self) -> dict[WireFormat, CodecSpeed]:
        """By wire format."""
        return {row.wire_format: CodecSpeed(row.encode, row.decode) for row in self.rows}


def read(path: Path) -> Record:
    """The record in a file.

    Raises:
        UnreadableFileError: naming the file, and the fields that are wrong.
    """
    return read_document(path, Record, "record of `llm-allreduce breakeven --json`")
