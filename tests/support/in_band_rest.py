"""What must lie in workspaces between in-band calls, when no rank is in one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llm_allreduce_plugin import _C

# By their places among the planes of epochs (csrc/host/layout.h).
# Pushed calls of all algorithms; shared ones of each; IN_SWITCH.
EPOCH_PLANES = {"pushed": 3, "shared ONESHOT": 4, "shared TWOSHOT": 5, "IN_SWITCH": 6}
MARKER = _C.IN_BAND_MARKER - (1 << 32)  # as a signed word, of which it is the smallest
SHARED_GENERATIONS = 4  # LAR_SHARED_SLOTS


def in_band_epochs(local: torch.Tensor, layout: _C.Layout) -> torch.Tensor:
    """The in-band epochs of a rank as int32[plane, lane], in the order of EPOCH_PLANES. ``local``: its local bytes."""
    planes = range(min(EPOCH_PLANES.values()), max(EPOCH_PLANES.values()) + 1)
    first = layout.epochs_offset + planes.start * layout.lanes * 4
    return local[first : first + len(planes) * layout.lanes * 4].view(torch.int32).view(len(planes), layout.lanes)


def plane_of(layout: _C.Layout, algorithm: str) -> str:
    """The name of the plane that counts in-band calls of ``algorithm``, ONESHOT or TWOSHOT."""
    return f"shared {algorithm}" if layout.shared else "pushed"


def pushed_slots(buffer: torch.Tensor, layout: _C.Layout) -> torch.Tensor | None:
    """The words of all slots that peers push into and that this rank clears; None where there are none."""
    if layout.shared or not layout.in_band.one_shot_bytes:
        return None
    end = layout.flagged.one_shot_offset or layout.total_bytes  # flagged slots come next
    return buffer[layout.in_band.one_shot_offset : end].view(torch.int32)


def assert_at_rest(
    buffers: Sequence[torch.Tensor], locals_: Sequence[torch.Tensor], layout: _C.Layout, *, first_rank: int = 0
) -> None:
    """Pushed slots hold the marker, and all lanes of all ranks have counted the same in-band calls.

    The host waits for each device once. ``buffers``: the workspace of each rank; ``locals_``: what only that rank
    touches, which may be the beginning of its workspace; both of the ranks from ``first_rank`` on.

    Raises:
        AssertionError: it is not so; says where.
    """
    first = locals_[0].device
    epochs = torch.stack([in_band_epochs(local, layout).to(first) for local in locals_])  # [rank, plane, lane]
    agree = (epochs == epochs[:1, :, :1]).all().view(1)
    slots = [words for buffer in buffers if (words := pushed_slots(buffer, layout)) is not None]
    cleared = [(words.max() == MARKER).view(1) for words in slots]  # no copy as large as the slots
    if all(torch.cat([agree, *(each.to(first) for each in cleared)]).tolist()):
        return
    for name, plane in zip(EPOCH_PLANES, epochs.unbind(1), strict=True):
        assert bool((plane == plane[0, 0]).all()), f"in-band epochs of {name} differ, [rank][lane]: {plane.tolist()}"
    for rank, words in enumerate(slots, first_rank):
        left = (words != MARKER).nonzero().flatten()
        if len(left) > 0:
            at = layout.in_band.one_shot_offset + 4 * int(left[0])
            message = (
                f"rank {rank}: {len(left)} words of the in-band slots were not cleared, the first at byte {at} of the "
                f"workspace (slots begin at {layout.in_band.one_shot_offset}, those of gather at "
                f"{layout.in_band.gather_offset}; a generation has {layout.in_band.generation_bytes} bytes)"
            )
            raise AssertionError(message)


def assert_shared_at_rest(buffers: Sequence[torch.Tensor], locals_: Sequence[torch.Tensor], layout: _C.Layout) -> None:
    """Shared slots hold the marker in the two generations that the next calls use, of all ranks and both algorithms.

    What the two last calls stored lies in the others. Arguments as of :func:`assert_at_rest`.

    Raises:
        AssertionError: it is not so; says where.
    """
    if not layout.shared or not layout.in_band.one_shot_bytes:
        return
    slots, peers = layout.in_band, layout.world_size - 1
    regions = [
        ("ONESHOT", slots.one_shot_offset, slots.one_shot_bytes),
        ("TWOSHOT", slots.scatter_offset, slots.two_shot_bytes * peers),
        ("TWOSHOT", slots.gather_offset, slots.two_shot_bytes),
    ]
    for rank, (buffer, local) in enumerate(zip(buffers, locals_, strict=True)):
        epochs = dict(zip(EPOCH_PLANES, in_band_epochs(local, layout)[:, 0].tolist(), strict=True))
        for algorithm, offset, size in regions:
            epoch = epochs[plane_of(layout, algorithm)]
            for generation in (epoch % SHARED_GENERATIONS, (epoch + 1) % SHARED_GENERATIONS):
                first = offset + generation * size
                left = int((buffer[first : first + size].view(torch.int32) != MARKER).sum())
                where = f"rank {rank}, {algorithm}, generation {generation}, from byte {first} on"
                assert left == 0, f"{where}: {left} words were not cleared"
