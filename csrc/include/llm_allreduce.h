// The C ABI of the all-reduce kernels: plain structs, raw pointers, a stream. No torch, no Python.
//
// Every function returns 0 on success, a positive cudaError_t when CUDA refused, or a negative lar_status.
#ifndef LLM_ALLREDUCE_H_
#define LLM_ALLREDUCE_H_

#include <stdint.h>

#if defined(_WIN32)
#error "llm_allreduce_plugin needs POSIX shared memory and Linux's CUDA stack"
#endif
#define LAR_EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum {
  LAR_CPU = -1,                 // lar_workspace.device of a CPU rank
  LAR_MAX_WORLD_SIZE = 72,      // an NVLink domain
  LAR_MAX_HOSTS = 1024,         // whose sums are summed
  LAR_VECTOR_BYTES = 16,        // the unit in which messages are split: one 128-bit access
  LAR_MAX_LANES = 1024,         // blocks that may take part in one call
  LAR_MAX_THREADS = 512,        // threads per block
  LAR_MAX_WIDE_THREADS = 1024,  // the same where a block takes a row, at a vector to a thread (LAR_RMS_NORM)
  // The same for kernels that wait for flags or go through host memory, which keep more in registers and have one more
  // warp (device/lane.cuh).
  LAR_MAX_FLAGGED_THREADS = 256,
  LAR_MAX_STAGED_THREADS = 224,  // the same for staged kernels, which keep more still
  // Generations of slots, used by turns; csrc/protocol/ and csrc/device/in_band.cuh say why they are enough.
  LAR_SLOTS = 4,
  LAR_PUSH_SLOTS = 2,
  LAR_SHARED_SLOTS = 4,
  LAR_STAGE_TIMES = 128,      // the newest stages whose times a rank keeps
  LAR_BEGUN_WORDS = 1 << 14,  // first calls of graphs that are told apart; see lar_workspace.begun
  LAR_CALL_RECORDS = 8,       // the newest calls that a CPU rank tells its peers of
};

typedef enum lar_status {
  LAR_OK = 0,
  LAR_ERROR_INVALID_ARGUMENT = -1,
  LAR_ERROR_TIMEOUT = -2,       // a peer did not arrive in time; lar_failure says which
  LAR_ERROR_MISMATCH = -3,      // CPU ranks: a peer makes another call; lar_failure says which
  LAR_ERROR_INTERRUPTED = -4,   // CPU ranks: lar_workspace.should_leave ended a wait
  LAR_ERROR_CLOSED = -5,        // the workspace is closed
  LAR_ERROR_BUSY = -6,          // CPU ranks: another thread is in a call of this workspace
  LAR_ERROR_NOT_RESIDENT = -7,  // blocks that wait for each other would not all run at the same time on this GPU
} lar_status;

typedef enum lar_dtype { LAR_FLOAT32 = 0, LAR_FLOAT16 = 1, LAR_BFLOAT16 = 2 } lar_dtype;

// What tells one all-reduce from another, from the policy to the kernel: an algorithm, how readiness travels, what
// values travel as, and what becomes of a reduced vector. docs/contributing.md says which combinations have kernels.
typedef enum lar_algorithm {
  LAR_ONE_SHOT = 0,      // everyone sends everything to everyone, and sums
  LAR_TWO_SHOT = 1,      // reduce-scatter, then all-gather
  LAR_RING = 2,          // parts go round, summed on the way (csrc/protocol/ring.h)
  LAR_HIERARCHICAL = 3,  // sums within each of two domains, which exchange them (csrc/protocol/hierarchy.h)
  // Halves of an all-reduce over several hosts, between which their sums are exchanged (csrc/protocol/hosts.h). The
  // workspace is that of the ranks of one host.
  LAR_REDUCE = 4,           // sums all of the message, to fp32
  LAR_REDUCE_SCATTER = 5,   // sums this rank's part, to fp32
  LAR_HOST_SUM = 6,         // sums the hosts' sums, in order, and rounds once; no rank waits for another
  LAR_HOST_SUM_GATHER = 7,  // the same of this rank's part; the results are gathered
} lar_algorithm;

typedef enum lar_exchange {
  LAR_PUSH = 0,    // in band: into a slot of each peer, which polls the data itself (csrc/device/in_band.cuh)
  LAR_SHARED = 1,  // in band: stored once, in memory that is as near to every rank (csrc/device/shared.cuh)
  LAR_FLAGS = 2,   // flags say lane by lane when a slot may be read (csrc/device/lane.cuh)
  LAR_STAGED = 3,  // flags; at any time a GPU sends to one peer and receives from one (csrc/device/staged_lane.cuh)
  LAR_PULL = 4,    // peers read the input in place; results are pushed (csrc/kernels/two_shot_pull.cu)
  // Results are stored into peers' outputs (csrc/protocol/place.h); inputs are pushed (CPU ranks: by flags), or read in
  // place.
  LAR_PLACE = 5,
  // Through memory of which one store reaches every rank (lar_multicast), in band (csrc/device/multicast.cuh).
  LAR_MULTICAST = 6,
  // The same, and the switch sums what it reads of all ranks: in no order that anybody knows, so not exact
  // (csrc/kernels/two_shot_in_switch.cu).
  LAR_IN_SWITCH = 7,
} lar_exchange;

// csrc/codec/ says what each is. Raw: the elements as they are.
typedef enum lar_wire {
  LAR_WIRE_RAW = 0,
  LAR_WIRE_FP8 = 1,
  LAR_WIRE_TQ3 = 2,
  LAR_WIRE_HADAMARD2 = 3,
  LAR_WIRE_FP8_GROUP = 4,  // sums in one step and two steps alone: a ring's depend on who begins
} lar_wire;

// What becomes of a reduced vector.
typedef enum lar_epilogue {
  LAR_STORE = 0,
  LAR_RMS_NORM = 1,  // a residual is added, rows are normed and, where asked for, quantized; see lar_norm
} lar_epilogue;

// How normed rows are quantized. csrc/codec/norm.h has the arithmetic.
typedef enum lar_quant {
  LAR_QUANT_NONE = 0,
  LAR_QUANT_FP8_TENSOR = 1,  // e4m3, one scale, which is given
  LAR_QUANT_FP8_TOKEN = 2,   // e4m3, a scale for each row
  LAR_QUANT_FP8_GROUP = 3,   // e4m3, a scale for each 128 elements of a row
  LAR_QUANT_NVFP4 = 4,       // e2m1, an e4m3 scale for each 16 elements of a row, over one that is given
} lar_quant;

// How the scales of a matrix lie: [rows][scales of a row] or
typedef enum lar_scales {
  LAR_SCALES_ROWS = 0,
  LAR_SCALES_COLUMNS = 1,  // FP8_GROUP: [scales of a row][rows], or as far apart as lar_norm.scale_stride says
  // FP8_GROUP: powers of two, of which only the 8 bits of the exponent are kept, those of four neighbours in a word:
  // uint32 [words of a row][rows, a multiple of 4]. Neighbours that there are not have the exponent 0.
  LAR_SCALES_UE8M0 = 2,
  // NVFP4: bytes in tiles of 128 rows by 4 scales, [tile of rows][tile of scales][row % 32][row % 128 / 32][scale % 4].
  // Rows and scales that there are not are 0.
  LAR_SCALES_SWIZZLED = 3,
} lar_scales;

typedef struct lar_kind {
  uint8_t algorithm;  // lar_algorithm
  uint8_t exchange;   // lar_exchange
  uint8_t wire;       // lar_wire
  uint8_t epilogue;   // lar_epilogue
} lar_kind;

// What a rank was waiting for when it gave up.
typedef enum lar_phase {
  LAR_PHASE_GATHER = 0,
  LAR_PHASE_SCATTER = 1,
  LAR_PHASE_EXCHANGE = 2,
  LAR_PHASE_OUTPUT = 3,  // LAR_PLACE: the peer's output may be written
} lar_phase;

// Where a kind of slots lies; offsets in bytes from the base of a rank's workspace. A slot of 0 bytes: there are none.
typedef struct lar_slots {
  int64_t one_shot_offset;
  int64_t one_shot_bytes;  // of one slot
  int64_t scatter_offset;
  int64_t gather_offset;
  int64_t two_shot_bytes;  // of one slot
  // Flagged, not shared: what all lanes' slots of all generations hold of one rank, scatter or gather. A staged call
  // takes them as one.
  int64_t staged_bytes;
  // In band, not shared: of one generation, in which ONESHOT's slots and TWOSHOT's take the same bytes.
  int64_t generation_bytes;
} lar_slots;

// When a stage of a staged call happened, in nanoseconds of this GPU's clock.
typedef struct lar_stage_times {
  int64_t began;     // before the first store to the stage's target
  int64_t sent;      // once all stores have arrived there
  int64_t received;  // once all that the stage's source stores here has arrived
} lar_stage_times;

// Where everything lies inside one rank's workspace. The same on every rank; offsets in bytes from its base.
//   local       what only this rank touches (lar_workspace.local):
//     abort     uint32                               set once a wait has expired
//     arrivals  uint32                               staged: lanes that have ended the stage; 0 between stages
//     begun     uint32 [16384]                       how often what has this word, a graph, has begun a call
//     calls     uint32                               CPU ranks: calls that this rank has begun
//     epochs    uint32 [plane][lane]                 calls, or rounds that this lane has finished
//     lengths   uint32 [plane][generation 4][lane]   shared in band: vectors that lie in that generation
//     stages    lar_stage_times [stage % 128]        staged: what nothing depends on, for tests and measurements
//   flags       uint32 [plane][lane][flag_words]     written by peers, by rank: the newest round that it has published
//   records     lar_call_record [call % 8]           CPU ranks: what this rank's newest calls are, read by peers
//
// Flagged slots, where flags tell lane by lane when a slot may be read:
//   one_shot    [generation 4][source rank][lane][one_shot_bytes]
//   scatter     [generation 4][source rank][lane][two_shot_bytes]   partial sums on their way to their owner
//   gather      [generation 4][owner rank][lane][two_shot_bytes]    results on their way back
// Staged calls see scatter and gather as [rank][staged_bytes]; device/staged_lane.cuh says why they may.
// In-band slots, with readiness in the data, shared by all lanes, LAR_IN_BAND_MARKER everywhere before the first call
// (GPUs only). A generation is of one call, whose algorithm uses all of it. Peers are counted from the holder's next
// rank on; a generation is, of generation_bytes,
//   ONESHOT     one_shot [peer][one_shot_bytes]
//   TWOSHOT     scatter [peer][two_shot_bytes], gather [peer][two_shot_bytes]
// and the offsets are those in the first of [generation 2].
//
// Shared (1): all workspaces lie in one memory that is as near to every rank, host memory. What several ranks are to
// read is stored once, in the workspace of the rank that it comes from, and read there by all; only `scatter`, where
// every reader gets something else, lies with the readers. Then these regions have no dimension of peers:
//   flagged     one_shot, gather  [generation 4][lane][..bytes]
//   in band     one_shot, gather  [generation 4][..bytes]; scatter [generation 4][peer][..bytes]
typedef struct lar_layout {
  int32_t world_size;
  int32_t lanes;
  int32_t shared;
  int32_t flag_words;  // of a lane: at least one for each rank, in whole sectors of 64 bytes
  int64_t abort_offset;
  int64_t arrivals_offset;
  int64_t begun_offset;
  int64_t calls_offset;
  int64_t epochs_offset;
  int64_t lengths_offset;
  int64_t stages_offset;
  int64_t local_bytes;  // of the local part, which comes first
  int64_t flags_offset;
  int64_t probe_offset;
  int64_t records_offset;
  lar_slots in_band;
  lar_slots flagged;
  int64_t total_bytes;
} lar_layout;

// The 32-bit word that says "not yet written": -0 as fp32, or a 16-bit +0 and -0. Senders turn an input word that
// happens to be it into zeros, which no fp32 sum starting from +0 can tell apart; results never contain a -0.
#define LAR_IN_BAND_MARKER 0x80000000u

// Where everything lies in memory of which one store reaches every rank; offsets in bytes, the same on every rank.
//   one_shot  [generation 2][source rank][one_shot_bytes]
//   results   [vector of the message]                       what owners have summed, TWOSHOT
//   inputs    [vector of the message]                       what the switch sums, LAR_IN_SWITCH; 0 bytes: nothing
// Slots hold LAR_IN_BAND_MARKER everywhere before the first call; inputs need nothing.
typedef struct lar_multicast_layout {
  int64_t one_shot_offset;
  int64_t one_shot_bytes;  // of one slot
  int64_t results_offset;
  int64_t results_bytes;  // of all ranks' parts together
  int64_t inputs_offset;
  int64_t inputs_bytes;
  int64_t total_bytes;
} lar_multicast_layout;

// What a rank has of it. A store to `all` reaches every rank's memory, its own included, at some time of each.
typedef struct lar_multicast {
  void* all;  // null: there is none, and calls of LAR_MULTICAST and LAR_IN_SWITCH are refused
  void* own;  // where this rank sees its own memory
  lar_multicast_layout layout;
} lar_multicast;

// What a CPU rank tells its peers of a call: ranks that make different calls must hear of it, not get a wrong sum.
typedef struct lar_call_record {
  uint32_t call;  // by number, from 1 on; written last
  lar_kind kind;
  int32_t dtype;
  int64_t count;
} lar_call_record;

// Why a group is broken.
typedef enum lar_reason {
  LAR_REASON_EXPIRED = 0,      // a wait has expired
  LAR_REASON_MISMATCH = 1,     // `peer` makes another call
  LAR_REASON_OVERWRITTEN = 2,  // a flag is far ahead of its round, where no peer can be: somebody else wrote there
  LAR_REASON_INTERRUPTED = 3,  // a wait was left before its end
  LAR_REASON_EXCHANGE = 4,     // an exchange between hosts has failed, says the host
} lar_reason;

// Written by the device (or by a CPU rank) when a bounded wait expires, read by the host at any time. `any_gone` and
// `gone` are written by the host; all of it, when an exchange between hosts has failed, before a second half begins.
typedef struct lar_failure {
  volatile int32_t state;  // 0: none, 1: the other fields are valid
  int32_t reason;          // lar_reason
  lar_call_record mine;    // of a mismatch
  lar_call_record theirs;
  volatile uint32_t exchanges_begun;          // first halves (lar_algorithm) that have ended, see LAR_REDUCE
  volatile uint32_t exchanges_ended;          // second halves that have begun
  volatile int32_t any_gone;                  // whether any of these is set
  volatile uint8_t gone[LAR_MAX_WORLD_SIZE];  // by rank: it will never come (again)
  int32_t rank;
  int32_t peer;
  lar_kind kind;
  int32_t phase;  // lar_phase
  int32_t lane;
  uint32_t expected_round;
  uint32_t seen_round;
  int64_t waited_ns;
} lar_failure;

// One rank's view of the group: its own workspace and, at base[peer], every peer's.
typedef struct lar_workspace {
  int32_t rank;
  int32_t device;  // its number, or LAR_CPU
  void* base[LAR_MAX_WORLD_SIZE];
  void*
      local;  // base[rank], or memory of this rank's own where workspaces are far away: lar_layout.local_bytes, zeroed
  lar_layout layout;
  lar_multicast multicast;
  lar_failure* failure;  // host memory; on CUDA the address at which the device sees it
  int64_t timeout_ns;    // no wait lasts longer
  // But for the first eager call and the first of a graph, before which ranks may compile for minutes: until a peer is
  // gone, no longer than this. `begun`: which of the words of that name counts the beginnings of what the call belongs
  // to, a graph or that eager call; it is the first while that is at most 1. -1: not a first call.
  int64_t first_timeout_ns;
  int32_t begun;
  // The call must wait for the end of all that it depends on: its kernels may not start earlier.
  int32_t starts_late;
  // CPU ranks: asked about ten times a second while a call waits, and when a signal interrupts it; non-zero ends the
  // wait. May be null.
  int (*should_leave)(void* context);
  void* should_leave_context;
} lar_workspace;

// One all-reduce. Input and output are `count` contiguous elements and must not overlap; any alignment that
// the element type allows.
//
// The output of LAR_REDUCE and LAR_REDUCE_SCATTER, and the input of LAR_HOST_SUM and LAR_HOST_SUM_GATHER, are fp32 and
// start on 16 bytes: sums of lar_sum_elements() elements, of which those beyond the message say nothing. Of the part of
// rank r they are those from element r * lar_sum_elements() on.
typedef struct lar_message {
  const void* input;
  void* output;
  int64_t count;
  lar_dtype dtype;
} lar_message;

// What LAR_RMS_NORM does with a row s of the sum, `hidden` elements:
//   r = s + residual, rounded, to lar_message.output;   y = r / sqrt(mean(r^2) + eps) * (weight + weight_bias),
//   rounded.
// csrc/codec/norm.h says which operations in which order: they depend on `hidden` alone. On GPUs all addresses are
// multiples of 16.
typedef struct lar_norm {
  int64_t hidden;        // a multiple of 8; lar_message.count is a multiple of it
  const void* residual;  // like the message, and not where its output is; null: r = s
  const void* weight;    // [hidden], of the message's type
  void* norm_out;        // y; may be null where it is quantized
  void* quant_out;       // a byte for each element; NVFP4: for each two, the first in the lower half
  void* scale_out;       // of FP8_TOKEN and FP8_GROUP fp32, but see lar_scales; of NVFP4 e4m3
  const float* scale;    // one, on the device: FP8_TENSOR, NVFP4
  // LAR_SCALES_COLUMNS: scales from the start of one column to that of the next, at least as many as there are rows;
  // what lies between is not written. 0: as many as there are rows. Of other layouts 0.
  int64_t scale_stride;
  float eps;
  float weight_bias;
  int32_t quant;   // lar_quant
  int32_t scales;  // lar_scales
} lar_norm;

// How a call is spread. Must be the same on every rank.
typedef struct lar_launch {
  int32_t lanes;    // blocks; CPU ranks have one
  int32_t threads;  // that handle data: what a kernel has beside them is its own
  // 16-byte vectors that one lane (LAR_FLAGS, LAR_STAGED) or all lanes together (in band) move per round to one peer,
  // whole packets of the wire format. Of the ring, vectors of values as they are. Further rounds take place in the same
  // kernel with flags, in further launches in band.
  int64_t chunk_vectors;
  // LAR_PUSH, for tensors that start on 16 bytes: lanes that do nothing but send this rank's input, and (two-shot)
  // nothing but take in results; the others do the rest. LAR_PLACE: the same, but results are taken in by nobody. 0:
  // every lane does everything for its own vectors. LAR_FLAGS, one-shot: half of the lanes (scatter_lanes), every
  // second block, only send.
  int32_t scatter_lanes;
  int32_t drain_lanes;
  // LAR_RMS_NORM: lanes that share a row, 1 to 8, a cluster of blocks (sm_90 and newer); 0 counts as 1.
  int32_t cluster;
} lar_launch;

// One all-reduce, the same on every rank but for addresses.
typedef struct lar_call {
  lar_kind kind;
  lar_message message;
  lar_launch launch;
  // LAR_HIERARCHICAL: a number for each rank, the same for ranks of one domain. Two domains of equal size, 2 to 4 ranks
  // each. Otherwise null.
  const int32_t* domains;
  // LAR_PULL, and LAR_PLACE of inputs that are read in place, on all ranks or none: where this rank sees each rank's
  // input, its own included; whole vectors that start on 16 bytes. The input may be overwritten as soon as the call has
  // ended. Otherwise null.
  const void* const* inputs;
  // LAR_PLACE: where this rank sees each rank's registered memory, its own included, in which message.output lies, from
  // a multiple of 16 bytes on and at most 64 GiB in. Where in there may differ from rank to rank: they tell each other.
  // Otherwise null.
  void* const* pools;
  const lar_norm* norm;  // LAR_RMS_NORM; otherwise null
  // LAR_HOST_SUM, LAR_HOST_SUM_GATHER: how many sums message.input holds, one after another. Otherwise 0.
  int32_t hosts;
} lar_call;

// What a workspace is to hold.
typedef struct lar_layout_sizes {
  int32_t world_size;
  int32_t lanes;
  int32_t shared;         // see lar_layout
  int64_t in_band_bytes;  // for in-band slots; 0: none. What does not fit a layout is rounded down.
  int64_t flagged_bytes;  // for flagged slots; 0: none
} lar_layout_sizes;

// LAR_ERROR_INVALID_ARGUMENT when a slot would hold less than one vector. One rank, of a host with no other, has
// flagged slots alone.
LAR_EXPORT int lar_layout_init(lar_layout* layout, const lar_layout_sizes* sizes);

// So many bytes of memory that one store reaches everywhere, on granularity of vectors. `in_switch`: inputs, too.
// LAR_ERROR_INVALID_ARGUMENT when a slot would hold less than one vector.
LAR_EXPORT int lar_multicast_layout_init(lar_multicast_layout* layout, int32_t world_size, int64_t bytes,
                                         int32_t in_switch);

// Elements of a sum that LAR_REDUCE (`parts` 1) or LAR_REDUCE_SCATTER (`parts`: ranks of the host) makes of a message.
LAR_EXPORT int64_t lar_sum_elements(int64_t count, int32_t parts);

// Loads all kernels for `world_size` onto the current device. Otherwise each is loaded when it is first launched, which
// may wait for kernels that run: for ever, if they wait for a rank of the same process.
LAR_EXPORT int lar_load_kernels_cuda(int32_t world_size);

// Sums the messages of all ranks in rank order, in fp32, rounded once; a call of any kind that is registered
// (csrc/host/registry.h). On a CPU rank `stream` is ignored, and the call has ended when this returns.
//
// With a wire format, everything that is summed travels in it: what ranks send their owners, and the sums on their way
// back. Every rank takes the decoded sums, the owner too, so all have the same bits. 16-bit elements on GPUs, 2 to 8
// ranks.
//
// LAR_ERROR_INVALID_ARGUMENT when no kernel has this kind, or the call does not fit the workspace;
// LAR_ERROR_NOT_RESIDENT; on CPU ranks, why the group is broken.
LAR_EXPORT int lar_all_reduce(const lar_workspace* workspace, const lar_call* call, void* stream);

// The same LAR_RMS_NORM of a message that has been summed already: no rank waits for another. `device`: LAR_CPU, where
// `stream` is ignored, or any GPU. message.output may be message.input. LAR_ERROR_INVALID_ARGUMENT for what no kernel
// takes.
LAR_EXPORT int lar_rms_norm(const lar_message* message, const lar_norm* norm, int32_t device, void* stream);

// Wire formats. Values travel in packets of `values` values in `bytes` bytes; what the last packet lacks counts as
// zero. Packets lie at multiples of 16 bytes on the device. LAR_FLOAT32 values are taken too, which only tests need.
LAR_EXPORT const char* lar_wire_name(lar_wire);  // null: there is none of this number
LAR_EXPORT int lar_packet_size(lar_wire, int32_t* values, int32_t* bytes);
LAR_EXPORT int lar_encode_cpu(lar_wire, lar_dtype, const void* values, int64_t count, void* packets);
LAR_EXPORT int lar_decode_cpu(lar_wire, lar_dtype, const void* packets, int64_t count, void* values);
LAR_EXPORT int lar_encode_cuda(lar_wire, lar_dtype, const void* values, int64_t count, void* packets, void* stream);
LAR_EXPORT int lar_decode_cuda(lar_wire, lar_dtype, const void* packets, int64_t count, void* values, void* stream);

// Proof that peers see each other's bytes. Each rank writes a word made from `nonce` into every peer's probe
// area; after a barrier of the caller's, each rank checks what peers wrote here and, by loading from each peer,
// what it wrote there. `verdict` (device memory): per peer, bit 0 = its write arrived, bit 1 = its memory reads.
LAR_EXPORT int lar_probe_write_cuda(const lar_workspace*, uint32_t nonce, void* stream);
LAR_EXPORT int lar_probe_check_cuda(const lar_workspace*, uint32_t nonce, int32_t* verdict, void* stream);

// Keeps the calls of one workspace from overlapping when they come on different streams, and makes `device`
// current around a call. Wrap every CUDA call: begin, the call, end (also after a failed call). Calls that go into one
// graph are ordered by edges of that graph, in the order in which they come, on whatever branches.
typedef struct lar_stream_order lar_stream_order;
LAR_EXPORT int lar_stream_order_create(lar_stream_order** order, int device);
LAR_EXPORT void lar_stream_order_destroy(lar_stream_order* order);
typedef struct lar_call_order {
  uint64_t capture;     // a number for the capture that the call goes into; 0: none
  int32_t starts_late;  // for lar_workspace.starts_late
} lar_call_order;
LAR_EXPORT int lar_stream_order_begin(lar_stream_order* order, void* stream, lar_call_order* call);
LAR_EXPORT int lar_stream_order_end(lar_stream_order* order, void* stream);

// lar_call_order.capture of a call on `stream`; 0 also where CUDA says nothing.
LAR_EXPORT uint64_t lar_capture_of(void* stream);

// Pins `bytes` of host memory at `address`, whole pages, and tells where the current device sees them.
LAR_EXPORT int lar_host_register(void* address, int64_t bytes, void** device_address);
LAR_EXPORT int lar_host_unregister(void* address);

// Host memory for a lar_failure that outlives a broken CUDA context. `device_address` may be null (CPU ranks).
LAR_EXPORT int lar_failure_create(lar_failure** host_address, lar_failure** device_address);
LAR_EXPORT void lar_failure_destroy(lar_failure* host_address, int registered);

// The text of any code that a function above returned.
LAR_EXPORT const char* lar_error_string(int code);

// The CUDA release that the kernels were compiled with, 1000 times the major number and 10 times the minor: 13000.
LAR_EXPORT int lar_cuda_release(void);

// The version of this ABI; bumped when a struct changes.
LAR_EXPORT int lar_abi_version(void);

#ifdef __cplusplus
}
#endif
#endif  // LLM_ALLREDUCE_H_
