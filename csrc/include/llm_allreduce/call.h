// What one call is: message, norm, launch. Part of llm_allreduce.h.
#ifndef LLM_ALLREDUCE_CALL_H_
#define LLM_ALLREDUCE_CALL_H_

#include <stdint.h>

#include "llm_allreduce/kinds.h"

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
  // every lane does everything for its own vectors. Other exchanges take 0 alone.
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

#endif  // LLM_ALLREDUCE_CALL_H_
