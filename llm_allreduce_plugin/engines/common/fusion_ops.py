"""The operator that stands in an engine's compiled graph for a fused layer boundary.

It is functional, and finds the communicator by the name of the group: graphs from a compile cache work in any process.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from llm_allreduce_plugin.norm import UNIT, Normed, Quant, QuantKind, ScaleLayout, empty_outputs

if TYPE_CHECKING:
    from llm_allreduce_plugin.runtime.communicator import TensorParallelCommunicator

logger = logging.getLogger("llm_allreduce_plugin")

# Columns of scales that begin at multiples of 16 bytes each: ``Quant.aligned``, which has no name among ScaleLayout.
ALIGNED_COLUMNS = "aligned-columns"

_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_MOST_BOUNDARIES = 1024  # that are counted: an engine may move weights again and again

_SCHEMA = (
    "all_reduce_rms_norm(Tensor input, Tensor? residual, Tensor weight, float eps, float weight_bias, str quant, "
    "str scales, Tensor? scale, bool return_norm, str group) -> Tensor[]"
)


class Boundaries:
    """How many different boundaries the fused calls of a group are, told once a model has run through."""

    def __init__(self, after_a_run: Callable[[], None] | None = None) -> None:
        self._after_a_run = after_a_run
        self._seen: dict[int, str] = {}
        self._told = 0

    def count(self, weight: torch.Tensor, kind: str) -> None:
        """Note a call. Every boundary has a weight of its own: one that comes again belongs to the next run."""
        key = weight.data_ptr()
        if key not in self._seen:
            if len(self._seen) < _MOST_BOUNDARIES:
                self._seen[key] = kind
        elif self._told != len(self._seen):
            self._told = len(self._seen)
            logger.info("%s", self.line())
            if self._after_a_run is not None:
                self._after_a_run()

    def line(self) -> str:
        """``all-reduce fusion: 9 layer boundaries are one call each (9 with RMSNorm); one kernel or two by size ...``.

        Not how many kernels that is: which a rank knows only of the sizes that it has met (reports have them).
        """
        return (
            f"all-reduce fusion: {len(self._seen)} layer boundaries are one call each "
            f"({in_words(Counter(self._seen.values()))}); one kernel or two by size and type"
        )


def in_words(boundaries: Counter[str]) -> str:
    """``1 with RMSNorm, 4 with RMSNorm and fp8``; ``boundaries``: how many there are, by quantization."""
    return ", ".join(f"{count} with RMSNorm{kind and f' and {kind}'}" for kind, count in sorted(boundaries.items()))


_communicators: weakref.WeakValueDictionary[str, TensorParallelCommunicator] = weakref.WeakValueDictionary()
_boundaries: dict[str, Boundaries] = {}


def serve(
    group: str, communicator: TensorParallelCommunicator, after_a_run: Callable[[str], None] | None = None
) -> None:
    """Let fused calls of ``group``, as the engine names it in its graphs, run on ``communicator`` while that lives.

    ``after_a_run``: called with the group by the rank that tells, when a model has run through and its boundaries are
    told.
    """
    _communicators[group] = communicator
    _boundaries.pop(group, None)
    if communicator.rank == 0:  # one line a group
        _boundaries[group] = Boundaries(None if after_a_run is None else functools.partial(after_a_run, group))
        if reason := communicator.no_norm_reason:
            logger.warning("all-reduce fusion: layer boundaries of group %s are not fused: %s", group, reason)


def is_served(group: object) -> bool:
    """Whether fused calls of ``group`` have a communicator in this process."""
    return group in _communicators


def fuses(group: object) -> bool:
    """Whether boundaries that sum over ``group`` become fused calls in this process."""
    communicator = _communicators.get(group) if isinstance(group, str) else None
    return communicator is not None and not communicator.no_norm_reason


def unfused_groups() -> list[str]:
    """The groups that have a communicator, whose boundaries stay as they are nevertheless."""
    return sorted(group for group, communicator in _communicators.items() if communicator.no_norm_reason)


def tells(group: object) -> bool:
    """Whether this process is the one of ``group`` that writes lines that are the same on every rank: rank 0."""
    return group in _boundaries and is_served(group)


def tells_any() -> bool:
    """Whether this process is the one that writes such lines of a group whose boundaries become fused calls."""
    return any(tells(group) and fuses(group) for group in _boundaries)


def communicator_of(group: str) -> TensorParallelCommunicator | None:
    """What :func:`serve` was given for ``group``, if that still lives."""
    return _communicators.get(group)


@functools.cache
def register_operator() -> torch.library.Library:
    """``torch.ops.llm_allreduce.all_reduce_rms_norm``, in every process that may load a compiled graph. Idempotent."""
    library = torch.library.Library("llm_allreduce", "FRAGMENT")  # type: ignore[no-untyped-call]
    # Kernels read rows as they lie: Inductor must not choose other strides.
    library.define(_SCHEMA, tags=(torch.Tag.needs_fixed_stride_order,))  # type: ignore[no-untyped-call]
    for key in ("CPU", "CUDA"):
        library.impl("all_reduce_rms_norm", all_reduce_rms_norm, key)  # type: ignore[no-untyped-call]
    library._register_fake("all_reduce_rms_norm", all_reduce_rms_norm_fake)  # type: ignore[no-untyped-call]  # noqa: SLF001
    return library


def fits(input_: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a boundary's tensors are such as our kernels take: one type, one device, whole units of elements."""
    return (
        input_.dtype in _TYPES
        and residual.dtype is input_.dtype
        and weight.dtype is input_.dtype
        and weight.device == input_.device
        and residual.shape == input_.shape
        and weight.shape == input_.shape[-1:]
        and input_.shape[-1] % UNIT == 0
    )


def result_names(quant: str, *, return_norm: bool) -> tuple[str, ...]:
    """What the operator returns, in order: fields of :class:`llm_allreduce_plugin.norm.Normed`."""
    names = ["residual_out"]
    if return_norm or not quant:
        names.append("norm_out")
    if quant:
        names.append("quant_out")
        if quant != QuantKind.FP8:  # whose scale is given
            names.append("scale_out")
    return tuple(names)


def all_reduce_rms_norm(  # noqa: PLR0917  (an operator's arguments have an order)
    input: torch.Tensor,  # noqa: A002
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    weight_bias: float,
    quant: str,
    scales: str,
    scale: torch.Tensor | None,
    return_norm: bool,  # noqa: FBT001
    group: str,
) -> list[torch.Tensor]:
    """See :meth:`TensorParallelCommunicator.all_reduce_residual_rms_norm`.

    Args:
        input: this rank's part of the sum, ``[..., hidden]``.
        residual: what is added to the sum, like ``input``.
        weight: ``[hidden]``.
        eps: added to the mean of squares.
        weight_bias: added to the weight.
        quant: a :class:`QuantKind`, or empty: none.
        scales: a :class:`ScaleLayout`, or ``ALIGNED_COLUMNS``.
        scale: the scale of kinds to which it is given.
        return_norm: return the norm beside what it is quantized to.
        group: a name of :func:`serve`.

    Returns:
        The fields of :func:`result_names`.

    Raises:
        RuntimeError: no communicator serves the group.
    """
    communicator = _communicators.get(group)
    if communicator is None:
        message = (
            f"fused all-reduce of group {group!r}: this process has no communicator for it, only for "
            f"{sorted(_communicators) or 'none'}; clear the engine's compile cache if its settings have changed"
        )
        raise RuntimeError(message)
    if (boundaries := _boundaries.get(group)) is not None:
        boundaries.count(weight, quant)
    normed = communicator.all_reduce_residual_rms_norm(
        input, residual, weight, eps,
        weight_bias=weight_bias, quant=_quant(quant, scales, scale), return_norm=return_norm,
    )  # fmt: skip
    return _results(normed, quant, return_norm=return_norm)


def all_reduce_rms_norm_fake(  # noqa: PLR0917
    input: torch.Tensor,  # noqa: A002
    residual: torch.Tensor | None,  # noqa: ARG001
    weight: torch.Tensor,  # noqa: ARG001
    eps: float,  # noqa: ARG001
    weight_bias: float,  # noqa: ARG001
    quant: str,
    scales: str,
    scale: torch.Tensor | None,
    return_norm: bool,  # noqa: FBT001
    group: str,  # noqa: ARG001
) -> list[torch.Tensor]:
    """The shapes, types and strides of :func:`all_reduce_rms_norm`."""
    normed = empty_outputs(input, _quant(quant, scales, scale), return_norm=return_norm)
    return _results(normed, quant, return_norm=return_norm)


def _quant(quant: str, scales: str, scale: torch.Tensor | None) -> Quant | None:
    if not quant:
        return None
    aligned = scales == ALIGNED_COLUMNS
    return Quant(QuantKind(quant), scale, ScaleLayout.COLUMNS if aligned else ScaleLayout(scales), aligned=aligned)


def _results(normed: Normed, quant: str, *, return_norm: bool) -> list[torch.Tensor]:
    return [getattr(normed, name) for name in result_names(quant, return_norm=return_norm)]
