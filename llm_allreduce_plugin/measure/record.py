"""What ``llm-allreduce bench --json`` writes, as others read it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from llm_allreduce_plugin.base.validation import PlainText, read_document

MOST_RANKS = 1024
Microseconds = Annotated[float, Field(gt=0, lt=1e12, allow_inf_nan=False)]
Amount = Annotated[int, Field(ge=1, lt=1 << 50)]
Wrong = Annotated[int, Field(ge=0, lt=1 << 60)]


class Row(BaseModel):
    """One candidate at one size; fields as of ``worker.Measurement``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    candidate: PlainText = Field(min_length=1)
    bytes: Amount
    count: Amount
    eager_us: Microseconds | None = None
    graph_us: Microseconds | None = None
    eager_wrong: Wrong | None = None
    graph_wrong: Wrong | None = None
    left_out: str = ""
    product_us: Microseconds | None = None


class Settings(BaseModel):
    """Of what was measured, what a picture may say."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    wire_format: PlainText = ""


class Record(BaseModel):
    """Measurements of one group of ranks. What else a record says of its environment is not read."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    world_size: int = Field(ge=2, le=MOST_RANKS)
    where: PlainText = ""
    options: Settings = Settings()
    rows: tuple[Row, ...] = Field(min_length=1)


def read(path: Path) -> Record:
    """The record in a file.

    Raises:
        UnreadableFileError: naming the file, and the fields that are wrong.
    """
    return read_document(path, Record, "record of `llm-allreduce bench --json`")
