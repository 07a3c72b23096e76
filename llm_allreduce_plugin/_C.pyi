"""Bindings of libllm_allreduce (csrc/include/llm_allreduce.h)."""

from collections.abc import Sequence


MAX_WORLD_SIZE: int = 72

MAX_HOSTS: int = 1024

VECTOR_BYTES: int = 16

MAX_LANES: int = 1024

MAX_THREADS: int = 512

MAX_WIDE_THREADS: int = 1024

MAX_FLAGGED_THREADS: int = 256

MAX_STAGED_THREADS: int = 224

STAGE_TIMES: int = 128

IN_BAND_MARKER: int = 2147483648

STATUS_INVALID_ARGUMENT: int = -1

STATUS_TIMEOUT: int = -2

STATUS_CLOSED: int = -5

STATUS_BUSY: int = -6

REASON_EXPIRED: int = 0

REASON_MISMATCH: int = 1

REASON_OVERWRITTEN: int = 2

REASON_INTERRUPTED: int = 3

REASON_EXCHANGE: int = 4

ONE_SHOT: int = 0

TWO_SHOT: int = 1

RING: int = 2

HIERARCHICAL: int = 3

REDUCE: int = 4

REDUCE_SCATTER: int = 5

HOST_SUM: int = 6

HOST_SUM_GATHER: int = 7

PUSH: int = 0

SHARED: int = 1

FLAGS: int = 2

STAGED: int = 3

PULL: int = 4

PLACE: int = 5

MULTICAST: int = 6

IN_SWITCH: int = 7

STORE: int = 0

RMS_NORM: int = 1

QUANT_NONE: int = 0

QUANT_FP8_TENSOR: int = 1

QUANT_FP8_TOKEN: int = 2

QUANT_FP8_GROUP: int = 3

QUANT_NVFP4: int = 4

SCALES_ROWS: int = 0

SCALES_COLUMNS: int = 1

SCALES_UE8M0: int = 2

SCALES_SWIZZLED: int = 3

WIRE_RAW: int = 0

WIRE_FP8: int = 1

WIRE_TQ3: int = 2

WIRE_HADAMARD2: int = 3

WIRE_FP8_GROUP: int = 4

CPU: int = -1

class Slots:
    """
    Where a kind of slots lies in a workspace; a slot of 0 bytes: there are none.
    """

    @property
    def one_shot_offset(self) -> int: ...

    @property
    def one_shot_bytes(self) -> int: ...

    @property
    def scatter_offset(self) -> int: ...

    @property
    def gather_offset(self) -> int: ...

    @property
    def two_shot_bytes(self) -> int: ...

    @property
    def staged_bytes(self) -> int: ...

    @property
    def generation_bytes(self) -> int: ...

class Layout:
    """Where everything lies inside a workspace; offsets and sizes in bytes."""

    @property
    def world_size(self) -> int: ...

    @property
    def lanes(self) -> int: ...

    @property
    def shared(self) -> bool: ...

    @property
    def flag_words(self) -> int: ...

    @property
    def epochs_offset(self) -> int: ...

    @property
    def stages_offset(self) -> int: ...

    @property
    def flags_offset(self) -> int: ...

    @property
    def probe_offset(self) -> int: ...

    @property
    def in_band(self) -> Slots: ...

    @property
    def flagged(self) -> Slots: ...

    @property
    def local_bytes(self) -> int: ...

    @property
    def total_bytes(self) -> int: ...

def make_layout(world_size: int, lanes: int, *, in_band_bytes: int = 0, flagged_bytes: int = 0, shared: bool = False) -> Layout:
    """
    Lay out a workspace with so many bytes of slots of each kind. Raises ValueError when they are too few.
    """

class MulticastLayout:
    """Where everything lies in multicast memory, in bytes."""

    @property
    def one_shot_offset(self) -> int: ...

    @property
    def one_shot_bytes(self) -> int: ...

    @property
    def results_offset(self) -> int: ...

    @property
    def results_bytes(self) -> int: ...

    @property
    def inputs_offset(self) -> int: ...

    @property
    def inputs_bytes(self) -> int: ...

    @property
    def total_bytes(self) -> int: ...

def make_multicast_layout(world_size: int, bytes: int, *, in_switch: bool = False) -> MulticastLayout:
    """
    Lay out so many bytes of multicast memory. Raises ValueError when they are too few.
    """

def sum_elements(count: int, parts: int) -> int:
    """
    fp32 elements of a sum that REDUCE (`parts` 1) or REDUCE_SCATTER (`parts`: ranks of the host) makes.
    """

def host_register(address: int, bytes: int) -> int:
    """
    Pin whole pages of host memory; the address at which the current device sees them.
    """

def host_unregister(address: int) -> None: ...

def load_kernels(world_size: int) -> None:
    """
    Load all kernels for a world size onto the current device. Others may run Python meanwhile.
    """

def capture_of(stream: int) -> int:
    """
    A number for the CUDA graph that a stream is being captured into; 0: none.
    """

def abi_version() -> int: ...

def cuda_release() -> int:
    """Of the compiler of the kernels: 13000 is 13.0."""

def error_string(code: int) -> str: ...

def refusal() -> str:
    """
    What was wrong with this thread's last call of STATUS_INVALID_ARGUMENT, as "field: condition".
    """

def wire_codes() -> dict[str, int]:
    """The number of each wire format, raw among them, by its name."""

def packet_size(format: int) -> tuple[int, int]:
    """Values and bytes of a packet of a wire format."""

def encode(format: int, dtype: int, values: int, count: int, packets: int, stream: int | None = None) -> None:
    """
    Encode `count` values at one address into packets at another, on the CPU or on a stream.
    """

def decode(format: int, dtype: int, packets: int, count: int, values: int, stream: int | None = None) -> None:
    """The other way round."""

class Norm:
    """What becomes of summed rows: lar_norm without addresses."""

    def __init__(self, hidden: int, eps: float, *, weight_bias: float = 0.0, quant: int = 0, scales: int = 0, scale_stride: int = 0) -> None:
        """
        `quant`: one of QUANT_*. `scales`: one of SCALES_*. `scale_stride`: of SCALES_COLUMNS, scales from one column to the next; 0: as many as there are rows.
        """

class NormTensors:
    """The tensors of a Norm by their addresses; 0: there is none."""

    def __init__(self, *, residual: int = 0, weight: int, norm_out: int = 0, quant_out: int = 0, scale_out: int = 0, scale: int = 0) -> None: ...

def rms_norm(norm: Norm, tensors: NormTensors, input: int, residual_out: int, count: int, dtype: int, device: int, stream: int = 0) -> None:
    """
    Norm rows that are summed already. `device`: CPU or that of the tensors. `residual_out` may be `input`.
    """

class Workspace:
    """One rank's view of the group's workspaces."""

    def __init__(self, rank: int, bases: Sequence[int], layout: Layout, timeout_s: float, device: int, local: int = 0, first_timeout_s: float = 0.0, owner: object | None = None) -> None:
        """
        `local`: layout.local_bytes of zeroed memory of this rank's own; 0: in the workspace. `first_timeout_s`: how long the first eager call, and the first of a graph, may wait; never less than `timeout_s`. `owner`: kept alive as long as anything can be called.
        """

    def set_multicast(self, all: int, own: int, layout: MulticastLayout) -> None:
        """
        Let calls of MULTICAST and IN_SWITCH use this memory; 0 and 0: refuse them. Between calls.
        """

    def probe_write(self, nonce: int, stream: int) -> None: ...

    def probe_check(self, nonce: int, verdict: int, stream: int) -> None: ...

    def failure(self) -> tuple[int, int, tuple[int, int, int, int], int, int, int, int, float] | None:
        """
        None, or (rank, peer, kind, phase, lane, expected_round, seen_round, waited_s); kind: (algorithm, exchange, wire, epilogue).
        """

    def reason(self) -> int:
        """Of a failure, one of REASON_*."""

    def mismatch(self) -> tuple[tuple[tuple[int, int, int, int], int, int], tuple[tuple[int, int, int, int], int, int]]:
        """
        Of a mismatch, this rank's call and its peer's, each (kind, dtype, count).
        """

    def mark_gone(self, peer: int) -> None:
        """A peer will never come: nothing waits for it for long."""

    def exchanges(self) -> tuple[int, int]:
        """
        First halves that have ended, and second halves that have begun, modulo 2**32.
        """

    def fail_exchange(self, waited_s: float) -> None:
        """
        An exchange between hosts has failed: no call begins any more, and no second half works on what came.
        """

    def close(self, wait_s: float) -> bool:
        """
        Let no call begin, and wait so many seconds for those of other threads: on CPU ranks until they have left their waits, on GPUs until they have been launched. True when none is left.
        """

class Plan:
    """
    All-reduces of one size and type: called with input, output and stream.
    """

    def __init__(self, workspace: Workspace, *, algorithm: int, exchange: int, wire: int = 0, count: int, dtype: int, lanes: int, threads: int, chunk_vectors: int, scatter_lanes: int = 0, drain_lanes: int = 0, epilogue: int = 0, domains: Sequence[int] = [], peer_distances: Sequence[int] = [], pools: Sequence[int] = [], cluster: int = 1, norm: Norm | None = None, hosts: int = 0) -> None:
        """
        `domains`: for HIERARCHICAL, the number of each rank's domain. `peer_distances`: for PULL, bytes from this rank's input to where it sees each rank's. `pools`: for PLACE, where it sees each rank's registered memory. `norm`: for RMS_NORM; `cluster`: lanes that share a row. `hosts`: for HOST_SUM and HOST_SUM_GATHER, sums in the input.
        """

    def __call__(self, input: int, output: int, stream: int = 0) -> int:
        """
        Returns 0; STATUS_TIMEOUT or another negative number when the group is broken, now (CPU ranks) or earlier; STATUS_CLOSED; STATUS_BUSY when another thread is in a call (CPU ranks).
        """

    def normed(self, input: int, residual_out: int, stream: int, tensors: NormTensors) -> int:
        """The same with RMS_NORM, whose output is the new residual."""

    def time_launches(self, input: int, output: int, stream: int, launches: int) -> float:
        """
        Host nanoseconds per launch of so many bare ones, on GPUs. Collective, like as many calls.
        """

    @property
    def calls(self) -> int:
        """Calls that ran at once."""

    @property
    def captured(self) -> int:
        """Calls that went into a CUDA graph."""

class EagerCalls:
    """The plans of a communicator: called with a tensor, gives its sum."""

    def __init__(self, api: object, tensor_type: object, device: int, empty_strided: object, current_stream: object) -> None:
        """
        `api`: the capsule of DLPack's C exchange interface. `tensor_type`: of the tensors that are taken. `device`: the index of a CUDA device, or CPU. `empty_strided`: called with shape, strides and dtype. `current_stream`: called with the device's index; not on a CPU.
        """

    def keep(self, count: int, type_code: int, dtype: object, plan: object, must_be_aligned: bool, refused: object) -> None:
        """
        Messages like this run by `plan`. `refused`: called with the status of a call that was refused, and raises.
        """

    def forget(self, count: int, type_code: int) -> None:
        """They do no longer."""

    def clear(self) -> None:
        """Let go of all plans."""

    def see(self, tensor: object) -> tuple[int, int, int, bool] | None:
        """
        Address, elements, number of the type, and whether it is contiguous; None for what is never taken.
        """

    @property
    def empty_strided(self) -> object:
        """What outputs are made by."""

    @empty_strided.setter
    def empty_strided(self, arg: object, /) -> None: ...

    def __len__(self) -> int: ...

    def __call__(self, tensor: object) -> object:
        """None where nothing is kept for such a tensor."""
