"""The errors that test_mutations.py plants in the kernels: of every wait and every clear, that of leaving it out."""

from __future__ import annotations

from tests.kernels.planted import (
    bulk_copies,
    compressed,
    flags,
    hosts,
    in_band,
    multicast,
    placed,
    rows,
    world_sizes,
)
from tests.kernels.planted.kinds import Mutation

MUTATIONS: dict[str, Mutation] = {
    name: error
    for subject in (in_band, bulk_copies, world_sizes, flags, hosts, compressed, placed, rows, multicast)
    for name, error in subject.ERRORS.items()
}
