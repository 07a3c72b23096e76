"""All-reduces with residual, RMSNorm and quantization behind them: what an eager call does, in one kernel or in two."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.algorithms.base import VECTOR_BYTES
from llm_allreduce_plugin.algorithms.decision import Launch
from llm_allreduce_plugin.algorithms.facts import ELEMENT_BYTES
from llm_allreduce_plugin.norm import Normed, Quant, QuantKind, ScaleLayout, empty_outputs
from llm_allreduce_plugin.oracle.norm import residual_rms_norm
from llm_allreduce_plugin.runtime.calls import DTYPE_CODES, Call, current_stream_of, plan_of, raise_refused
from llm_allreduce_plugin.runtime.health import Health

# Of input, residual (None: there is none), weight and quantization.
NormCall = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor, Quant | None], Normed]


class NormShape(NamedTuple):
    """What does not change between calls that are made by one plan.

    Attributes:
        rows: of the message.
        hidden: elements of a row.
        dtype: of an element.
        eps: added to the mean of squares.
        weight_bias: added to the weight.
        adds: whether there is a residual.
        quant: how ``norm_out`` is quantized; None: it is not.
        layout: of the scales.
        scale_stride: scales from one column of them to the next; 0: they do not lie in columns.
        return_norm: ``norm_out`` is wanted beside what it is quantized to.
    """

    rows: int
    hidden: int
    dtype: torch.dtype
    eps: float
    weight_bias: float
    adds: bool
    quant: QuantKind | None
    layout: ScaleLayout
    scale_stride: int
    return_norm: bool

    @property
    def elements(self) -> int:
        """Of the message."""
        return self.rows * self.hidden

    def check(self) -> None:
        """Check what tensors do not show.

        Raises:
            ValueError: naming the field, its value and what is allowed.
        """
        if not (math.isfinite(self.eps) and self.eps >= 0):
            message = f"eps={self.eps}: must be a finite number that is not negative"
            raise ValueError(message)
        if not math.isfinite(self.weight_bias):
            message = f"weight_bias={self.weight_bias}: must be a finite number"
            raise ValueError(message)
        if str(self.dtype).removeprefix("torch.") not in ELEMENT_BYTES:
            message = f"input is {self.dtype}: rows of {', '.join(ELEMENT_BYTES)} can be normed"
            raise ValueError(message)

    def __str__(self) -> str:
        """``8 x 8192 bfloat16 + residual, norm (eps 1e-05, weight + 1), fp8-group (rows)``."""
        bias = f", weight + {self.weight_bias:g}" if self.weight_bias else ""
        words = f"{self.rows} x {self.hidden} {str(self.dtype).removeprefix('torch.')}"
        words += f"{' + residual' if self.adds else ''}, norm (eps {self.eps:g}{bias})"
        words += f", {self.quant} ({self.layout})" if self.quant else ""
        return words + (", norm returned" if self.quant and self.return_norm else "")


def check_tensors(
    device: torch.device,
    input_: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    quant: Quant | None,
) -> None:
    """Check what a call is given.

    Raises:
        ValueError: naming the tensor, what it is and what it must be.
    """
    shape, dtype = input_.shape, input_.dtype
    if input_.device != device:
        message = f"input is on {input_.device}, this communicator on {device}"
        raise ValueError(message)
    if not shape:
        message = "input has no dimensions: must be [..., hidden]"
        raise ValueError(message)
    if residual is not None and (residual.shape != shape or residual.dtype is not dtype or residual.device != device):
        raise ValueError(_unlike("residual", residual, input_, shape))
    if weight.shape != shape[-1:] or weight.dtype is not dtype or weight.device != device:
        raise ValueError(_unlike("weight", weight, input_, shape[-1:]))
    if quant is not None and quant.scale is not None and quant.scale.device != device:
        message = f"quant.scale is on {quant.scale.device}, this communicator on {device}"
        raise ValueError(message)


def _unlike(name: str, tensor: torch.Tensor, input_: torch.Tensor, shape: torch.Size) -> str:
    return (
        f"{name} is {list(tensor.shape)} {tensor.dtype} on {tensor.device}: must be {list(shape)} {input_.dtype} on "
        f"{input_.device}, for an input of {list(input_.shape)}"
    )


def shape_of(
    input_: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float,
    weight_bias: float,
    quant: Quant | None,
    *,
    return_norm: bool,
) -> NormShape:
    """Of a call with these arguments, whose tensors are in order."""
    hidden = input_.shape[-1]
    rows = input_.numel() // hidden if hidden else 0
    return NormShape(
        rows,
        hidden,
        input_.dtype,
        eps,
        weight_bias,
        residual is not None,
        None if quant is None else quant.kind,
        ScaleLayout.ROWS if quant is None else quant.layout,
        0 if quant is None else quant.scale_stride(rows),
        return_norm,
    )


def norm_of(shape: NormShape) -> _C.Norm:
    """What the library is told of it."""
    return _C.Norm(
        shape.hidden,
        shape.eps,
        weight_bias=shape.weight_bias,
        quant=_C.QUANT_NONE if shape.quant is None else shape.quant.code,
        scales=shape.layout.code,
        scale_stride=shape.scale_stride,
    )


def no_rows(shape: NormShape) -> NormCall:
    """A function for messages without rows: outputs of the right shapes."""

    def run(input_: torch.Tensor, _residual: torch.Tensor | None, _weight: torch.Tensor, quant: Quant | None) -> Normed:
        return empty_outputs(input_, quant, return_norm=shape.return_norm)

    return run


class _Tensors:
    """The tensors of one call, as kernels take them: contiguous, and on GPUs from a multiple of 16 bytes on."""

    def __init__(
        self,
        shape: NormShape,
        input_: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        quant: Quant | None,
    ) -> None:
        self.input = _aligned(input_)
        # Kept here until the call is under way.
        self._residual = None if residual is None else _aligned(residual)
        self._weight = _aligned(weight)
        self.outputs = outputs = empty_outputs(self.input, quant, return_norm=shape.return_norm)
        self.sum = outputs.residual_out.data_ptr()
        self.addresses = _C.NormTensors(
            residual=_address(self._residual),
            weight=self._weight.data_ptr(),
            norm_out=_address(outputs.norm_out),
            quant_out=_address(outputs.quant_out),
            scale_out=_address(outputs.scale_out),
            scale=_address(None if quant is None else quant.scale),
        )


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.is_cuda and tensor.data_ptr() % VECTOR_BYTES else tensor


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def fused_plan(workspace: _C.Workspace, launch: Launch, shape: NormShape) -> _C.Plan:
    """A launch that does all of it, ready to be called with addresses."""
    return plan_of(workspace, launch, shape.elements, shape.dtype, norm=norm_of(shape))


def fused_call(plan: _C.Plan, shape: NormShape, health: Health, device: torch.device, name: str) -> NormCall:
    """A function that does all of it in one kernel. ``name``: for errors."""
    index = device.index
    current_stream = current_stream_of(device)

    def run(input_: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, quant: Quant | None) -> Normed:
        tensors = _Tensors(shape, input_, residual, weight, quant)
        status = plan.normed(tensors.input.data_ptr(), tensors.sum, current_stream(index), tensors.addresses)
        if status != 0:
            raise_refused(status, health, name)
        return tensors.outputs

    return run


def kernel_then_norm(plan: _C.Plan, shape: NormShape, health: Health, device: torch.device, name: str) -> NormCall:
    """A function that sums by one kernel and norms by another. ``name``: for errors."""
    norm_in_place = _norm_call(shape, device)
    index = device.index
    current_stream = current_stream_of(device)

    def run(input_: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, quant: Quant | None) -> Normed:
        tensors = _Tensors(shape, input_, residual, weight, quant)
        status = plan(tensors.input.data_ptr(), tensors.sum, current_stream(index))
        if status != 0:
            raise_refused(status, health, name)
        try:
            norm_in_place(tensors, tensors.sum)
        except RuntimeError:
            health.raise_error()  # what CUDA says of a context that an expired wait has ended is not the cause
            raise
        return tensors.outputs

    return run


def engine_then_norm(all_reduce: Call, shape: NormShape, device: torch.device) -> NormCall:
    """A function that sums by ``all_reduce`` and norms by a kernel."""
    norm = _norm_call(shape, device)

    def run(input_: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, quant: Quant | None) -> Normed:
        total = _aligned(all_reduce(input_))
        tensors = _Tensors(shape, total, residual, weight, quant)
        norm(tensors, total.data_ptr())
        return tensors.outputs

    return run


def engine_then_torch(all_reduce: Call, shape: NormShape) -> NormCall:
    """The same where that kernel does not load: with the same bits in plain torch, which graphs may capture, too."""

    def run(input_: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, quant: Quant | None) -> Normed:
        return residual_rms_norm(
            all_reduce(input_), residual, weight, shape.eps,
            weight_bias=shape.weight_bias, quant=quant, return_norm=shape.return_norm,
        )  # fmt: skip

    return run


def _norm_call(shape: NormShape, device: torch.device) -> Callable[[_Tensors, int], None]:
    """A function that norms the sum at an address."""
    norm, dtype = norm_of(shape), DTYPE_CODES[shape.dtype]
    index = _C.CPU if device.type == "cpu" else device.index
    current_stream = current_stream_of(device)

    def run(tensors: _Tensors, address: int) -> None:
        stream = current_stream(device.index)
        _C.rms_norm(norm, tensors.addresses, address, tensors.sum, shape.elements, dtype, index, stream)

    return run
