"""An engine's own all-reduce, as what ours falls back on."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from llm_allreduce_plugin.runtime.calls import Call


def own_all_reduce(engine: str, owner: Any, method: Any, *, in_place: bool) -> Call:  # noqa: ANN401
    """``method(owner, input)``, which is ``engine``'s all-reduce. Holds on to no owner: that holds our communicator.

    ``in_place``: it may write its input. The promise here is a fresh tensor, and compiled graphs rely on it: they use
    the memory of an input again while the sum is still read. So it gets a copy.
    """
    found = weakref.ref(owner)

    def run(input_: torch.Tensor) -> torch.Tensor:
        alive = found()
        if alive is None:
            message = f"all-reduce: {engine} has destroyed this group; make a new one before the next call"
            raise RuntimeError(message)
        output: torch.Tensor = method(alive, input_.clone() if in_place else input_)
        return output

    return run
