"""The operator that stands in SGLang's compiled graphs for an all-reduce of ours.

Like SGLang's own it finds its group by name: a graph knows no objects.
"""

from __future__ import annotations

import functools

import torch

from llm_allreduce_plugin.engines.common import fusion_ops


@functools.cache
def register_operator() -> torch.library.Library:
    """``torch.ops.llm_allreduce.all_reduce``, in every process that may trace a call. Idempotent."""
    library = torch.library.Library("llm_allreduce", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define("all_reduce(Tensor input, str group) -> Tensor")  # type: ignore[no-untyped-call]
    for key in ("CPU", "CUDA"):
        library.impl("all_reduce", all_reduce, key)  # type: ignore[no-untyped-call]
    library._register_fake("all_reduce", lambda input, group: torch.empty_like(input))  # type: ignore[no-untyped-call]  # noqa: A006, ARG005, SLF001
    return library


def all_reduce(input: torch.Tensor, group: str) -> torch.Tensor:  # noqa: A002
    """The sum of ``input`` over the ranks of ``group``, by its communicator.

    Raises:
        RuntimeError: no communicator of this process serves the group.
    """
    communicator = fusion_ops.communicator_of(group)
    if communicator is None:
        message = f"all-reduce of group {group!r}: this process has no communicator for it; was the group destroyed?"
        raise RuntimeError(message)
    return communicator.all_reduce(input)
