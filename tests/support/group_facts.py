"""Groups and settings that the policy is asked about: made by hand, or any."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import strategies as st

from llm_allreduce_plugin import _C, AllReduceConfig
from llm_allreduce_plugin.algorithms.facts import SUPPORTED_WORLD_SIZES, GroupFacts, SlotBytes
from llm_allreduce_plugin.algorithms.measured import LINK_SCALE
from llm_allreduce_plugin.algorithms.ranges import Range, Tuned, TunedRanges
from llm_allreduce_plugin.group.layouts import host_layout, workspace_layout
from llm_allreduce_plugin.topology.links import TopologyClass, Transport

LANES = 264  # of an H200


def facts(
    world_size: int = 4,
    transport: Transport = Transport.SYMMETRIC,
    workspace: int = 64 << 20,
    in_band: bool = False,
    architecture: int | None = 90,
) -> GroupFacts:
    if transport is Transport.NONE:
        return GroupFacts(
            world_size=world_size, device="cuda", transport=transport, no_transport_reason="a test says so"
        )
    if transport is Transport.HOST:
        layout = host_layout(world_size, 64, workspace)
    elif transport is Transport.SHM:
        layout = _C.make_layout(world_size, 1, flagged_bytes=workspace, shared=True)
    else:
        share = workspace if in_band else 0
        layout = _C.make_layout(world_size, LANES, in_band_bytes=share, flagged_bytes=workspace - share)
    device = "cpu" if transport is Transport.SHM else "cuda"
    group = GroupFacts(world_size=world_size, device=device, transport=Transport.NONE, architecture=architecture)
    return group.with_layout(transport, layout)


def config(strategy: str = "AUTO", **settings: object) -> AllReduceConfig:
    return AllReduceConfig(allreduce_strategy=strategy, **settings)  # type: ignore[arg-type]


def ranges_among(*names: str) -> st.SearchStrategy[tuple[Range, ...]]:
    """Any table that names these."""
    steps = st.tuples(st.integers(0, 1 << 34), st.sampled_from(names))
    return st.builds(
        lambda limited, last: (*(Range(*step) for step in sorted(limited)), Range(None, last)),
        st.lists(steps, max_size=8, unique_by=lambda step: step[0]),
        st.sampled_from(names),
    )


any_ranges = ranges_among("ONESHOT", "TWOSHOT")
any_registered_ranges = ranges_among("ONESHOT", "TWOSHOT", "UB")
any_tuned = st.none() | st.builds(
    lambda ranges: Tuned("a profile", tuple(ranges)),
    st.lists(
        st.builds(TunedRanges, st.sampled_from((2, 4)), any_ranges, registered=st.just(()) | any_registered_ranges),
        min_size=1,
        max_size=2,
        unique_by=lambda found: found.element_bytes,
    ),
)


def over_hosts(group: GroupFacts, hosts: int | None, workspace: int, *, fabric: bool) -> GroupFacts:
    """The same ranks on so many hosts, one after another; None, or a number that does not divide them: not told.

    ``workspace``: bytes of each rank where a network joins the hosts, which are laid out in another way then.
    ``fabric``: they are one NVLink domain, where ranks reach each other's memory at all.
    """
    if hosts is None or group.world_size % hosts:
        return group
    each = group.world_size // hosts
    fabric = fabric and group.transport is Transport.SYMMETRIC
    group = dataclasses.replace(group, hosts=tuple(rank // each for rank in range(group.world_size)), fabric=fabric)
    if fabric or group.transport is Transport.NONE:
        return group
    group = dataclasses.replace(group, in_band=SlotBytes(), flagged=SlotBytes())
    return group.with_layout(group.transport, workspace_layout(config(workspace_bytes=workspace), group, LANES // 2))


def _any_group(
    topology_class: TopologyClass,
    tuned: Tuned | None,
    workspace: int,
    world_size: int,
    hosts: int | None,
    *,
    fabric: bool,
    **fields: Any,
) -> GroupFacts:
    workspace *= max(1, world_size // 8)  # large groups need more for a vector to a slot
    group = over_hosts(facts(world_size=world_size, workspace=workspace, **fields), hosts, workspace, fabric=fabric)
    return dataclasses.replace(group, topology_class=topology_class, tuned=tuned)


any_facts = st.builds(
    _any_group,
    hosts=st.sampled_from((None, 2, 4)),
    fabric=st.booleans(),
    topology_class=st.sampled_from(list(TopologyClass)),
    tuned=any_tuned,
    world_size=st.sampled_from(SUPPORTED_WORLD_SIZES),
    transport=st.sampled_from(list(Transport)),
    workspace=st.integers(2 << 20, 1 << 28),
    in_band=st.booleans(),
    architecture=st.sampled_from((None, 75, 103, *LINK_SCALE)),
)
