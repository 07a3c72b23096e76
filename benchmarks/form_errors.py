"""Relative L2 error of one all-reduce by each of LOWPRECISION's algorithms, from their oracles. Needs no GPU.

    python benchmarks/form_errors.py --out benchmarks/form_errors.json

bf16, normal data, [128, 4096] per rank, against the fp64 sum; domains of the first and the second half of the ranks.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.measure.environment import write_record
from llm_allreduce_plugin.oracle.hierarchical import hierarchical_sum
from llm_allreduce_plugin.oracle.one_shot import one_step_sum
from llm_allreduce_plugin.oracle.ring import ring_sum
from llm_allreduce_plugin.oracle.two_shot import compressed_sum

SHAPE, SEED, CHUNK = (128, 4096), 11, 4


def errors(world_size: int, wire: WireFormat) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(SEED)
    inputs = [torch.randn(SHAPE, generator=generator).bfloat16() for _ in range(world_size)]
    exact = torch.stack([part.double() for part in inputs]).sum(0)
    domains = [rank * 2 // world_size for rank in range(world_size)]
    outputs = {"one_shot": one_step_sum(inputs, wire)} if wire.goes_in_band else {}
    outputs["two_shot"] = compressed_sum(inputs, wire, CHUNK)
    if not wire.keeps_rows:  # which other algorithms do not
        outputs["hierarchical"] = hierarchical_sum(inputs, wire, domains, CHUNK)
        outputs["ring"] = ring_sum(inputs, wire, CHUNK)
    return {
        "wire_format": str(wire),
        "world_size": world_size,
        **{name: round(float((output.double() - exact).norm() / exact.norm()), 4) for name, output in outputs.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = [errors(world_size, wire) for wire in WireFormat for world_size in (4, 8)]
    for row in rows:
        print(row)
    if arguments.out:
        write_record(arguments.out, rows, harness=__doc__, seed=SEED)


if __name__ == "__main__":
    main()
