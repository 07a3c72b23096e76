// What tells one call from another, by number. Part of llm_allreduce.h.
#ifndef LLM_ALLREDUCE_KINDS_H_
#define LLM_ALLREDUCE_KINDS_H_

#include <stdint.h>

typedef enum lar_dtype { LAR_FLOAT32 = 0, LAR_FLOAT16 = 1, LAR_BFLOAT16 = 2 } lar_dtype;

// What tells one all-reduce from another, from the policy to the kernel: an algorithm, how readiness travels, what
// values travel as, and what becomes of a reduced vector. Which combinations have kernels: csrc/kernels/, each of
// whose files registers its own (csrc/host/registry.h).
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

#endif  // LLM_ALLREDUCE_KINDS_H_
