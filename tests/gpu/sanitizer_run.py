"""A short run of every kernel: ``compute-sanitizer --tool memcheck python -m tests.gpu.sanitizer_run``.

World sizes as arguments, to share the work out: ``python -m tests.gpu.sanitizer_run 2 5``.
"""

from __future__ import annotations

import itertools
import sys
import time
from typing import Any

import torch

from llm_allreduce_plugin.codecs import CODECS
from llm_allreduce_plugin.codecs.two_shot import compressed_sum
from llm_allreduce_plugin.config import WireFormat
from llm_allreduce_plugin.strategies.low_precision import LARGEST_WORLD_SIZE
from llm_allreduce_plugin.strategies.staging import FEWEST_RANKS
from tests.support.local_group import LocalGroup, message_of
from tests.support.reference import assert_same_bits, rank_input, rank_ordered_sum

WORLD_SIZES = (2, 5, 16)


def staged(world_size: int) -> None:
    for wire in WireFormat:
        group = LocalGroup(
            world_size, in_band=False, lanes=2, workspace_mib=2, timeout_s=30.0, wire_format=wire, staged=True
        )
        for size in (1, 1025, 40_001):
            inputs = [rank_input(size, rank, size, torch.bfloat16) for rank in range(world_size)]
            for output in group.all_reduce("TWOSHOT", inputs):
                assert_same_bits(output, rank_ordered_sum(inputs), f"staged x {size}")
            owned = group.launch_of("LOWPRECISION", message_of(inputs[0])).owned_vectors * 16
            expected = compressed_sum(inputs, wire, owned // CODECS[wire].packet_bytes)
            for output in group.all_reduce("LOWPRECISION", inputs):
                assert_same_bits(output, expected, f"staged {wire} x {size}")


def main(world_sizes: tuple[int, ...]) -> None:
    started = time.monotonic()

    def tell(what: str) -> None:
        print(f"{time.monotonic() - started:6.1f} s  {what}", flush=True)  # noqa: T201

    kinds: list[dict[str, Any]] = [
        {"in_band": True},
        {"in_band": True, "split": (1, 1)},
        {"in_band": False},
        {"host": True},
    ]
    for world_size, kind in itertools.product(world_sizes, kinds):
        group = LocalGroup(world_size, lanes=3, workspace_mib=2, timeout_s=30.0, **kind)
        algorithms = ("ONESHOT", "TWOSHOT", "PULL") if kind == {"in_band": True} else ("ONESHOT", "TWOSHOT")
        for algorithm in algorithms:
            for dtype in (torch.bfloat16, torch.float32):
                for size in (40_000, 8) if algorithm == "PULL" else (1, 1023, 40_001, 40_000):
                    inputs = [rank_input(size, rank, size, dtype) for rank in range(world_size)]
                    for output in group.all_reduce(algorithm, inputs):
                        assert_same_bits(output, rank_ordered_sum(inputs), f"{algorithm} {dtype} x {size}")
        for workspace, stream in zip(group.workspaces, group.streams, strict=True):
            workspace.probe_write(7, stream.cuda_stream)
        torch.cuda.synchronize()
        verdict = torch.zeros(world_size, dtype=torch.int32, device=group.device)
        group.workspaces[1].probe_check(7, verdict.data_ptr(), group.streams[1].cuda_stream)
        torch.cuda.synchronize()
        assert verdict.tolist() == [3] * world_size
        tell(f"{world_size} ranks, {kind}")
    for world_size, wire in itertools.product(world_sizes, WireFormat):
        if world_size > LARGEST_WORLD_SIZE:
            continue
        compressing: list[dict[str, Any]] = [{"in_band": True, "split": (1, 1)}, {"in_band": False}, {"host": True}]
        for kind in compressing:
            if wire is not WireFormat.FP8 and "split" in kind:
                continue
            group = LocalGroup(world_size, lanes=3, workspace_mib=2, timeout_s=30.0, wire_format=wire, **kind)
            for size in (1, 1025, 40_000):
                inputs = [rank_input(size, rank, size, torch.bfloat16) for rank in range(world_size)]
                owned = group.launch_of("LOWPRECISION", message_of(inputs[0])).owned_vectors * 16
                expected = compressed_sum(inputs, wire, owned // CODECS[wire].packet_bytes)
                for output in group.all_reduce("LOWPRECISION", inputs):
                    assert_same_bits(output, expected, f"{wire} x {size}")
            tell(f"{world_size} ranks, {wire}, {kind}")
    for world_size in world_sizes:
        if FEWEST_RANKS <= world_size <= LARGEST_WORLD_SIZE:
            staged(world_size)
            tell(f"{world_size} ranks, staged")
    tell("every kernel ran")


if __name__ == "__main__":
    main(tuple(map(int, sys.argv[1:])) or WORLD_SIZES)
