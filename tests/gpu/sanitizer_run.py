"""A short run of every kernel: ``compute-sanitizer --tool memcheck python -m tests.gpu.sanitizer_run``."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from llm_allreduce_plugin.config import WireFormat
from tests.support.local_group import LocalGroup, message_of
from tests.support.low_precision import DOMAINS, expected_sum
from tests.support.reference import assert_same_bits, rank_input, rank_ordered_sum


def main() -> None:
    kinds: list[dict[str, Any]] = [
        {"in_band": True},
        {"in_band": True, "split": (1, 1)},
        {"in_band": False},
        {"host": True},
    ]
    for world_size, kind in itertools.product((2, 5, 16), kinds):
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
    for world_size, wire in itertools.product((2, 5), WireFormat):
        compressing: list[dict[str, Any]] = [{"in_band": True, "split": (1, 1)}, {"in_band": False}, {"host": True}]
        for kind in compressing:
            if wire is not WireFormat.FP8 and "split" in kind:
                continue
            group = LocalGroup(world_size, lanes=3, workspace_mib=2, timeout_s=30.0, wire_format=wire, **kind)
            for size in (1, 1025, 40_000):
                inputs = [rank_input(size, rank, size, torch.bfloat16) for rank in range(world_size)]
                expected = expected_sum(group.launch_of("LOWPRECISION", message_of(inputs[0])), inputs)
                for output in group.all_reduce("LOWPRECISION", inputs):
                    assert_same_bits(output, expected, f"{wire} x {size}")
    forms()
    print("every kernel ran")  # noqa: T201


def forms() -> None:
    """LOWPRECISION as a ring and over domains."""
    cases: list[tuple[int, str, tuple[int, ...] | None]] = [
        (3, "ring", None),
        (4, "hierarchical", DOMAINS["2+2 in turns"]),
    ]
    for (world_size, algorithm, domains), wire, host in itertools.product(cases, WireFormat, (False, True)):
        group = LocalGroup(
            world_size, lanes=3, workspace_mib=2, timeout_s=30.0, wire_format=wire, in_band=False, host=host
        )
        group.use(algorithm, domains)
        for size in (1, 1025, 40_000):
            inputs = [rank_input(size, rank, size, torch.bfloat16) for rank in range(world_size)]
            expected = expected_sum(group.launch_of("LOWPRECISION", message_of(inputs[0])), inputs)
            for output in group.all_reduce("LOWPRECISION", inputs):
                assert_same_bits(output, expected, f"{algorithm} {wire} x {size}")


if __name__ == "__main__":
    main()
